"""What a session's client may have seen: append-only, one history whatever becomes of the targets that write it."""

from runtime.messages import Tokens


class Journal:
    """The output tokens of one session. The target of the current epoch alone appends, each token at its own place.

    To be appended to before the client sees the tokens: what is not in here was never said, and the next target says it again.
    """

    def __init__(self, committed: Tokens = (), epoch: int = 0) -> None:
        self._tokens = list(committed)
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> Tokens:
        return tuple(self._tokens)

    def fence(self) -> int:
        """The next epoch, from now on the current one: nothing that an older one still sends has any effect."""
        self.epoch += 1
        return self.epoch

    def append(self, epoch: int, offset: int, tokens: Tokens) -> bool:
        """Takes tokens of the current epoch that follow the last one; False, and nothing changed, for all others."""
        if epoch != self.epoch or offset != len(self._tokens):
            return False
        self._tokens.extend(tokens)
        return True
