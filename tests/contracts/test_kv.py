"""The cache reads as a fresh prefill would, whatever was appended, kept and forgotten before."""

import gc
from functools import cache
from weakref import ref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from runtime.core.errors import InvalidRequest
from runtime.kv.packed import PackedCache
from runtime.kv.store import INITIAL_SLOTS, TorchCache
from runtime.models.base import Rows
from runtime.models.prefill import prefill
from tests.support.families import hf_model

TOKENS = 4  # few, so that paths come again and their plain passes are known
TOLERANCE = 1e-4  # on logits whose standard deviation is 1.5
LAYOUT = [((2, 8), (2, 8)), ((1, 4), (2, 8))]


def small(capacity: int = 1000) -> TorchCache:
    return TorchCache(LAYOUT, capacity, torch.float32, torch.device("cpu"))


def fill(kv: TorchCache, marks: list[int]) -> None:
    """Append one slot for each mark and write the mark into every layer and the position."""
    start = kv.append(len(marks))
    kv.positions[start:] = marks
    for index, (keys, values) in enumerate(LAYOUT):
        states = [
            torch.tensor(marks).view(1, 1, -1, 1).expand(1, heads, -1, dim).float()
            for heads, dim in (keys, values)
        ]
        kv.update(states[0] + index, states[1] - index, index)


def marks(kv: TorchCache) -> list[int]:
    """What the slots hold, after a check that all layers agree."""
    found: list[int] = kv.positions.tolist()
    for (keys, values), layer, index in zip(LAYOUT, kv.layers, range(2), strict=True):
        for shape, place, offset in (
            (keys, layer.places[0], index),
            (values, layer.places[1], -index),
        ):
            plane = kv.plane(*place)
            assert plane.shape == (1, shape[0], kv.length, shape[1])
            assert torch.equal(
                plane, torch.tensor(found).view(1, 1, -1, 1).expand_as(plane) + float(offset)
            )
    return found


def test_keep_moves_the_chosen_slots_behind_the_prefix_in_their_order() -> None:
    kv = small()
    fill(kv, [10, 11, 12, 13, 14, 15])
    kv.keep(2, [5, 2, 4])
    assert marks(kv) == [10, 11, 15, 12, 14]
    kv.keep(3, [3])
    assert marks(kv) == [10, 11, 15, 12]
    fill(kv, [20, 21])
    assert marks(kv) == [10, 11, 15, 12, 20, 21]


def test_rollbacks_add_up() -> None:
    kv = small()
    fill(kv, list(range(8)))
    kv.truncate(6)
    kv.truncate(6)
    kv.truncate(3)
    assert marks(kv) == [0, 1, 2]
    fill(kv, [30])
    kv.truncate(0)
    assert (marks(kv), kv.length, kv.get_seq_length()) == ([], 0, 0)


def test_the_memory_of_a_text_is_free_as_soon_as_nobody_holds_it() -> None:
    kv = small()
    fill(kv, [1, 2, 3])
    held, fork = ref(kv), kv.fork(2)
    gc.disable()
    try:
        del kv
        assert held() is None
        assert marks(fork) == [1, 2]
    finally:
        gc.enable()


def test_growth_keeps_what_is_there_and_takes_memory_as_it_goes() -> None:
    kv = small(capacity=5 * INITIAL_SLOTS)
    assert storage(kv) == 0
    written: list[int] = []
    for length in (3, INITIAL_SLOTS - 3, 1, INITIAL_SLOTS, 3 * INITIAL_SLOTS - 1):
        written += range(len(written), len(written) + length)
        fill(kv, written[-length:])
        assert marks(kv) == written
        assert len(written) <= storage(kv) <= max(INITIAL_SLOTS, 2 * len(written))
    assert storage(kv) == 5 * INITIAL_SLOTS


def storage(kv: TorchCache) -> int:
    """Slots that memory is taken for."""
    (slots,) = {planes.shape[2] for planes in kv._planes.values()}
    return slots


def test_beyond_the_capacity() -> None:
    kv = small(capacity=4)
    fill(kv, [1, 2, 3])
    with pytest.raises(InvalidRequest, match="5 tokens and guesses do not fit the cache of 4"):
        kv.append(2)
    assert marks(kv) == [1, 2, 3]


@pytest.mark.parametrize(
    ("prefix", "slots"), [(4, []), (-1, []), (1, [3]), (1, [0]), (1, [-1]), (0, [1, 1])]
)
def test_keep_refuses_what_is_not_in_use(prefix: int, slots: list[int]) -> None:
    kv = small()
    fill(kv, [1, 2, 3])
    with pytest.raises(IndexError):
        kv.keep(prefix, slots)
    assert marks(kv) == [1, 2, 3]


@pytest.mark.parametrize("length", [4, -1])
def test_truncate_refuses_what_is_not_in_use(length: int) -> None:
    kv = small()
    fill(kv, [1, 2, 3])
    with pytest.raises(IndexError):
        kv.truncate(length)


@pytest.mark.parametrize("length", [0, 1, 3, 4])
def test_a_fork_goes_its_own_way(length: int) -> None:
    kv = small()
    fill(kv, [10, 11, 12, 13])
    other = kv.fork(length)
    assert (other.length, other.capacity) == (length, kv.capacity)
    fill(other, [20, 21])
    kv.keep(1, [3])
    fill(kv, [30])
    assert marks(other) == [*range(10, 10 + length), 20, 21]
    assert marks(kv) == [10, 13, 30]


def test_a_fork_takes_memory_for_what_it_holds() -> None:
    kv = small(capacity=8 * INITIAL_SLOTS)
    fill(kv, list(range(3 * INITIAL_SLOTS)))
    assert storage(kv.fork(5)) == INITIAL_SLOTS


@pytest.mark.parametrize("length", [4, -1])
def test_fork_refuses_what_is_not_in_use(length: int) -> None:
    kv = small()
    fill(kv, [1, 2, 3])
    with pytest.raises(IndexError):
        kv.fork(length)


def test_planes_alternate_where_all_layers_have_one_shape() -> None:
    kv = TorchCache([((2, 8), (2, 8))] * 3, 100, torch.float32, torch.device("cpu"))
    kv.append(4)
    for index in range(3):
        kv.update(
            torch.full((1, 2, 4, 8), 1.0 + index), torch.full((1, 2, 4, 8), -1.0 - index), index
        )
    assert kv.planes()[:, :, :4].mean(dim=(1, 2, 3)).tolist() == [1.0, -1.0, 2.0, -2.0, 3.0, -3.0]
    kv.planes()[0, :, :4] = 9.0
    assert torch.equal(kv.plane(*kv.layers[0].places[0]), torch.full((1, 2, 4, 8), 9.0))


def test_rows_of_several_texts_go_to_their_own_caches() -> None:
    caches = [small(), small()]
    fill(caches[0], [5])
    for kv, rows in zip(caches, (2, 1), strict=True):
        start = kv.append(rows)
        kv.positions[start:] = [6, 7][:rows]
    packed = PackedCache(caches, 2)
    for index, (keys, values) in enumerate(LAYOUT):
        states = [
            torch.tensor([6.0, 7.0, 6.0]).view(1, 1, 3, 1).expand(1, heads, 3, dim)
            for heads, dim in (keys, values)
        ]
        packed.update(states[0] + index, states[1] - index, index)
        read = packed.take_written()
        assert [[tuple(state.shape) for state in pair] for pair in read] == [
            [(1, heads, slots, dim) for heads, dim in (keys, values)] for slots in (3, 1)
        ]
        with pytest.raises(LookupError):
            packed.take_written()
    assert [marks(kv) for kv in caches] == [[5, 6, 7], [6]]


@cache
def plain(family: str, path: tuple[int, ...]) -> torch.Tensor:
    """Logits behind a text, by transformers alone."""
    with torch.inference_mode():
        logits: torch.Tensor = (
            hf_model(family).module(input_ids=torch.tensor([path]), use_cache=False).logits[0, -1]
        )
        return logits


class CacheMachine(RuleBasedStateMachine):
    """Uses a cache as a target or drafter does, in any order.

    The oracle is a list of each slot's parent and text.
    """

    family = "llama"

    @initialize(tokens=st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=9))
    def start(self, tokens: list[int]) -> None:
        self.model = hf_model(self.family)
        self.kv = self.model.new_cache()
        self.prefix = 0
        self.parents: list[int] = []  # -1 for the first token
        self.texts: list[tuple[int, ...]] = []
        self.forward(list(zip(range(-1, len(tokens) - 1), tokens, strict=True)))
        self.prefix = len(tokens)

    def forward(self, nodes: list[tuple[int, int]]) -> None:
        """One pass over (parent slot, token); every row's logits must be those of its text."""
        first = len(self.texts)
        for parent, token in nodes:
            self.parents.append(parent)
            self.texts.append((*(self.texts[parent] if parent >= 0 else ()), token))
        visible = np.zeros((len(nodes), len(self.texts)), dtype=np.bool_)
        for row in range(len(nodes)):
            visible[row, self.path(first + row)] = True
        positions = np.array([len(text) - 1 for text in self.texts[first:]])
        tokens = np.array([token for _, token in nodes])
        logits = self.model.forward(
            self.kv, Rows(tokens, positions, self.prefix, visible[:, self.prefix :])
        )
        expected = torch.stack([plain(self.family, text) for text in self.texts[first:]])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)

    def path(self, slot: int) -> list[int]:
        """Slots of a text, from its first token to `slot`."""
        found = []
        while slot >= 0:
            found.append(slot)
            slot = self.parents[slot]
        return found[::-1]

    @precondition(lambda self: self.prefix > 0 and len(self.texts) < 40)
    @rule(data=st.data(), rows=st.integers(1, 6))
    def grow(self, data: st.DataObject, rows: int) -> None:
        nodes = []
        for row in range(rows):
            parent = data.draw(st.integers(self.prefix - 1, len(self.texts) + row - 1))
            nodes.append((parent, data.draw(st.integers(0, TOKENS - 1))))
        self.forward(nodes)

    @precondition(lambda self: len(self.texts) > self.prefix)
    @rule(data=st.data(), subtree=st.booleans())
    def commit(self, data: st.DataObject, subtree: bool) -> None:
        """Moves the root to a slot of the tree; a drafter keeps the subtree, a target does not."""
        root = data.draw(st.integers(self.prefix, len(self.texts) - 1))
        chosen = [slot for slot in self.path(root) if slot >= self.prefix]
        accepted = len(chosen)
        if subtree:
            chosen += [slot for slot in range(root + 1, len(self.texts)) if root in self.path(slot)]
        self.kv.keep(self.prefix, chosen)
        moved = {slot: slot for slot in range(-1, self.prefix)} | {
            slot: self.prefix + place for place, slot in enumerate(chosen)
        }
        kept = [*range(self.prefix), *chosen]
        self.parents = [moved[self.parents[slot]] for slot in kept]
        self.texts = [self.texts[slot] for slot in kept]
        self.prefix += accepted

    @rule()
    def miss(self) -> None:
        self.kv.keep(self.prefix, [])
        self.parents, self.texts = self.parents[: self.prefix], self.texts[: self.prefix]

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(1, len(self.texts)))
        self.kv.truncate(length)
        self.parents, self.texts, self.prefix = (
            self.parents[:length],
            self.texts[:length],
            min(self.prefix, length),
        )

    @precondition(lambda self: bool(self.texts))
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Keys and values of a path are those of a fresh prefill."""
        slot = data.draw(st.integers(0, len(self.texts) - 1))
        fresh = self.model.new_cache()
        prefill(self.model, fresh, np.array(self.texts[slot]))
        for layer in self.kv.layers:
            for place in layer.places:
                torch.testing.assert_close(
                    self.kv.plane(*place)[:, :, self.path(slot)],
                    fresh.plane(*place),
                    atol=TOLERANCE,
                    rtol=0,
                )

    @invariant()
    def slots_are_counted(self) -> None:
        assert self.kv.length == len(self.texts)
        assert self.kv.positions.tolist() == [len(text) - 1 for text in self.texts]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_any_history_reads_as_a_fresh_prefill(family: str) -> None:
    machine = type("Machine", (CacheMachine,), {"family": family})
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=25, stateful_step_count=15, suppress_health_check=checks),
    )
