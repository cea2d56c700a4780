"""Which of a machine's cores are whose."""


def split_cores(cores: list[int], pools: int) -> list[tuple[int, ...]]:
    """Cores of the target, then of each pool: the target has half of them, the pools share the rest in turn.

    With a single core all use it; without pools the target has one half too, so that a comparison is fair.
    """
    half = max(1, len(cores) // 2)
    mine, rest = tuple(cores[:half]), tuple(cores[half:] or cores)
    return [mine, *(share_of(rest, index, pools) for index in range(pools))]


def share_of(cores: tuple[int, ...], index: int, of: int) -> tuple[int, ...]:
    """The part of number `index` where `of` divide the cores in turn; several are on one core where there are too few."""
    return cores[index::of] or cores[index % len(cores) :][:1] if cores else ()
