"""Turns JSON schemas and regular expressions into vocabulary masks, with llguidance.

A grammar comes from an untrusted client, and its cost may show only at compile time or at a later
token. Each text therefore has its own process, which compiles its grammar and computes its masks
(runtime.models.grammar_worker). The kernel bounds the memory and processor time of that process. No
client's grammar runs in the target's process, and none slows another text down.
"""

import contextlib
import json
import socket
import threading
import weakref
from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from runtime.core import limits
from runtime.core.errors import InvalidRequest, Overloaded
from runtime.core.sampler_reference import Allowed
from runtime.core.sampling_params import Constraint
from runtime.models.grammar_check import check_regex, check_schema, refusal
from runtime.models.grammar_process import ForkServer
from runtime.models.grammar_worker import BUSY, ERROR, TOKEN, receive, send
from runtime.models.quiet import one_line

COMPILE_CPU_S = 0.2  # of processor time, until the first mask is there
MASKS_CPU_S = 0.2  # of processor time, for all masks after it; the model's thread waits for them
TOKEN_CPU_S = 0.005  # that each token adds to what is left of MASKS_CPU_S
MEMORY_BYTES = 128 << 20  # bytes that one grammar may take
# Of the clock, for a machine that gives little processor time; the model's thread waits for a mask.
COMPILE_TIMEOUT_S = 30.0
MASK_TIMEOUT_S = 5.0
MAX_LEXER_STATES = 20_000  # of one text; 1 to 2 kB each
MAX_ROW_ITEMS = 10_000  # of the parser; a property takes about 4 (limits.SCHEMA_PROPERTIES)
JSON_WHITESPACE = (
    r"[ \t\n\r]{0,16}"  # in JSON: some models, once they indent, go on until max_tokens
)


class GrammarMatcher:
    """A GrammarState whose masks are computed by a separate process.

    The process computes the next mask as soon as it receives a token, while the model computes. It
    ends when the matcher is garbage collected.
    """

    def __init__(self, channel: socket.socket, kind: str, size: int, eos: frozenset[int]) -> None:
        """Speaks over `channel`; `size` is the number of columns of the model's logits."""
        self._channel, self._kind, self._size, self._eos = channel, kind, size, eos
        self._mask: Allowed | None = None
        self._limit = f"{COMPILE_CPU_S:g} s"
        self._compiled = False

    def begin(self, text: str) -> None:
        """Has the process compile a grammar.

        Raises as `allowed` does, and Overloaded if the machine gives the process no time.
        """
        try:
            with self._alive():
                send(self._channel, json.dumps({"kind": self._kind, "text": text}).encode())
            self.allowed()
        except TimeoutError as error:
            raise Overloaded(
                f"the machine is too busy to compile {self._kind} within {COMPILE_TIMEOUT_S:g} s: "
                "try again later"
            ) from error
        self._channel.settimeout(MASK_TIMEOUT_S)
        self._compiled = True

    def allowed(self) -> Allowed:
        if self._mask is None:
            self._mask = self._receive()
        return self._mask

    def accept_token(self, token: int) -> None:
        # Nothing follows the end of a text, which llguidance would call an error.
        if token in self._eos:
            return
        if not self.allowed()[token]:
            raise refusal(self._kind, f"token {token} does not follow")
        self._mask, self._limit = None, f"{MASKS_CPU_S:g} s for its masks"
        with self._alive():
            self._channel.sendall(TOKEN.pack(token))

    def _receive(self) -> Allowed:
        with self._alive():
            data = receive(self._channel)
            if data is None:
                raise ConnectionResetError
        if data[:1] == BUSY:
            raise Overloaded("cannot start another grammar process: try again later")
        if data[:1] == ERROR:
            raise refusal(self._kind, data[1:].decode())
        bits = np.frombuffer(data, dtype=np.uint8, offset=1)
        return np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Raises InvalidRequest if the process has gone over its limits.

        A grammar that does not compile in time is no fault of its own: TimeoutError.
        """
        try:
            yield
        except OSError as error:
            if isinstance(error, TimeoutError):
                if not self._compiled:
                    raise
                raise refusal(self._kind, f"no mask within {MASK_TIMEOUT_S:g} s") from error
            why = f"too complex: over {self._limit} or {MEMORY_BYTES >> 20} MiB"
            raise refusal(self._kind, why) from error


class GrammarCompiler:
    """Creates a matcher for each text. It is thread-safe.

    The process that loads the tokenizer starts at the first call, which takes about a second. It is
    replaced if it is killed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, eos: frozenset[int]) -> None:
        """`size` is the number of columns of the model's logits; tokens of `eos` end a text."""
        self._tokenizer, self._size, self._eos = tokenizer, size, eos
        self._server: ForkServer | None = None
        self._unusable = ""  # why llguidance does not take the tokenizer
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()  # held while the server starts, never while one compiles

    def __call__(self, constraint: Constraint) -> GrammarMatcher:
        """Return a matcher at the beginning of a text.

        Raises InvalidRequest for an invalid or too expensive grammar, Overloaded if too many texts
        have a grammar at the same time, or the machine is too busy.
        """
        kind, text = constraint.kind, constraint.text
        if not self._eos:
            raise unusable(kind, "it has no end-of-text token")
        if kind == "json_schema":
            check_schema(text)
        elif kind == "regex":
            check_regex(text)
        channel = self._channel(kind)
        matcher = GrammarMatcher(channel, kind, self._size, self._eos)
        end = weakref.finalize(matcher, release, channel, self._open)
        try:
            matcher.begin(text)
        except BaseException:
            end()  # the error's traceback keeps the matcher alive
            raise
        return matcher

    def close(self) -> None:
        """End all processes, including those of unfinished texts, and wait for them."""
        with self._lock:
            server, self._server = self._server, None
            for channel in tuple(self._open):
                with contextlib.suppress(OSError):  # its process is over
                    channel.shutdown(socket.SHUT_RDWR)
        if server is not None:
            server.close()

    def _channel(self, kind: str) -> socket.socket:
        """Returns a channel to a new process."""
        with self._lock:
            if len(self._open) >= (most := limits.CONSTRAINED_REQUESTS):
                raise Overloaded(
                    f"server at capacity: {most} requests with a response_format: try again later"
                )
            try:
                channel = self._fork(kind)
            except OSError as error:
                raise Overloaded("cannot start the grammar server: try again later") from error
            self._open.add(channel)
        channel.settimeout(COMPILE_TIMEOUT_S)
        return channel

    def _fork(self, kind: str) -> socket.socket:
        """Return a channel to a new process. Raises OSError if none can be started."""
        if self._server is not None:
            with contextlib.suppress(OSError):
                return self._server.fork()
            self._server.close()  # it was killed: another one takes its place
            self._server = None
        if not self._unusable:
            try:
                self._server = ForkServer(self._setup())
                return self._server.fork()
            except ValueError as error:
                self._unusable = f"llguidance does not read its tokenizer: {one_line(error)}"
        raise unusable(kind, self._unusable)

    def _setup(self) -> dict[str, Any]:
        words = copy(self._tokenizer.backend_tokenizer)
        words.no_padding()
        words.no_truncation()
        return {
            "tokenizer": words.to_str(),
            "vocabulary": max(self._size, len(self._tokenizer)),
            "eos": sorted(self._eos),
            "bounds": {
                "compile_s": COMPILE_CPU_S,
                "mask_s": MASKS_CPU_S,
                "token_s": TOKEN_CPU_S,
                "memory": MEMORY_BYTES,
                "space": JSON_WHITESPACE,
                "parser": {"max_lexer_states": MAX_LEXER_STATES, "max_items_in_row": MAX_ROW_ITEMS},
            },
        }


def unusable(kind: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{kind} cannot be used with this model ({why}): ask without response_format",
        "response_format",
    )


def release(channel: socket.socket, among: set[socket.socket]) -> None:
    among.discard(channel)
    channel.close()
