"""The first screen of a page: results, troubles, and the four curves that people ask for first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import median

from hvd_lars.assemble.recorded import Run
from hvd_lars.report.charts import Series, line_chart
from hvd_lars.report.html import figure, table

_APART = 20.0  # peak rates so many times apart are shown on a logarithmic axis
_WAITS = 0.1  # of a step's time, from which waiting for input is a trouble


def glance(runs: Sequence[Run]) -> str:
    """Return the table of results, what went wrong, and the curves."""
    told = [f"{run.name}: {each}" for run in runs for each in troubles(run)]
    items = "".join(f"<li>{escape(each)}</li>" for each in told)
    wrong = (
        f"<p>What went wrong:</p><ul class=wrong>{items}</ul>"
        if told
        else "<p>Nothing went wrong: no step skipped, no restart, no slow rank, no wait for "
        "input.</p>"
    )
    return _results(runs) + wrong + _curves(runs)


def troubles(run: Run) -> list[str]:
    """Say what a reader of a run's records should know, worst first."""
    found = []
    starts = [e for e in run.events if e["event"] in ("start", "resume")]
    end = _end(run)
    skipped = run.train[-1].get("skipped_steps", 0)
    last = run.train[-1]["step"]
    if end is None:
        found.append(f"no end is recorded after step {last:,}: it is running, or was killed")
    elif end != "finished":
        found.append(f"stopped at step {last:,}: {end}")
    if run.train[-1].get("loss") is None:
        found.append("the last loss is not finite: training diverged")
    for event, done in (("replaced", "replaced by others"), ("not_evaluated", "not evaluated")):
        count = sum(e["event"] == event for e in run.events)
        if count:
            found.append(f"{count:,} unreadable images were {done}")
    if skipped:
        found.append(f"{skipped:,} steps were skipped, as a gradient was not finite")
    if len(starts) > 1:
        sizes = " → ".join(str(e.get("world_size", "?")) for e in starts)
        found.append(f"started {len(starts)} times, with {sizes} ranks")
    slow = {
        f"rank {e['rank']} on {e['host']}": e["step"]
        for e in run.events
        if e["event"] == "straggler"
    }
    found += [f"{where} was slower than the others, last at step {step:,}"
              for where, step in slow.items()]  # fmt: skip
    timed = [r for r in run.train if r.get("step_seconds")]
    if timed:
        share = median(r.get("data_seconds", 0.0) / r["step_seconds"] for r in timed)
        if share > _WAITS:
            found.append(f"waits for input take {share:.0%} of a step (median, rank 0)")
    return found


def _end(run: Run) -> str | None:
    """Return why a run stopped; None if it did not, or was started again."""
    ends = [e for e in run.events if e["event"] in ("start", "resume", "stop")]
    return ends[-1].get("reason", "") if ends and ends[-1]["event"] == "stop" else None


def _results(runs: Sequence[Run]) -> str:
    def row(run: Run) -> list[object]:
        last = run.train[-1]
        top1 = [e["top1"] for e in run.evaluations if e.get("top1") is not None]
        sizes = [e["world_size"] for e in run.events if "world_size" in e]
        return [
            run.name,
            _percent(top1[-1]) if top1 else "–",
            _percent(max(top1)) if top1 else "–",
            f"{last['loss']:.4f}" if last.get("loss") is not None else "not finite",
            f"{last['lr']:.4g}" if "lr" in last else "–",
            f"{median(r['images_per_second'] for r in run.train):,.0f}",
            f"{last['step']:,}",
            f"{run.global_batch:,}",
            " → ".join(map(str, sizes)) or "–",
            last.get("skipped_steps", 0),
            _end(run) or "running, or killed",
        ]

    head = [
        "run", "top-1", "best top-1", "last loss", "last γ", "images/s (median)", "steps",
        "global batch", "ranks", "skipped", "ended",
    ]  # fmt: skip
    return table(head, [row(run) for run in runs], figures=True)


def _curves(runs: Sequence[Run]) -> str:
    """Return top-1, loss, learning rate and throughput, in two columns where there is room."""
    top1 = _lines(
        runs,
        lambda run: [
            (e["epoch"], 100.0 * e["top1"]) for e in run.evaluations if e.get("top1") is not None
        ],
    )
    loss = _lines(runs, lambda run: [(r["epoch"], r.get("loss")) for r in run.train])
    loss += [
        Series(f"{each.name}, test", each.points, each.colour, dashed=True)
        for each in _lines(runs, lambda run: [(e["epoch"], e.get("loss")) for e in run.evaluations])
    ]
    rates = []
    for number, run in enumerate(runs):
        taken = [(r["step"], r["lr"]) for r in run.train]
        rates += [
            Series(f"{run.name}, as planned", run.planned, number, dashed=True),
            Series(run.name, taken, number),
        ]
    speed = _lines(runs, lambda run: [(r["step"], r["images_per_second"]) for r in run.train])
    peaks = [max((r["lr"] for r in run.train), default=0.0) for run in runs]
    apart = max(peaks) > _APART * min(peaks) > 0.0
    panels = [
        (line_chart("Top-1 accuracy by epoch", top1, "epoch", "top-1, %"), "Top-1 accuracy, %"),
        (line_chart("Loss by epoch", loss, "epoch", "loss", log_y=True), "Loss"),
        (line_chart("Learning rate by step", rates, "step", "learning rate γ", log_y=apart),
         "Learning rate γ"),
        (line_chart("Images per second by step", speed, "step", "images/s"), "Images per second"),
    ]  # fmt: skip
    shown = "".join(figure(*panel) for panel in panels)
    return f'<div class="panels">{shown}</div><p class="none">{escape(_off_plan(runs))}</p>'


def _off_plan(runs: Sequence[Run]) -> str:
    """Say whether the recorded rates are those of the configs' schedules."""
    planned = [dict(run.planned) for run in runs]
    off = [
        f"{run.name}: step {r['step']} took {r['lr']:.6g}, the config plans {plan[r['step']]:.6g}"
        for run, plan in zip(runs, planned, strict=True)
        for r in run.train
        if r["step"] in plan and not math.isclose(r["lr"], plan[r["step"]], rel_tol=1e-6)
    ]
    if off:
        return f"{len(off)} recorded rates differ from the plan: {off[0]}."
    return "All recorded rates match the config's plan."


def _lines(
    runs: Sequence[Run], points: Callable[[Run], Iterable[tuple[float, float | None]]]
) -> list[Series]:
    return [
        Series(run.name, [(x, math.nan if y is None else y) for x, y in points(run)], number)
        for number, run in enumerate(runs)
    ]


def _percent(value: float) -> str:
    return f"{100.0 * value:.2f} %"
