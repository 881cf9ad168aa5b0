"""How long an epoch takes on how many ranks, and what binds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hvd_lars.planning.cost import Compute, step_seconds
from hvd_lars.planning.site import Site

# Median error of the model of a step over published systems (benchmarks/plan_check.py).
_ERROR = 0.05
# E(B) = E_min (1 + B / B_crit) over MLPerf's reference points of ResNet-50, batches of 1,632 to
# 67,840 (mlcommons/logging, rcp_checker, training_1.0.0 to 4.0.0): worst residual 6 %.
IMAGENET_CRITICAL_BATCH = 46_500
IMAGENET_IMAGES = 1_281_167


class Range(NamedTuple):
    """A quantity that is known between two bounds."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """Their mean."""
        return (self.low + self.high) / 2.0

    def times(self, factor: float) -> Range:
        """Return both bounds times ``factor``."""
        return Range(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Work:
    """A run, without its ranks: samples of a step, steps of an epoch and of the run."""

    global_batch: int
    micro_batch: int
    steps_per_epoch: int
    total_steps: int
    bucket_bytes: float


@dataclass(frozen=True)
class Forecast:
    """A run on some ranks; every time is in seconds.

    Attributes:
        ranks: how many.
        images: of the fullest rank in a step.
        step: a step.
        epoch: an epoch.
        run: the whole run without evaluations and checkpoints.
        parts: what a step would take for each cause alone, the largest first.
        rate_needed: images a second that a rank's input must prepare.
    """

    ranks: int
    images: int
    step: Range
    epoch: Range
    run: Range
    parts: dict[str, float]
    rate_needed: float

    @property
    def binds(self) -> str:
        """The largest part."""
        return next(iter(self.parts))


def forecast(site: Site, work: Work, ranks: int) -> Forecast:
    """Predict a run on ``ranks`` ranks of the site.

    The lower bound hides all-reduces behind backward, but for the last bucket's; the upper one
    hides nothing.
    """
    images = -(-work.global_batch // ranks)
    passes = -(-images // work.micro_batch)
    costs = site.costs
    fixed, compute = passes * costs.fixed, images * costs.per_image
    size = 4.0 * site.parameters
    count = max(1, -(-int(size) // int(work.bucket_bytes)))
    latency, transfer = site.all_reduce_seconds(size / count, ranks)
    last, total = latency + transfer, count * (latency + transfer)
    whole = Compute(fixed, costs.per_image)
    slow = step_seconds(whole, images, total)
    fast = min(slow, step_seconds(whole, images, total, overlap=1.0) + last)
    step = Range(fast * (1.0 - _ERROR), slow * (1.0 + _ERROR))
    parts = {
        "compute": compute,
        "fixed cost of a step": fixed,
        "all-reduce latency": count * latency,
        "all-reduce bandwidth": count * transfer,
    }
    if site.input_rate:
        reading = images / site.input_rate
        parts["input"] = reading if reading > step.middle else 0.0
        step = Range(max(step.low, reading), max(step.high, reading))
    return Forecast(
        ranks=ranks,
        images=images,
        step=step,
        epoch=step.times(work.steps_per_epoch),
        run=step.times(work.total_steps),
        parts=dict(sorted(parts.items(), key=lambda part: -part[1])),
        rate_needed=images / step.middle if not parts.get("input") else images / slow,
    )


def worth_it_up_to(site: Site, work: Work, least: float = 0.10) -> int:
    """Return the ranks, a power of two, beyond which doubling saves less than ``least``."""
    ranks = 1
    while 2 * ranks <= work.global_batch:
        here, there = (forecast(site, work, n).step.middle for n in (ranks, 2 * ranks))
        if there > (1.0 - least) * here:
            break
        ranks *= 2
    return ranks


def worth_of_a_sample(global_batch: int, critical_batch: float) -> float:
    """Return what a sample brings, as a share of one in a small batch.

    Source:
        McCandlish et al. 2018, arXiv 1812.06162, eq. 2.11.
    """
    return 1.0 / (1.0 + global_batch / critical_batch)


def efficiency(forecasts: Sequence[Forecast]) -> list[float]:
    """Return each one's throughput a rank as a share of the first one's."""
    first = forecasts[0].step.middle * forecasts[0].ranks
    return [first / (each.step.middle * each.ranks) for each in forecasts]
