"""Divides the cores of one machine between a target and its drafters."""


def split_cores(cores: list[int], pools: int) -> list[tuple[int, ...]]:
    """Return the cores of the target, then those of each pool.

    The target gets one half, and the pools share the other in rotation. On a single core everybody
    uses it. Without pools the target still gets only one half, so that comparisons are fair.
    """
    half = max(1, len(cores) // 2)
    mine, rest = tuple(cores[:half]), tuple(cores[half:] or cores)
    return [mine, *(share_of(rest, index, pools) for index in range(pools))]


def share_of(cores: tuple[int, ...], index: int, of: int) -> tuple[int, ...]:
    """Return share `index` when `of` members divide the cores in rotation.

    If there are fewer cores than members, several members share a core.
    """
    return cores[index::of] or cores[index % len(cores) :][:1] if cores else ()
