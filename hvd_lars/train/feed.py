"""The micro-batches of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hvd_lars.comm.base import Communicator
from hvd_lars.data.loader import stream
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.data.source import Batch, Request, Source


@dataclass(frozen=True)
class Feed:
    """Cuts global batches into one rank's micro-batches.

    Attributes:
        source: the images.
        batches: the samples of each step.
        comm: the ranks.
        device: of the batches.
        micro_batch: most samples in one.
        total_steps: of the whole run; no batches are made beyond.
        workers: processes that make batches; 0 for none.
    """

    source: Source
    batches: GlobalBatches
    comm: Communicator
    device: torch.device
    micro_batch: int
    total_steps: int
    workers: int = 0

    @property
    def sizes(self) -> set[int]:
        """Numbers of samples that this rank's micro-batches have."""
        return {len(request.indices) for request in self._requests(0)}

    def from_step(self, start: int) -> Iterator[tuple[Request, Batch]]:
        """Yield the micro-batches of step ``start`` and all later steps, in order.

        A step ends with its ``last`` request; a step without samples has one empty request.
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
