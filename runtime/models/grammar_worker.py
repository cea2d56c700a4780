"""The processes that compile and run grammars. This file is executed as a program.

The first process loads the tokenizer and runs no untrusted input. It forks a child for each socket
that it receives. A child serves one text: it compiles the text's grammar, then answers each token
with the mask of the tokens that may follow. The kernel bounds the child's memory and the processor
time of each answer. A child that exceeds a bound dies, and its socket closes.

A frame is a length of 4 bytes (big endian) and that many bytes. An answer begins with MASK, ERROR
or BUSY.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MASK, ERROR, BUSY = b"m", b"e", b"b"
LENGTH = struct.Struct(">I")
TOKEN = struct.Struct(">I")


def send(channel: socket.socket, *parts: bytes) -> None:
    data = b"".join(parts)
    channel.sendall(LENGTH.pack(len(data)) + data)


def receive(channel: socket.socket) -> bytes | None:
    """Returns the next frame, or None at the end of the stream."""
    head = read(channel, LENGTH.size)
    return None if head is None else read(channel, LENGTH.unpack(head)[0])


def read(channel: socket.socket, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        piece = channel.recv(size - len(found))
        if not piece:
            return None
        found += piece
    return bytes(found)


@contextlib.contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Kill this process by SIGPROF if the block takes more than `seconds` of processor time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0.0)


def limit_memory(size: int) -> None:
    """Allow this process to map `size` more bytes."""
    mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, mapped + size))


def build_grammar(kind: str, text: str, space: str) -> str:
    """Returns the constraint in llguidance's own language. Raises ValueError."""
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    schema = '{"type": "object"}' if kind == "json_object" else text
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": space})


def error_message(matcher: LLMatcher) -> str:
    """Returns the line of llguidance's message that says what is wrong."""
    lines = matcher.get_error().splitlines() or ["nothing may follow"]
    marked = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    return next(marked, lines[0])


def send_mask(channel: socket.socket, matcher: LLMatcher) -> None:
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        send(channel, ERROR, error_message(matcher).encode(errors="replace"))
    else:
        send(channel, MASK, mask)


def serve(channel: socket.socket, tokenizer: LLTokenizer, bounds: dict[str, Any]) -> None:
    """Serves one text until the other end closes the channel."""
    first = receive(channel)
    if first is None:
        return
    asked = json.loads(first)
    limits = LLParserLimits(**bounds["parser"], verbose_errors=False)
    try:
        with processor_time(bounds["compile_s"]):
            grammar = build_grammar(asked["kind"], asked["text"], bounds["space"])
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
            send_mask(channel, matcher)
    except ValueError as error:  # text that is not Unicode, for example
        send(channel, ERROR, str(error).encode(errors="replace"))
        return
    left = bounds["mask_s"]
    while (token := read(channel, TOKEN.size)) is not None:
        began = time.process_time()
        with processor_time(max(left, 0.001)):  # 0 would be no limit
            matcher.consume_token(TOKEN.unpack(token)[0])
            send_mask(channel, matcher)
        left += bounds["token_s"] - (time.process_time() - began)
        left = min(left, bounds["mask_s"])


def fork(
    channel: socket.socket, control: socket.socket, tokenizer: LLTokenizer, bounds: dict[str, Any]
) -> None:
    """Starts a child that serves `channel`; answers BUSY if the machine has no room for one."""
    try:
        child = os.fork()
    except OSError:
        send(channel, BUSY)
        return
    if child == 0:
        try:
            control.close()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            limit_memory(bounds["memory"])
            serve(channel, tokenizer, bounds)
        finally:
            os._exit(0)


def main(control: socket.socket) -> None:
    """Forks a child for each socket that arrives on `control`, and ends them when that closes."""
    asked = receive(control)
    if asked is None:
        return
    setup = json.loads(asked)
    try:
        tokenizer = LLTokenizer(
            setup["tokenizer"], n_vocab=setup["vocabulary"], eos_token=setup["eos"]
        )
    except BaseException as error:  # noqa: BLE001 - a panic of the library is not an Exception
        send(control, ERROR, str(error).encode(errors="replace"))
        return
    send(control, MASK)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        data, files, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            break
        for file in files:
            with socket.socket(fileno=file) as channel, contextlib.suppress(OSError):
                fork(channel, control, tokenizer, setup["bounds"])
    with contextlib.suppress(ProcessLookupError):  # a group of its own has its number
        os.killpg(os.getpid(), signal.SIGTERM)
    with contextlib.suppress(ChildProcessError):
        os.wait()  # returns when the last child is gone


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")  # sooner than the model
    with socket.socket(fileno=int(sys.argv[1])) as control_socket:
        main(control_socket)
