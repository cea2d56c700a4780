"""Keeps a conversation within the context of its model."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from actors.openai.chat_template import Message, render
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Tokens

MAX_SHARE = 2  # an answer gets at most the context divided by this, unless more is asked for


@dataclass(slots=True)
class Conversation:
    """Messages between a user and a model.

    context     the model's maximum length, in tokens
    max_tokens  of an answer; the prompt leaves room for them
    messages    from the oldest to the newest; the first may be the system's
    """

    tokenizer: PreTrainedTokenizerFast
    context: int
    max_tokens: int
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> tuple[Tokens, int]:
        """Add a question. Returns the prompt, and how many of the oldest questions were dropped.

        Raises InvalidRequest for a question that is too long alone, which is not added.
        """
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        turns = [*self.messages[len(system) :], {"role": "user", "content": text}]
        room, dropped = self.context - self.max_tokens, 0
        while len(prompt := self.tokens([*system, *turns])) > room:
            if len(turns) == 1:
                raise InvalidRequest(
                    f"the question has {len(prompt)} tokens, the context of {self.context} leaves "
                    f"{room} beside an answer of {self.max_tokens}: shorten it, or lower "
                    "--max-tokens",
                    "prompt",
                )
            del turns[:2]
            dropped += 1
        self.messages = [*system, *turns]
        return prompt, dropped

    def tokens(self, messages: list[Message]) -> Tokens:
        text = render(self.tokenizer, messages)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def answered(self, text: str) -> None:
        """Add the answer to the last question."""
        self.messages.append({"role": "assistant", "content": text})


def answer_room(asked: int | None, default: int, context: int) -> int:
    """Returns the tokens of an answer. Raises InvalidRequest if the context is too short."""
    if asked is None:
        return min(default, context // MAX_SHARE)
    if not 1 <= asked < context:
        raise InvalidRequest(
            f"max_tokens {asked}: give 1 to {context - 1}, the model's context is {context}",
            "max_tokens",
        )
    return asked
