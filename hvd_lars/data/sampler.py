"""The samples of each global batch, and each rank's share of them."""

from __future__ import annotations

import math

import numpy as np

from hvd_lars.data.source import Indices


class GlobalBatches:
    """The samples of every step, independent of the world size.

    Global batch k of an epoch is permutation(seed, epoch)[k·B : (k+1)·B]; the remainder of an
    epoch is dropped.  The step is the only state.

    Args:
        num_samples: samples in an epoch.
        global_batch: B.
        seed: of the permutations.
        pairs: keep positions 2k and 2k+1 of a global batch on one rank, in one micro-batch.

    Raises:
        ValueError: the batch is larger than an epoch.
    """

    def __init__(self, num_samples: int, global_batch: int, seed: int, pairs: bool = False) -> None:
        if not 1 <= global_batch <= num_samples:
            raise ValueError(
                f"a global batch of {global_batch} cannot be drawn from {num_samples} samples"
            )
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.steps_per_epoch = num_samples // global_batch
        self._seed, self._block = seed, 2 if pairs else 1
        self._epoch = -1
        self._permutation: Indices = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> Indices:
        """Return the (global_batch,) sample numbers of global step ``step``, counted from 0."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._permutation = generator.permutation(self.num_samples)
            self._epoch = epoch
        return self._permutation[k * self.global_batch : (k + 1) * self.global_batch]

    def micro_batches(self, step: int, rank: int, size: int, micro_batch: int) -> list[Indices]:
        """Split this rank's samples of a step, [rank::size], into the fewest even micro-batches.

        Their number, the accumulation, is the same on all ranks; if the batch does not divide,
        micro-batches differ by one sample (or pair) and a rank's last may be empty.
        """
        batch, block = self.indices(step), self._block
        mine = np.arange(0, self.global_batch, block)[rank::size]
        pieces = np.array_split(mine, accumulation(self.global_batch, size, micro_batch, block))
        if block == 1:
            return [batch[piece] for piece in pieces]
        both = [np.stack([piece, piece + 1], axis=1).ravel() for piece in pieces]
        return [batch[piece[piece < self.global_batch]] for piece in both]


def accumulation(global_batch: int, size: int, micro_batch: int, block: int = 1) -> int:
    """Return the micro-batches per step that keep each within ``micro_batch`` on every rank.

    Samples are dealt out in blocks of ``block``, which is at most micro_batch.

    >>> accumulation(global_batch=8192, size=2, micro_batch=128)
    32
    """
    fullest_rank = math.ceil(math.ceil(global_batch / block) / size)
    return math.ceil(fullest_rank / (micro_batch // block))


def smallest_micro_batch(global_batch: int, size: int, micro_batch: int, block: int = 1) -> int:
    """Return the size of the smallest non-empty micro-batch of any rank.

    >>> smallest_micro_batch(global_batch=9, size=2, micro_batch=4)
    2
    >>> smallest_micro_batch(global_batch=9, size=2, micro_batch=3)
    2
    >>> smallest_micro_batch(global_batch=5, size=2, micro_batch=2)
    1
    """
    blocks, pieces = -(-global_batch // block), accumulation(global_batch, size, micro_batch, block)
    emptiest, fullest = blocks // size, -(-blocks // size)
    least = min(max(n // pieces, 1) for n in (emptiest, fullest) if n)
    # The last block, which may be partial, ends the last micro-batch of a fullest rank.
    last = block * max(fullest // pieces, 1) - (block * blocks - global_batch)
    return min(block * least, last)
