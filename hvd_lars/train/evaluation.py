"""Exact evaluation over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hvd_lars.comm.base import Communicator
from hvd_lars.data import Request, Source, stream
from hvd_lars.errors import UserError
from hvd_lars.state.replicas import average_buffers


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats, fractions that are right, and over how many samples.

    ``num_samples`` are those that could be read.
    """

    loss: float
    top1: float
    top5: float
    num_samples: int

    def record(self, prefix: str = "") -> dict[str, float | int]:
        """The fields as metrics.jsonl has them; with a prefix, the measures alone."""
        if not prefix:
            return asdict(self)
        return {f"{prefix}{k}": v for k, v in asdict(self).items() if k != "num_samples"}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    comm: Communicator,
    batch: int,
    device: torch.device,
    workers: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on every sample exactly once: rank r takes samples r, r + size and so on.

    Nothing is padded, nothing takes the place of what cannot be read, and counts are summed over
    ranks, so the result does not depend on their number.  Top-5 is top-C where there are C < 5
    classes.  Collective; ``stopped`` is too, and is asked equally often on all ranks: before every
    batch, where it ends the evaluation with None, and after the last, where it does not.

    Raises:
        UserError: on every rank: no sample can be read.
    """
    average_buffers(model, comm)
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    mine = np.arange(comm.rank, source.num_eval, comm.size)
    requests = [Request(None, mine[i : i + batch]) for i in range(0, len(mine), batch)]
    batches = stream(source, requests, workers, device.type)
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
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        sums[0] += functional.cross_entropy(logits, labels, reduction="sum").double()
        sums[1] += best[:, 0].sum()
        sums[2] += best.sum()
        sums[3] += len(labels)
    stopped()
    model.train(was_training)
    comm.start_all_reduce_sum(sums, "evaluation").wait()
    loss, top1, top5, count = sums.tolist()
    if count == 0:
        raise UserError(f"none of the {source.num_eval:,} test images can be read")
    return Evaluation(loss / count, top1 / count, top5 / count, int(count))
