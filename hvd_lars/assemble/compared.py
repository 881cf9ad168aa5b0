"""Compare a recorded run with a site's forecast."""

from __future__ import annotations

from statistics import median

from hvd_lars.assemble.plan import Plan
from hvd_lars.assemble.recorded import Run
from hvd_lars.planning.comparison import Comparison, Measured, compare
from hvd_lars.planning.forecast import Work
from hvd_lars.planning.site import Site


def work_of(plan: Plan, micro_batch: int, bucket_mb: float | str) -> Work:
    """Return a run without its ranks, for a forecast; ``bucket_mb`` is in MiB, or auto."""
    size = 25.0 if isinstance(bucket_mb, str) else bucket_mb
    return Work(
        plan.global_batch, micro_batch, plan.steps_per_epoch, plan.intervals.total, size * 2**20
    )


def compare_run(run: Run, site: Site) -> Comparison | None:
    """Compare a run's median step with the site's forecast for its last world size.

    Returns None if no record tells yet how long an epoch is, or a step on that world size.
    """
    if run.plan is None:
        return None
    ranks, micro_batch = run.plan.ranks, run.config["train"]["micro_batch"]
    records = [record for record in run.train if len(record.get("rank_busy_seconds", [0])) == ranks]
    if not records:
        return None

    def usual(key: str) -> float:
        return float(median(record.get(key, 0.0) for record in records))

    def by_rank(key: str) -> list[float]:
        columns = zip(*(record[key] for record in records if key in record), strict=True)
        return [median(column) for column in columns]

    found = Measured(
        ranks,
        usual("step_seconds"),
        usual("data_seconds"),
        usual("communication_seconds"),
        by_rank("rank_data_seconds"),
        by_rank("rank_busy_seconds"),
    )
    return compare(site, work_of(run.plan, micro_batch, run.config["comm"]["bucket_mb"]), found)
