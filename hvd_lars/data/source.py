"""What the trainer asks of a data set."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from hvd_lars.data.identity import DataIdentity

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Batch = tuple[Tensor, Tensor]
"""Images (n, channels, height, width), and labels (n,) int64 or class shares (n, classes)."""


class Request(NamedTuple):
    """Samples to make a batch of.

    Attributes:
        epoch: of training; None for the evaluation set.
        indices: the samples; none where a rank has no sample in a step.
        step: the optimizer step that they are for.
        last: they are the rank's last of that step.
    """

    epoch: int | None
    indices: Indices
    step: int = 0
    last: bool = True


class Unreadable(NamedTuple):
    """An image that cannot be read: why, and whether it is of the evaluation set."""

    line: str
    evaluation: bool


class Source(Protocol):
    """A data set.  What a sample looks like depends on (seed, epoch, index) alone.

    It is pickled to worker processes, which make the batches.  Where ``mixes_pairs``, the samples
    at 2k and 2k+1 of a global batch are mixed with each other, so whoever cuts a batch into
    pieces keeps them together.
    """

    num_train: int
    num_eval: int
    num_classes: int
    mixes_pairs: bool
    identity: DataIdentity
    unreadable: list[Unreadable]
    """Images that could not be read since somebody last took them from this list."""

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """The training samples ``indices``, each below num_train, as drawn in ``epoch``.

        Another sample takes the place of one that cannot be read.
        """
        ...

    def eval_batch(self, indices: Indices) -> Batch:
        """The evaluation samples ``indices``, each below num_eval, unaugmented.

        Those that cannot be read are left out: what was not read is not measured.
        """
        ...

    def on_device(self, images: Tensor, labels: Tensor, request: Request) -> Batch:
        """What is left to do to a batch, made for ``request``, on the model's device."""
        ...
