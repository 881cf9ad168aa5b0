"""What the trainer asks of a data set; imports nothing of hvd_lars."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Batch = tuple[Tensor, Tensor]
"""Images (n, channels, height, width) and labels (n,) int64."""


class Source(Protocol):
    """A data set.  What a sample looks like depends on (seed, epoch, index) alone.

    It is pickled to worker processes, which make the batches.
    """

    num_train: int
    num_eval: int
    num_classes: int

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """The training samples ``indices``, each below num_train, as drawn in ``epoch``."""
        ...

    def eval_batch(self, indices: Indices) -> Batch:
        """The evaluation samples ``indices``, each below num_eval, unaugmented."""
        ...

    def on_device(self, images: Tensor) -> Tensor:
        """What is left to do to a batch's images once they are on the model's device."""
        ...
