"""The interface of a data set to the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import numpy as np

from hvd_lars.data.identity import DataIdentity

if TYPE_CHECKING:
    from torch import Tensor

    from hvd_lars.data.encoded import Encoded

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Batch: TypeAlias = "tuple[Tensor, Tensor]"
"""Images (n, channels, height, width), and labels (n,) int64 or class shares (n, classes)."""
Made: TypeAlias = "tuple[Tensor | Encoded, Tensor]"
"""A batch, or one whose images the device decodes."""


class Request(NamedTuple):
    """Samples to batch.

    Attributes:
        epoch: of training; None for the evaluation set.
        indices: the samples; empty if the rank has none in a step.
        step: the optimizer step they are for.
        last: whether they are the rank's last of that step.
    """

    epoch: int | None
    indices: Indices
    step: int = 0
    last: bool = True


class Unreadable(NamedTuple):
    """An unreadable image: the reason, and whether it is in the evaluation set."""

    line: str
    evaluation: bool


class Source(Protocol):
    """A data set in which a sample depends only on (seed, epoch, index).

    It is pickled to worker processes, which make the batches.  If ``mixes_pairs``, samples 2k and
    2k+1 of a global batch are mixed with each other and must be in the same micro-batch.
    """

    num_train: int
    num_eval: int
    num_classes: int
    mixes_pairs: bool
    identity: DataIdentity
    unreadable: list[Unreadable]
    """Images found unreadable since the caller last cleared this list."""

    def train_batch(self, epoch: int, indices: Indices) -> Made:
        """Return the training samples ``indices``, each below num_train, as drawn in ``epoch``.

        Another sample replaces one that cannot be read.
        """
        ...

    def eval_batch(self, indices: Indices) -> Batch:
        """Return the evaluation samples ``indices``, each below num_eval, unaugmented.

        Unreadable samples are omitted and not evaluated.
        """
        ...

    def on_device(self, images: Tensor, labels: Tensor, request: Request) -> Batch:
        """Finish a batch, made for ``request``, on the model's device."""
        ...
