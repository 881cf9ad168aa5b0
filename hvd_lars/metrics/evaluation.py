"""Metrics of an evaluation, by their names in the records.

To add one, write it here and name it in ``METRICS``: it is then recorded, logged and printed.  Each
is a sum over samples, divided by their number after it is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

Sum = Callable[[Tensor, Tensor], Tensor]
"""From logits (n, classes) float32 and labels (n,) int64 to a sum over the samples, 0-dim."""


@dataclass(frozen=True)
class EvalMetric:
    """A mean over samples.

    Attributes:
        label: its name on the console.
        sum: sum over the samples of a batch.
    """

    label: str
    sum: Sum


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies, in nats."""
    return functional.cross_entropy(logits, labels, reduction="sum").double()


def correct_in_top(k: int) -> Sum:
    """Return a metric: samples whose label is among the ``k`` largest logits, or all if fewer."""

    def count(logits: Tensor, labels: Tensor) -> Tensor:
        best = logits.topk(min(k, logits.shape[1]), dim=1).indices
        return (best == labels[:, None]).sum()

    return count


METRICS = {
    "loss": EvalMetric("test loss", cross_entropy),
    "top1": EvalMetric("top-1", correct_in_top(1)),
    "top5": EvalMetric("top-5", correct_in_top(5)),
}
