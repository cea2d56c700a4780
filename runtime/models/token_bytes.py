"""Maps tokens to their bytes, for every fast tokenizer."""

from typing import Protocol

from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast


class TokenBytes(Protocol):
    def decode_bytes(self, tokens: list[int]) -> bytes:
        """Return the bytes of the tokens, one after the other; `<[id]>` for an unknown id."""
        ...


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> TokenBytes:
    """Return llguidance's table, which knows tokens that are parts of a character.

    A tokenizer that it does not read is asked for the text of each token.
    """
    try:
        table: TokenBytes = from_tokenizer(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - a panic of the library is not an Exception
        return TokenTexts(tokenizer)
    return table


class TokenTexts:
    """Asks the tokenizer for the text of a token that follows another one, in UTF-8.

    Decoders drop the space before the first token of a text, so each token is decoded twice over.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._special = frozenset(tokenizer.all_special_ids)

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return "".join(map(self._text, tokens)).encode()

    def _text(self, token: int) -> str:
        name: str | None = self._tokenizer.id_to_token(token)
        if name is None:
            return f"<[{token}]>"
        if token in self._special:
            return name
        once, twice = (
            self._tokenizer.decode([token] * count, skip_special_tokens=False) for count in (1, 2)
        )
        text: str = twice[len(once) :]
        return text
