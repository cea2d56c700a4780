"""The target writes conversations by itself."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime.core.errors import ModelRefused
from tests.support.chatty import save_chatty
from tests.support.pair import save_model
from training import conversations
from training.conversations import (
    Conversation,
    Opening,
    begin_all,
    loops,
    openings,
    own_conversations,
    packed,
    usable,
)
from training.row_sampler import pick, write_texts
from training.teacher import Teacher, load_teacher

OPENING = Opening((7, 8), (0, 5, 6), frozenset({0}))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_teacher(str(save_chatty(tmp_path_factory.mktemp("chatty") / "target")), "cpu")


class Greedy:
    """A text with a given beginning and a number of tokens to write."""

    def __init__(self, given: list[int], count: int) -> None:
        self.tokens, self.temperature, self.left = list(given), 0.0, count

    def add(self, token: int) -> bool:
        self.tokens.append(token)
        self.left -= 1
        return self.left > 0


def test_rows_of_different_texts_read_what_each_alone_would(tmp_path: Path) -> None:
    teacher = load_teacher(str(save_model(tmp_path / "varied", context=256)), "cpu")
    given = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [17, 18], [19]]
    counts = [4, 9, 5, 30, 70]
    texts: Iterator[Greedy] = iter([Greedy(*one) for one in zip(given, counts, strict=True)])
    endless = (Greedy([3], 100) for _ in iter(int, 1))

    def both() -> Iterator[Greedy]:
        yield from texts
        yield from endless

    before = teacher.module.config._attn_implementation
    done = write_texts(teacher.module, both(), 2, 140, 0)
    assert teacher.module.config._attn_implementation == before
    finished = {tuple(one.tokens[:1]): one.tokens for one in done if one.left == 0}
    for start, count in zip(given, counts, strict=True):
        tokens = list(start)
        for _ in range(count):
            with torch.no_grad():
                tokens.append(int(teacher.module(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert finished[tuple(start[:1])] == tokens


@pytest.mark.parametrize("count", [1, 64, 65, 1000])
def test_a_draw_is_that_of_the_whole_running_sum(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    shares = torch.rand(50, count, generator=generator, dtype=torch.float64)
    shares[:, ::3] = 0 if count > 1 else 1
    drawn = torch.rand(50, generator=generator, dtype=torch.float64)
    sums = shares.cumsum(-1)
    whole = torch.searchsorted(sums, drawn[:, None] * sums[:, -1:], right=True)[:, 0]
    assert pick(shares, drawn).equal(whole)


def test_a_prompt_that_ends_is_followed_by_the_answers_opening() -> None:
    one = Conversation(OPENING, 0.5)
    assert one.temperature == 1.0
    assert all(one.add(token) for token in (3, 4, 0))
    assert (one.tokens, one.start, one.temperature) == ([7, 8, 3, 4, 0, 5, 6], 7, 0.5)
    assert one.add(9)
    assert not one.add(0)
    assert one.answer == [9, 0]


def test_a_prompt_without_end_is_cut_and_answered() -> None:
    endless = Conversation(OPENING, 0.5)
    assert all(endless.add(3) for _ in range(conversations.MAX_PROMPT_TOKENS))
    written = [3] * conversations.MAX_PROMPT_TOKENS
    assert endless.tokens == [*OPENING.before, *written, *OPENING.bridge]
    assert (endless.start, endless.temperature) == (len(endless.tokens), 0.5)


def test_an_answer_ends_where_it_loops_and_is_kept_without_the_loop() -> None:
    looping, useless = Conversation(OPENING, 0.0), Conversation(OPENING, 0.0)
    for one, varied in ((looping, 40), (useless, 2)):
        one.add(0)
        answer = [*range(20, 20 + varied), *(3 + number % 5 for number in range(200))]
        assert not all(one.add(token) for token in answer)
    assert usable([looping, useless]) == [looping]
    assert looping.answer == [*range(20, 60)][: len(looping.answer)]
    assert len(looping.answer) >= conversations.MIN_ANSWER


def test_loops_are_told_from_varied_texts() -> None:
    assert loops([1, 2, 3, 4, 5] * 20)
    assert not loops(list(range(100)))
    assert not loops([1, 2] * 10)  # too short to tell
    assert not loops([1, 2, 3, 4, 5] * 20 + list(range(10, 74)))


def test_each_prompt_is_taken_once() -> None:
    def made(answer: int) -> Conversation:
        one = Conversation(OPENING, 1.0)
        for token in (3, 0, *range(answer, answer + 20)):
            one.add(token)
        return one

    first, second = made(10), made(40)
    assert usable([first, second]) == [first]


def test_openings_come_from_the_chat_template(teacher: Teacher) -> None:
    found = openings(teacher.tokenizer)
    texts = [teacher.tokenizer.decode(one.before) for one in found]
    assert texts[0] == "<user>\n"
    assert "<user>\nExplain" in texts
    assert {teacher.tokenizer.decode(one.bridge) for one in found} == {
        "<|endoftext|>\n<assistant>\n"
    }
    assert found[0].ends == {0}
    first, second = (
        [one.opening for _, one in zip(range(9), begin_all(found, 3), strict=False)]
        for _ in range(2)
    )
    assert first == second


def test_a_template_that_hides_the_users_text_is_refused(teacher: Teacher) -> None:
    hiding = copy.deepcopy(teacher.tokenizer)
    hiding.chat_template = "nothing of it"
    with pytest.raises(ModelRefused, match="changes the user's text"):
        openings(hiding)


def test_conversations_are_written_once(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "ROWS", 32)
    told: list[int] = []
    made = own_conversations(teacher, tmp_path / "own", 500, 96, 4, told.append)
    assert sum(len(one.tokens) for one in made) >= 500
    assert len(told) == len(list((tmp_path / "own").iterdir()))
    for one in made:
        text = teacher.tokenizer.decode(one.prompt)
        assert text.startswith("<user>\n")
        assert text.endswith("<|endoftext|>\n<assistant>\n")
        assert conversations.MIN_ANSWER <= len(one.tokens) - one.start < 96
    monkeypatch.setattr(conversations, "write_texts", None)  # not needed again
    assert own_conversations(teacher, tmp_path / "own", 500, 96, 4, told.append) == made
    rows = packed(made, 50)
    assert rows.shape[1] == 50
    assert rows.flatten()[: len(made[0].tokens)].tolist() == list(made[0].tokens)


def test_a_target_without_answers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "ROWS", 8)
    endless = load_teacher(str(save_chatty(tmp_path / "endless", often=-9.0)), "cpu")
    with pytest.raises(ModelRefused, match="no usable conversations"):
        own_conversations(endless, tmp_path / "own", 100, 48, 0, lambda size: None)
