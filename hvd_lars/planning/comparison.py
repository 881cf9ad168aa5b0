"""A run compared with its forecast, and where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hvd_lars.planning.forecast import Forecast, Range, Work, forecast
from hvd_lars.planning.site import Site


@dataclass(frozen=True)
class Measured:
    """Medians over a run's records, in seconds a step.

    Attributes:
        ranks: how many.
        step: a whole step.
        data: wait of rank 0 for its batches.
        communication: wait of rank 0 for the sums over ranks.
        rank_data: each rank's wait for batches; empty for one rank.
        rank_busy: each rank's work, without waits for data or other ranks; empty for one rank.
    """

    ranks: int
    step: float
    data: float
    communication: float
    rank_data: Sequence[float]
    rank_busy: Sequence[float]


@dataclass(frozen=True)
class Comparison:
    """A run beside its forecast.

    Efficiency is the share of a step that the images would take at the site's larger micro-batch,
    on a rank that waits for nothing.

    Attributes:
        expected: the forecast.
        step: measured, in seconds.
        expected_efficiency: of the forecast.
        efficiency: measured.
        losses: seconds a step by cause, the largest first.
    """

    expected: Forecast
    step: float
    expected_efficiency: Range
    efficiency: float
    losses: dict[str, float]

    def sentence(self) -> str:
        """Return how the step compares with the plan, and the likeliest cause of its losses."""
        low, high = self.expected.step
        if self.step > high:
            found = f"{100.0 * (self.step / high - 1.0):.0f} % slower than planned"
        elif self.step < low:
            found = f"{100.0 * (1.0 - self.step / low):.0f} % faster than planned"
        else:
            found = "as planned"
        cause, seconds = next(iter(self.losses.items()))
        if seconds < 0.01 * self.step:
            return f"{found}; no loss of 1 % or more"
        share = 100.0 * seconds / self.step
        return f"{found}; largest loss: {cause}, {1e3 * seconds:.3g} ms a step ({share:.0f} %)"


def compare(site: Site, work: Work, found: Measured) -> Comparison:
    """Compare a run with the forecast for its ranks, and split its losses by cause."""
    expected, costs = forecast(site, work, found.ranks), site.costs
    passes = -(-expected.images // work.micro_batch)
    computed = passes * costs.fixed + expected.images * costs.per_image
    own = [a + b for a, b in zip(found.rank_data, found.rank_busy, strict=True)]
    busy = median(found.rank_busy) if own else found.step - found.data - found.communication
    losses = {
        "waiting for images": median(found.rank_data) if own else found.data,
        "computing slower than in the site's measurement": busy - computed,
        "the fixed cost of small micro-batches": passes * costs.fixed,
    }
    if own:
        slowest = max(range(len(own)), key=own.__getitem__)
        losses[f"rank {slowest}, which is slower than the others"] = own[slowest] - median(own)
        # Rank 0 waits for the slowest rank inside its communication.
        losses["communication that backward does not hide"] = found.communication - (
            own[slowest] - own[0]
        )
    images, seconds = max(site.compute)
    ideal = expected.images * seconds / images
    low, high = expected.step
    return Comparison(
        expected,
        found.step,
        Range(ideal / high, ideal / low),
        ideal / found.step,
        dict(sorted(losses.items(), key=lambda loss: -loss[1])),
    )
