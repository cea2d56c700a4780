"""Decodes tokens to text one at a time, without ever splitting a character."""

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

# Decoders emit it for invalid or incomplete bytes.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_TOKENS_PER_CHAR = 4  # at most one per byte
# Tokens that are decoded again at each step. Of a prompt so many are enough: what they lack before
# them changes only their own beginning. Bytes that are no character after so many never become one.
MAX_WINDOW_TOKENS = 64
CONTINUATION_BYTE = re.compile(r"<0x[89AB][0-9A-F]>")  # byte tokens within a character


class Detokenizer:
    """Decodes an output that follows a prompt.

    The pieces of `decode` and `flush` together are decode(prompt + output) without decode(prompt),
    special tokens left out. If the output completes a character that the prompt began, the whole
    character belongs to the output. Bytes that never become a character turn into U+FFFD when a
    character follows them, at `flush`, or when there are more than MAX_WINDOW_TOKENS of them. The
    work for a token depends on the length of neither prompt nor output. (tokenizers' DecodeStream
    has no flush, repeats the prompt if it ends inside a character, and raises on some sequences of
    byte tokens.)
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # The tokens from the last certain border on, behind some that are their context
        self._window = self._context(prompt)
        # Of the window's text, what was handed out or is the prompt's
        self._known = self._text(self._window)
        # Border and text without a character that the prompt may have begun
        self._border, self._whole = len(self._window), self._known
        self._last = self._known  # the window's text
        if self._known.endswith(REPLACEMENT):
            end = len(self._window)
            for border in range(end - 1, max(end - MAX_TOKENS_PER_CHAR, -1), -1):
                text = self._text(self._window[:border])
                if not text.endswith(REPLACEMENT):
                    self._border, self._whole = border, text
                    break

    @property
    def pending(self) -> int:
        """Return how many characters of the text are not certain yet: U+FFFD of single bytes."""
        return len(self._last) - len(self._known)

    def decode(self, token: int) -> str:
        """Return the text that this token makes certain; "" while a character is incomplete."""
        self._window.append(token)
        text = self._aligned()
        if text and text == self._last and not self._text([token]):
            self._window.pop()  # a special token: what follows is decoded as if it were not there
            return ""
        sure = text.rstrip(REPLACEMENT)
        piece = sure[len(self._known) :]
        if len(self._window) - self._border > MAX_WINDOW_TOKENS and sure != text:
            return self._shorten(text, sure)
        if piece and sure == text:
            self._window = self._window[self._border :]
            self._border = len(self._window)
            text = sure = self._text(self._window)
        if piece:
            self._known = self._whole = sure
        self._last = text
        return piece

    def _shorten(self, text: str, sure: str) -> str:
        """Reduce the window to what may still become a character; return the text before that."""
        border = len(self._window) - MAX_TOKENS_PER_CHAR
        sure = max(sure, self._text(self._window[:border]), key=len)
        piece = sure[len(self._known) :]
        self._window = self._window[border:]
        self._last = self._text(self._window)
        left = min(len(self._last), len(text) - len(sure))
        self._known = self._whole = self._last[: len(self._last) - left]
        self._border = 0
        return piece

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """Return the end of the prompt, as far back as what follows depends on it."""
        count = MAX_WINDOW_TOKENS
        window = list(prompt[-count:])
        while count < len(prompt) and not self._text(window):  # special tokens
            count *= 2
            window = [token for token in prompt[-count:] if self._text([token])]
        return window[-MAX_WINDOW_TOKENS:]

    def flush(self) -> str:
        """Return the remaining text after the last token."""
        text = self._aligned()
        piece, self._known = text[len(self._known) :], text
        return piece

    def _text(self, tokens: Sequence[int]) -> str:
        try:
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the library, which is no Exception
                raise
            raise RuntimeError(f"the tokenizer has failed: {error}") from error
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


class TextOffsets:
    """Counts the characters of an output before the text of each of its tokens.

    A token that completes a character begins where the character begins. Stop strings do not
    matter: they decide which text is shown, not where a token stands.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._detokenizer = tokenizer, Detokenizer(tokenizer, prompt)
        self._decoded = self._last = 0

    def next(self, token: int) -> int:
        """Return the offset of the next token's text."""
        before = self._detokenizer.pending
        piece = self._detokenizer.decode(token)
        fresh = piece + REPLACEMENT * self._detokenizer.pending
        invalid = len(fresh) - len(fresh.lstrip(REPLACEMENT))
        if invalid < len(fresh):  # it shows how many pending bytes have become no character
            found = self._decoded + min(before, invalid)
        elif before and (invalid == before or self._continues(token)):
            found = self._last
        else:
            found = self._decoded + before
        self._decoded, self._last = self._decoded + len(piece), found
        return found

    def _continues(self, token: int) -> bool:
        """Return True for a byte token that can only continue a character.

        Decoders of byte tokens show one replacement character for each byte.
        """
        return bool(CONTINUATION_BYTE.fullmatch(self._tokenizer.id_to_token(token) or ""))
