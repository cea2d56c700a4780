"""JSON schemas and regular expressions as masks over a vocabulary, computed by llguidance.

A grammar comes from a stranger, and what it costs shows only when it is compiled, or at a later
token. Each text therefore has a process of its own, which compiles its grammar and computes its
masks (runtime.models.grammar_worker). The kernel bounds that process in memory and in processor
time. No stranger's grammar reaches the target's process, and none slows another text down.
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
from runtime.core.errors import Overloaded
from runtime.core.sampler_reference import Allowed
from runtime.core.sampling_params import Constraint
from runtime.models.grammar_check import check_regex, check_schema, refusal
from runtime.models.grammar_process import ForkServer
from runtime.models.grammar_worker import BUSY, ERROR, TOKEN, receive, send

COMPILE_CPU_S = 0.2  # of processor time, until the first mask is there
MASKS_CPU_S = 0.2  # of processor time, for all masks after it; the model's thread waits for them
TOKEN_CPU_S = 0.005  # that each token adds to what is left of MASKS_CPU_S
MEMORY_BYTES = 128 << 20  # bytes that one grammar may take
ANSWER_TIMEOUT_S = 5.0  # of the clock, for a machine that gives little processor time
MAX_LEXER_STATES = 20_000  # of one text; 1 to 2 kB each
MAX_ROW_ITEMS = 10_000  # of the parser; a property takes about 4 (limits.SCHEMA_PROPERTIES)
JSON_WHITESPACE = (
    r"[ \t\n\r]{0,16}"  # in JSON: some models, once they indent, go on until max_tokens
)


class GrammarMatcher:
    """A Guide whose masks come from a process of its own.

    The process computes the next mask as soon as it hears of a token, while the model computes.
    It ends when the matcher is garbage.
    """

    def __init__(self, channel: socket.socket, kind: str, size: int, eos: frozenset[int]) -> None:
        """Speaks over `channel`; `size` is the number of columns of the model's logits."""
        self._channel, self._kind, self._size, self._eos = channel, kind, size, eos
        self._mask: Allowed | None = None
        self._limit = f"{COMPILE_CPU_S:g} s"

    def begin(self, text: str) -> None:
        """Has the process compile a grammar. Raises as `allowed` does."""
        with self._alive():
            send(self._channel, json.dumps({"kind": self._kind, "text": text}).encode())
        self.allowed()

    def allowed(self) -> Allowed:
        if self._mask is None:
            self._mask = self._receive()
        return self._mask

    def accept_token(self, token: int) -> None:
        # Nothing follows the end of a text. llguidance calls the end of a complete text an error.
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
            raise Overloaded("there is no room for a process that reads a grammar: try again later")
        if data[:1] == ERROR:
            raise refusal(self._kind, data[1:].decode())
        bits = np.frombuffer(data, dtype=np.uint8, offset=1)
        return np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Raises InvalidRequest if the process has gone over its limits."""
        try:
            yield
        except OSError as error:
            why = f"too complex: over {self._limit} or {MEMORY_BYTES >> 20} MiB"
            raise refusal(self._kind, why) from error


class GrammarCompiler:
    """Opens a matcher for each text. Any thread may call it.

    The process that loads the tokenizer starts at the first call, which takes about a second. It
    is replaced if it is killed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, eos: frozenset[int]) -> None:
        """`size` is the number of columns of the model's logits; tokens of `eos` end a text."""
        self._tokenizer, self._size, self._eos = tokenizer, size, eos
        self._server: ForkServer | None = None
        self._unusable = False  # llguidance does not take the tokenizer
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()  # held while the server starts, never while one compiles

    def __call__(self, constraint: Constraint) -> GrammarMatcher:
        """Returns the beginning of a text.

        Raises InvalidRequest for what is no grammar or costs too much, Overloaded if too many
        texts have a grammar at the same time.
        """
        kind, text = constraint.kind, constraint.text
        if not self._eos:
            raise refusal(kind, "the model has no token that ends a text")
        if kind == "json_schema":
            check_schema(text)
        elif kind == "regex":
            check_regex(text)
        channel = self._channel(kind)
        matcher = GrammarMatcher(channel, kind, self._size, self._eos)
        weakref.finalize(matcher, release, channel, self._open)
        matcher.begin(text)
        return matcher

    def close(self) -> None:
        """Ends all processes, those of texts under way included, and waits for their end."""
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
                    f"{most} texts with a response_format are under way, the most: try again later"
                )
            try:
                channel = self._fork(kind)
            except OSError as error:
                raise Overloaded("no process can read grammars now: try again later") from error
            self._open.add(channel)
        channel.settimeout(ANSWER_TIMEOUT_S)
        return channel

    def _fork(self, kind: str) -> socket.socket:
        """Raises OSError where no process can be started."""
        if self._server is not None:
            with contextlib.suppress(OSError):
                return self._server.fork()
            self._server.close()  # it was killed: another one takes its place
            self._server = None
        if not self._unusable:
            try:
                self._server = ForkServer(self._setup())
                return self._server.fork()
            except ValueError:
                self._unusable = True
        raise refusal(kind, "the model's tokenizer is of no kind that llguidance knows")

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


def release(channel: socket.socket, among: set[socket.socket]) -> None:
    among.discard(channel)
    channel.close()
