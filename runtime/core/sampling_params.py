"""Defines and validates sampling parameters."""

from dataclasses import dataclass
from typing import Literal, get_args

from runtime.core import limits
from runtime.core.errors import InvalidRequest

ConstraintKind = Literal["json_object", "json_schema", "regex"]
MIN_TEMPERATURE = 0.001  # lower ones count as 0; logits / temperature would overflow float32


@dataclass(frozen=True, slots=True)
class Constraint:
    """Constrains the form of the output to a JSON schema or a regular expression.

    `text` is the schema or the expression; it is empty for json_object. Raises InvalidRequest for a
    text that is missing or too long. runtime.models.grammar checks its meaning.
    """

    kind: ConstraintKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConstraintKind):
            raise InvalidRequest(
                f"unknown constraint {str(self.kind)[:64]!r}: "
                f"give {', '.join(get_args(ConstraintKind))}",
                "response_format",
            )
        if (size := len(self.text.encode(errors="replace"))) > limits.CONSTRAINT_BYTES:
            raise InvalidRequest(
                f"{self.kind} of {size} bytes: at most {limits.CONSTRAINT_BYTES} are allowed",
                "response_format",
            )
        if not self.text and self.kind != "json_object":
            raise InvalidRequest(f"{self.kind} is empty: give its text", "response_format")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sets how the target samples and when it stops. Names and meanings follow vLLM's class of
    that name.

    temperature 0 is greedy; so is one below MIN_TEMPERATURE, which becomes 0. top_k 0, top_p 1 and
    min_p 0 disable these filters; top_p 0 leaves the most probable token. repetition_penalty
    applies to prompt and output, presence_penalty and frequency_penalty to the output alone. The
    end-of-text token is banned for the first min_tokens output tokens. The output ends before any
    of the `stop` strings. `logit_bias` pairs are (token id, added value). With `prompt_logprobs`,
    max_tokens may be 0: the target then only reads the prompt.

    Raises InvalidRequest, which names the parameter, for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_tokens: int = 128
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # top tokens to report per token; None: no logprobs at all
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0, 100.0)
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        check_int("top_k", self.top_k, 0)
        check_range("top_p", self.top_p, 0.0, 1.0)
        check_range("min_p", self.min_p, 0.0, 1.0)
        check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_int("seed", self.seed, -(2**63), 2**63 - 1)
        check_int("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None else 0)
        check_int("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}: lower it",
                "min_tokens",
            )
        if len(self.stop) > limits.STOP_STRINGS:
            raise InvalidRequest(
                f"stop has {len(self.stop)} strings: at most {limits.STOP_STRINGS} are allowed",
                "stop",
            )
        for string in self.stop:
            if not isinstance(string, str):
                raise InvalidRequest(f"stop {string!r} is not allowed: give strings", "stop")
            if not 0 < len(string) <= limits.STOP_LENGTH:
                raise InvalidRequest(
                    f"stop string of {len(string)} characters: "
                    f"allowed are 1 to {limits.STOP_LENGTH}",
                    "stop",
                )
            if any("\ud800" <= character <= "\udfff" for character in string):
                raise InvalidRequest(
                    f"stop {string!a} has a lone surrogate: give valid Unicode", "stop"
                )
        if len(self.logit_bias) > limits.LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias)} entries: "
                f"at most {limits.LOGIT_BIAS} are allowed",
                "logit_bias",
            )
        for token, bias in self.logit_bias:
            check_int("logit_bias token", token, 0)
            check_range("logit_bias", bias, -100.0, 100.0)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                check_int(name, count, 0, limits.LOGPROBS)


def check_range(name: str, value: float, low: float, high: float, above: bool = False) -> None:
    """Raise InvalidRequest unless `value` is a number from `low` (exclusive if `above`) to
    `high`.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not low <= value <= high
        or (above and value == low)
    ):
        raise InvalidRequest(
            f"{name} {value} is not allowed: "
            f"give a number {'above' if above else 'from'} {low:g} to {high:g}",
            name,
        )


def check_int(name: str, value: int, low: int, high: int = 2**31 - 1) -> None:
    """Raise InvalidRequest unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(
            f"{name} {value} is not allowed: give a whole number from {low} to {high}", name
        )
