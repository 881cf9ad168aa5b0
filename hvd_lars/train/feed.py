"""The micro-batches that a rank trains on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hvd_lars.comm.base import Communicator
from hvd_lars.data import GlobalBatches, Request, Source, stream
from hvd_lars.data.source import Batch


@dataclass(frozen=True)
class Feed:
    """Cuts global batches into one rank's micro-batches.

    Attributes:
        source: the images.
        batches: which samples make up each step.
        comm: the ranks.
        device: where batches are wanted.
        micro_batch: most samples in one.
        total_steps: of the whole run; batches are made ahead for those.
        workers: processes that make them; 0 for none.
    """

    source: Source
    batches: GlobalBatches
    comm: Communicator
    device: torch.device
    micro_batch: int
    total_steps: int
    workers: int = 0

    def from_step(self, start: int) -> Iterator[tuple[Request, Batch]]:
        """The micro-batches of step ``start`` and all later ones, in order.

        A step ends with the request that is its ``last``; one without samples is empty.
        """
        requests = (
            request for step in range(start, self.total_steps) for request in self._requests(step)
        )
        return stream(self.source, requests, self.workers, self.device.type)

    def _requests(self, step: int) -> Iterator[Request]:
        rank, size = self.comm.rank, self.comm.size
        parts = self.batches.micro_batches(step, rank, size, self.micro_batch)
        parts = [part for part in parts if len(part)] or parts[:1]
        epoch = step // self.batches.steps_per_epoch
        for part in parts:
            yield Request(epoch, part, step, part is parts[-1])
