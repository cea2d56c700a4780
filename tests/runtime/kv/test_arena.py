"""Who sits where, and that moving in and out loses nothing."""

import gc

import torch

from runtime.kv.arena import Arena
from runtime.kv.store import TorchCache


def test_seats_go_to_the_first_free_then_from_the_least_recently_used() -> None:
    def text(mark: int) -> TorchCache:
        cache = TorchCache([((2, 8), (2, 8))] * 2, 100, torch.float32, torch.device("cpu"))
        cache.append(3)
        cache.positions[:] = mark
        cache.planes()[:, :, :3] = mark
        cache.start = 3
        return cache

    a, b, c, d = (text(mark) for mark in range(1, 5))
    arena = Arena(a, 3, 50)
    assert [arena.assign([cache]) for cache in (b, a, b)] == [[0], [1], [0]]
    assert arena.assign([c, a]) == [2, 1]
    assert arena.assign([d]) == [0]
    assert arena.assign([b, d]) == [2, 0]
    for mark, cache in enumerate((a, b, c, d), 1):
        assert cache.positions.tolist() == [mark] * 3
        assert torch.equal(cache.planes()[:, :, :3], torch.full((4, 2, 3, 8), float(mark)))
        assert (
            cache.planes().untyped_storage().data_ptr() == arena.memory.untyped_storage().data_ptr()
        ) == (cache is not c)
    del a, cache
    gc.collect()
    assert arena.assign([text(9)]) == [1]
