"""Integer layout of parameters in flat buckets and of buckets over ranks."""

from __future__ import annotations

from collections.abc import Sequence


def fill_buckets(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Group the positions 0 … len(sizes)-1, in order, into buckets of at most ``capacity``.

    A tensor larger than the capacity gets its own bucket.  Any unit will do (bytes).

    >>> fill_buckets([4, 4, 4, 20, 1], capacity=8)
    [[0, 1], [2], [3], [4]]
    """
    buckets: list[list[int]] = []
    room = 0
    for position, size in enumerate(sizes):
        if not buckets or size > room:
            buckets.append([])
            room = capacity
        buckets[-1].append(position)
        room -= size
    return buckets


def part_of(numel: int, rank: int, size: int) -> tuple[int, int]:
    """Return begin and end of rank ``rank``'s part of ``numel`` elements.

    Parts differ in size by at most one.

    >>> [part_of(10, rank, 3) for rank in range(3)]
    [(0, 3), (3, 6), (6, 10)]
    """
    return numel * rank // size, numel * (rank + 1) // size


def overlap(start: int, numel: int, begin: int, end: int) -> tuple[int, int]:
    """Return the part of a tensor at [start, start + numel) in [begin, end), from its start.

    >>> overlap(start=4, numel=10, begin=6, end=9)
    (2, 5)
    >>> overlap(start=4, numel=10, begin=20, end=30)
    (10, 10)
    """
    return min(max(begin - start, 0), numel), min(max(end - start, 0), numel)
