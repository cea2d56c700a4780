"""Every fast tokenizer has bytes for its tokens, also one that llguidance does not read."""

from pathlib import Path

import pytest

from actors.openai.served_model import load_served_model
from runtime.deployment_builder import build_deployment
from runtime.model_paths import bundled_model
from runtime.models.loader import load_tokenizer
from runtime.models.token_bytes import token_bytes
from tests.support.odd_tokenizers import ODD_TOKENIZERS
from tests.support.pair import save_model


def test_tokens_that_are_parts_of_a_character() -> None:
    tokenizer = load_tokenizer(bundled_model("target"))
    parts = [token_bytes(tokenizer).decode_bytes([token]) for token in tokenizer.encode("é→")]
    assert b"".join(parts) == "é→".encode()


@pytest.mark.parametrize("family", ODD_TOKENIZERS)
def test_tokenizers_that_the_library_does_not_read(family: str) -> None:
    """A token has the text that it adds to a longer one; ids without a token are shown."""
    tokenizer = ODD_TOKENIZERS[family]()
    table = token_bytes(tokenizer)
    assert table.decode_bytes([2, 3]) == b" the cat"
    assert table.decode_bytes([1]) == b"</s>"
    assert table.decode_bytes([99]) == b"<[99]>"


@pytest.mark.parametrize("family", ODD_TOKENIZERS)
def test_models_with_such_a_tokenizer_are_served(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "odd")
    ODD_TOKENIZERS[family]().save_pretrained(folder)
    plan = build_deployment(str(folder), (), 1, "auto", "auto", local=True)
    served = load_served_model(plan, 0)
    assert served.byte_tokenizer.decode_bytes([3]) == b" cat"
