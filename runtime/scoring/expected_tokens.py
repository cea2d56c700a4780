"""Judges a step by the tokens that were to be expected of it, as long as these come true.

What single steps bring varies more than what speculation gains: on SmolLM2 the guesses accepted in
a step deviate by 1.3 from the 0.8 that the calibrated path probabilities expect. A gate that counts
outcomes therefore ends trials of good drafters by chance. Expectations vary less, but may be wrong.
So they count as long as they agree with the outcomes, as in a t-test:

    surplus   sum of (expected - accepted) over the steps
    lost      surplus > MAX_DEVIATION * sqrt(sum of (expected - accepted)^2)

A drafter that is always wrong thus loses the trust within ten steps, and what had been counted too
much is taken back.
"""

from dataclasses import dataclass

MEMORY, SCALE_MEMORY = 48.0, 200.0  # steps
MAX_DEVIATION = 2.2  # standard errors
SCALE_PRIOR = 4.0  # accepted guesses as expected, before anything is known


@dataclass(slots=True)
class ExpectedTokens:
    """Decayed sums over the steps of one account, in guesses accepted per session."""

    surplus: float = 0.0
    squares: float = 0.0
    expected: float = 0.0
    accepted: float = 0.0

    @property
    def scale(self) -> float:
        """Return the share of the expected guesses that comes true, at most 1."""
        return min(1.0, (SCALE_PRIOR + self.accepted) / (SCALE_PRIOR + self.expected))

    def judge(self, expected: float, accepted: float) -> tuple[float, float]:
        """Return the guesses that a step counts for, and those that were counted too much before
        it.
        """
        hoped = self.scale * expected
        before, difference = self.surplus, hoped - accepted
        keep, keep_scale = 1.0 - 1.0 / MEMORY, 1.0 - 1.0 / SCALE_MEMORY
        self.surplus = keep * before + difference
        self.squares = keep * self.squares + difference * difference
        self.expected = keep_scale * self.expected + expected
        self.accepted = keep_scale * self.accepted + accepted
        if self.surplus <= MAX_DEVIATION * self.squares**0.5:
            return hoped, 0.0
        self.surplus = self.squares = 0.0
        return accepted, max(0.0, before)
