"""A grammar is not refused for what is not its fault, and leaves nothing behind if it is."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest

from runtime.core.errors import InvalidRequest, Overloaded
from runtime.core.sampling_params import Constraint
from runtime.model_paths import bundled_model
from runtime.models import grammar, grammar_check
from runtime.models.grammar import GrammarCompiler
from runtime.models.loader import load_tokenizer
from tests.runtime.models.test_grammar_process import ATTACK, EOS, GOOD, write


@pytest.fixture
def grammars() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(load_tokenizer(bundled_model("target")), 4096, EOS)
    yield made
    made.close()


def test_a_busy_machine_is_no_fault_of_the_grammar(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that got no time for 5 s had their grammars refused as too complex (400)."""
    first, tokenizer = grammars(GOOD), grammars._tokenizer
    assert grammars._server is not None
    server = grammars._server.process.pid
    os.kill(server, signal.SIGSTOP)
    try:
        with monkeypatch.context() as hasty:
            hasty.setattr(grammar, "COMPILE_TIMEOUT_S", 0.2)
            with pytest.raises(Overloaded, match=r"too busy to compile regex within 0\.2 s: try"):
                grammars(GOOD)
    finally:
        os.kill(server, signal.SIGCONT)
    write(tokenizer, grammars(GOOD), "abc")
    write(tokenizer, first, "abc")


@pytest.mark.parametrize("wrong", [Constraint("regex", "(?=a)"), ATTACK])
def test_a_refused_grammar_gives_its_place_back_at_once(
    wrong: Constraint, grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process lived on until garbage was collected: the error held on to it."""
    monkeypatch.setattr(grammar_check, "MAX_REGEX_PRODUCT", 10**99)
    gc.disable()
    try:
        with pytest.raises(InvalidRequest) as found:
            grammars(wrong)
        assert not grammars._open
        del found
    finally:
        gc.enable()
