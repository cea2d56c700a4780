"""From tokens to text, one token at a time, without ever splitting a character."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character, or not yet one
MAX_TOKENS_PER_CHAR = 4  # bytes of a character, and so the most tokens that one is spread over


class Detokenizer:
    """The text of an output that follows a prompt: pieces of `decode` and `flush` joined are decode(prompt + output)
    without decode(prompt), special tokens left out.

    What the prompt leaves incomplete, the output completes: the whole character is then the output's. Bytes that never
    become a character are U+FFFD as soon as a character follows them, or at `flush`. (tokenizers' DecodeStream has no
    flush, hands out the prompt again where it ends inside a character, and raises on some sequences of byte tokens.)
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
        """The text that has become certain with this token; "" while a character is not complete."""
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
        """What is left when the tokens end."""
        text = self._aligned()
        piece, self._known = text[len(self._known) :], text
        return piece

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _aligned(self) -> str:
        """The window's text, which begins with the text that is known."""
        text = self._text(self._window)
        if text.startswith(self._known):
            return text
        self._known = self._whole
        if text.startswith(self._known):
            return text  # the output has completed a character of the prompt
        # Byte tokens in a row are decoded together, so an invalid one spoils those before it: what was handed out stays.
        self._window = self._window[self._border :]
        self._border, self._known, self._whole = 0, "", ""
        return self._text(self._window)
