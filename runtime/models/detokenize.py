"""Decodes tokens to text one at a time, without ever splitting a character."""

from collections.abc import Sequence

from tokenizers import Tokenizer

# Decoders emit it for invalid or incomplete bytes.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_TOKENS_PER_CHAR = 4  # at most one per byte


class Detokenizer:
    """Decodes an output that follows a prompt.

    The pieces of `decode` and `flush` together are decode(prompt + output) without decode(prompt),
    special tokens left out. If the output completes a character that the prompt began, the whole
    character belongs to the output. Bytes that never become a character turn into U+FFFD when a
    character follows them, or at `flush`. (tokenizers' DecodeStream has no flush, repeats the
    prompt if it ends inside a character, and raises on some sequences of byte tokens.)
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(
            prompt
        )  # the tokens from the last certain border on, behind some that are their context
        self._known = self._text(
            self._window
        )  # of the window's text, what was handed out or is the prompt's
        self._border, self._whole = (
            len(prompt),
            self._known,
        )  # without a character that the prompt may have begun
        if self._known.endswith(REPLACEMENT):
            for border in range(len(prompt) - 1, max(len(prompt) - MAX_TOKENS_PER_CHAR, -1), -1):
                text = self._text(self._window[:border])
                if not text.endswith(REPLACEMENT):
                    self._border, self._whole = border, text
                    break

    def decode(self, token: int) -> str:
        """Return the text that this token makes certain; "" while a character is incomplete."""
        self._window.append(token)
        text = self._aligned()
        sure = text.rstrip(REPLACEMENT)
        piece = sure[len(self._known) :]
        if piece and sure == text:
            self._window = self._window[self._border :]
            self._border = len(self._window)
            sure = self._text(self._window)
        if piece:
            self._known = self._whole = sure
        return piece

    def flush(self) -> str:
        """Return the remaining text after the last token."""
        text = self._aligned()
        piece, self._known = text[len(self._known) :], text
        return piece

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _aligned(self) -> str:
        """Return the window's text, which begins with the known text."""
        text = self._text(self._window)
        if text.startswith(self._known):
            return text
        self._known = self._whole
        if text.startswith(self._known):
            return text  # the output completed a character of the prompt
        # Adjacent byte tokens are decoded together, so an invalid one invalidates those before it.
        # Text that was returned stays.
        self._window = self._window[self._border :]
        self._border, self._known, self._whole = 0, "", ""
        return self._text(self._window)
