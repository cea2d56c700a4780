"""What a torch cache tells transformers and the budget of memory, and how its memory grows."""

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from runtime.core.errors import InvalidRequest
from runtime.kv.packed import PackedCache
from runtime.kv.store import INITIAL_SLOTS, TorchCache, layout_of

LAYOUT = [((2, 8), (2, 8)), ((1, 4), (2, 8))]


def cache(capacity: int = 1000, dtype: torch.dtype = torch.float32) -> TorchCache:
    return TorchCache(LAYOUT, capacity, dtype, torch.device("cpu"))


def test_a_cache_says_how_far_it_is_filled_before_this_pass() -> None:
    kv = cache()
    assert (kv.length, kv.start, kv.room, kv.positions.tolist()) == (0, 0, 0, [])
    assert kv.append(3) == 0
    assert kv.append(2) == 3
    assert (kv.length, kv.start) == (5, 3)
    for layer in kv.layers:
        assert layer.get_seq_length() == 3
        assert layer.get_mask_sizes(2) == (5, 0)
        assert layer.get_max_length() == 1000
        assert layer.is_initialized
        assert not layer.is_sliding
    kv.truncate(4)
    assert (kv.length, kv.start) == (4, 4)
    kv.append(1)
    kv.keep(1, [2])
    assert (kv.length, kv.start) == (2, 2)
    fork = kv.fork(1)
    assert (fork.length, fork.start) == (1, 1)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_token_takes_the_bytes_of_all_its_keys_and_values(dtype: torch.dtype, size: int) -> None:
    assert cache(dtype=dtype).slot_bytes == (3 * 2 * 8 + 1 * 1 * 4) * size


def test_memory_grows_by_a_quarter_and_never_beyond_the_capacity() -> None:
    kv = cache(capacity=200)
    rooms = [0]
    for _ in range(200):
        kv.append(1)
        if kv.room != rooms[-1]:
            rooms.append(kv.room)
    assert rooms == [0, INITIAL_SLOTS, 80, 100, 125, 156, 195, 200]
    with pytest.raises(
        InvalidRequest,
        match="201 tokens and guesses do not fit the cache of 200: shorten the prompt or the out",
    ):
        kv.append(1)
    wide = cache(capacity=1000)
    wide.append(300)
    assert wide.room == 300
    assert cache(capacity=10).append(10) == 0


def test_what_grows_in_inference_mode_can_be_written_outside_of_it() -> None:
    kv = cache()
    with torch.inference_mode():
        kv.append(2)
        kv.plane((2, 8), 0)[:] = 1.0
    kv.append(1)
    for planes in kv._planes.values():
        assert not planes.is_inference()
        assert not planes.requires_grad
        planes[:, :, :3] = 2.0
    assert np.array_equal(kv.positions, [0, 0, 0])


def test_a_rollback_outside_of_inference_mode_records_no_gradient() -> None:
    kv = cache()
    kv.append(3)
    keys = torch.ones(1, 2, 3, 8, requires_grad=True)
    with torch.no_grad():
        kv.layers[0].update(keys, keys)
        kv.layers[1].update(keys[:, :1, :, :4], keys)
    kv.keep(0, [2, 1])
    assert not any(planes.requires_grad for planes in kv._planes.values())
    assert not kv.fork(2).plane((2, 8), 0).requires_grad


@pytest.mark.parametrize(
    ("prefix", "slots", "said"),
    [
        (4, [], "prefix 4 and slots [] of a cache of 3 slots"),
        (1, [3], "prefix 1 and slots [3] of a cache of 3 slots"),
        (0, [1, 1], "slots [1, 1] name one twice"),
    ],
)
def test_what_cannot_be_kept_is_named(prefix: int, slots: list[int], said: str) -> None:
    kv = cache()
    kv.append(3)
    with pytest.raises(IndexError) as refused:
        kv.keep(prefix, slots)
    assert str(refused.value) == said
    for act in (kv.truncate, kv.fork):
        with pytest.raises(IndexError) as refused:
            act(4)
        assert str(refused.value) == "length 4 of a cache of 3 slots"


def filled(layer: DynamicLayer, *shape: int) -> DynamicLayer:
    layer.update(torch.zeros(1, shape[0], 5, shape[1]), torch.zeros(1, shape[2], 5, shape[3]))
    return layer


def test_a_layout_is_read_from_layers_of_single_tokens_alone() -> None:
    layers = [
        filled(DynamicLayer(), 2, 8, 3, 4),
        filled(DynamicSlidingWindowLayer(sliding_window=4), 1, 2, 1, 6),
    ]
    assert layout_of(layers) == [((2, 8), (3, 4)), ((1, 2), (1, 6))]
    for layer in (DynamicLayer(), object()):
        with pytest.raises(ValueError, match=f"cache layer of type {type(layer).__name__}"):
            layout_of([*layers, layer])


def test_a_packed_cache_reports_no_length_of_its_own() -> None:
    packed = PackedCache([cache()], 2)
    assert [layer.index for layer in packed.layers] == [0, 1]
    for layer in packed.layers:
        assert (layer.get_seq_length(), layer.get_mask_sizes(7)) == (0, (7, 0))
        assert layer.get_max_length() == -1
        assert layer.is_initialized
