"""Exact evaluation over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import nn

from hvd_lars.comm.base import Communicator
from hvd_lars.data.loader import stream
from hvd_lars.data.source import Request, Source
from hvd_lars.errors import UserError
from hvd_lars.metrics.evaluation import METRICS
from hvd_lars.state.replicas import average_buffers


@dataclass(frozen=True)
class Evaluation:
    """Means by metric over the ``num_samples`` readable samples."""

    means: Mapping[str, float]
    num_samples: int

    @property
    def top1(self) -> float:
        """Fraction of samples whose largest logit is the correct class's."""
        return self.means["top1"]

    def record(self, prefix: str = "") -> dict[str, float | int]:
        """Return the means as in metrics.jsonl; without a prefix, the number of samples, too."""
        fields: dict[str, float | int] = {f"{prefix}{k}": v for k, v in self.means.items()}
        return fields if prefix else fields | {"num_samples": self.num_samples}


@final
class Evaluator:
    """Evaluates every sample exactly once: rank r takes samples r, r + world size and so on.

    Nothing is padded, no image replaces an unreadable one, and sums are taken over ranks, so the
    result does not depend on the world size.

    Args:
        source: the images.
        comm: the ranks.
        batch: most samples in one forward pass.
        device: of the model.
        workers: processes that make batches; 0 for none.
    """

    def __init__(
        self,
        source: Source,
        comm: Communicator,
        batch: int,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self._source, self._comm, self._batch = source, comm, batch
        self._device, self._workers = device, workers

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, stopped: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Evaluate a model; its running statistics become their means over ranks; collective.

        Args:
            model: returns logits (n, classes) for images.
            stopped: whether to stop and return None; collective.  Called equally often on all
                ranks: before every batch, and once after the last, where it has no effect.

        Raises:
            UserError: on every rank, if no sample can be read.
        """
        source, comm, batch = self._source, self._comm, self._batch
        average_buffers(model, comm)
        was_training = model.training
        model.eval()
        sums = {name: torch.zeros((), dtype=torch.float64, device=self._device) for name in METRICS}
        count = torch.zeros((), dtype=torch.float64, device=self._device)
        mine = np.arange(comm.rank, source.num_eval, comm.size)
        requests = [Request(None, mine[i : i + batch]) for i in range(0, len(mine), batch)]
        batches = stream(source, requests, self._workers, self._device.type)
        for _ in range(math.ceil(source.num_eval / (comm.size * batch))):  # the most of any rank
            if stopped():
                model.train(was_training)
                return None
            made = next(batches, None)
            if made is None:
                continue
            request, (images, labels) = made
            if len(labels) == 0:
                continue
            images, labels = source.on_device(images, labels, request)
            logits = model(images).float()
            for name, metric in METRICS.items():
                sums[name] += metric.sum(logits, labels)
            count += len(labels)
        stopped()
        model.train(was_training)
        together = torch.stack([*sums.values(), count])
        comm.start_all_reduce_sum(together, "evaluation").wait()
        *totals, samples = together.tolist()
        if samples == 0:
            raise UserError(
                f"data: none of the {source.num_eval:,} test images can be read; warnings name them"
            )
        means = {name: total / samples for name, total in zip(METRICS, totals, strict=True)}
        return Evaluation(means, int(samples))
