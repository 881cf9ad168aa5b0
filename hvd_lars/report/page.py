"""The page: its sections, in order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import median

from hvd_lars.assemble.compared import compare_run
from hvd_lars.assemble.recorded import Record, Run, read_run
from hvd_lars.assemble.studied import read_study
from hvd_lars.errors import UserError
from hvd_lars.planning.site import Site
from hvd_lars.report.charts import Series, heat_map, line_chart, stacked_chart
from hvd_lars.report.glance import glance
from hvd_lars.report.html import figure, page_of, table
from hvd_lars.report.study import study_page
from hvd_lars.runtime.files import write_output
from hvd_lars.settings.tree import leaves
from hvd_lars.tuning.study import is_study

_PARTS = ("data", "forward", "backward", "communication", "optimizer")
_COLUMNS = 60  # of a heat map
_UNFOLDED = 3  # runs


def write_report(folders: Sequence[Path], output: Path, site: Site | None = None) -> None:
    """Write one page about runs, or about one study; it opens without a network.

    With ``site``, the runs are compared with its forecast.

    Raises:
        UserError: a folder holds no run, or the page cannot be written.
    """
    studies = [folder for folder in folders if is_study(folder)]
    if studies and len(folders) > 1:
        raise UserError(
            f"{studies[0]}: is a study of tune, which has a page of its own; give it alone"
        )
    page = (
        study_page(read_study(folders[0]))
        if studies
        else make_page([read_run(folder) for folder in folders], site)
    )
    write_output(output, page)


def make_page(runs: Sequence[Run], site: Site | None = None) -> str:
    """Return the whole page as HTML; with ``site``, runs are compared with its forecast."""
    runs = _told_apart(runs)
    sections: list[tuple[str, str, str]] = [
        ("glance", "At a glance", glance(runs)),
        ("batch", "Batch", _batch(runs)),
        ("layers", "Layers", _each(runs, _layers)),
        ("speed", "Speed", _speed(runs) + ("" if site is None else _plans(runs, site))),
        ("ranks", "Ranks", _each(runs, _ranks)),
        ("events", "Events", _each(runs, _events)),
        ("config", "Config", _config(runs)),
        ("environment", "Environment", _environment(runs)),
    ]
    return page_of(", ".join(run.name for run in runs), sections)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Return every run once, named by as much of its path as tells it from the others."""
    once = {Path(os.path.abspath(run.folder)): run for run in runs}
    depths = dict.fromkeys(once, 1)
    while True:
        names = {path: "/".join(path.parts[-depth:]) for path, depth in depths.items()}
        same = [path for path, name in names.items() if Counter(names.values())[name] > 1]
        if not same:
            return [replace(run, name=names[path]) for path, run in once.items()]
        for path in same:
            depths[path] += 1


def _each(runs: Sequence[Run], section: Callable[[Run], str]) -> str:
    """Return a part of the page for every run; of many runs they are folded."""
    if len(runs) <= _UNFOLDED:
        return "".join(map(section, runs))
    return "".join(
        f"<details><summary>{escape(run.name)}</summary>{section(run)}</details>" for run in runs
    )


def _batch(runs: Sequence[Run]) -> str:
    """The critical batch beside the batch used, and what a sample is worth there."""
    series, sentences = [], []
    for number, run in enumerate(runs):
        known = run.critical_batches
        if not known:
            continue
        used = [(epoch, float(run.global_batch)) for epoch, _ in (known[0], known[-1])]
        series += [
            Series(f"{run.name}, critical", known, number),
            Series(f"{run.name}, used", used, number, dashed=True),
        ]
        epoch, critical = known[-1]
        worth = 1.0 / (1.0 + run.global_batch / critical)
        sentences.append(
            f"{run.name}: at epoch {epoch:.3g} the critical batch is about {_rounded(critical)}: "
            f"at {run.global_batch:,} each sample is worth {worth:.2g} of one at a small batch."
        )
    if not series:
        return (
            "<p class=none>No gradient noise scale was recorded: a step needs two ranks or two "
            "micro-batches, and norms without weight decay (not denominator: combined).</p>"
        )
    chart = line_chart(
        "Critical batch by epoch", series, "epoch", "critical batch, samples", log_y=True
    )
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    caption = (
        "Critical batch (the gradient noise scale, averaged over a tenth of the records), and the "
        "batch used"
    )
    return text + figure(chart, caption)


def _rounded(value: float) -> str:
    """Return a positive number with two significant digits."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 1 else f"{value:.2g}"


def _layers(run: Run) -> str:
    if not run.layers:
        return f"<p class=none>{escape(run.name)}: no norms of layers were recorded.</p>"
    stride = -(-len(run.layers) // _COLUMNS)
    kept = run.layers[::stride]
    names = list(kept[-1]["trust_ratio"])
    columns = [f"{r['step']:,}" for r in kept]
    # λ = 1 of the others would take up the scale of colours.
    adapted = [name for name in names if any(r["trust_ratio"].get(name) != 1.0 for r in kept)]
    maps: list[tuple[str, list[str], Callable[[Record, str], float | None]]] = [
        ("Trust ratio λ", adapted, lambda r, name: r["trust_ratio"].get(name))
        if adapted
        else ("‖w‖ / ‖g‖ (no layer has a trust ratio)", names, _norm_ratio),
        ("Weight norm", names, lambda r, name: r["weight_norm"].get(name)),
    ]
    text = ""
    for what, shown, value in maps:
        values = [[value(r, name) or 0.0 for r in kept] for name in shown]
        title = f"{what}, {run.name}: layers by step"
        left_out = len(names) - len(shown)
        note = f" (left out: {left_out} without a ratio)" if left_out else ""
        text += figure(heat_map(title, shown, columns, values), title + note)
    last = kept[-1]
    rows = [
        [name, *(f"{last[key][name]:.4g}" if last[key].get(name) is not None else "not finite"
                 for key in ("weight_norm", "gradient_norm", "trust_ratio", "rate"))]
        for name in names
    ]  # fmt: skip
    numbers = table(["layer", "‖w‖", "‖g‖", "λ", "γλ"], rows)
    return text + f"<details><summary>Numbers at step {last['step']:,}</summary>{numbers}</details>"


def _norm_ratio(record: Record, name: str) -> float | None:
    weight, gradient = record["weight_norm"].get(name), record["gradient_norm"].get(name)
    return weight / gradient if weight and gradient else None


def _speed(runs: Sequence[Run]) -> str:
    text = ""
    for run in runs:
        split = {part: [1e3 * r.get(f"{part}_seconds", 0.0) for r in run.train] for part in _PARTS}
        known = [sum(values) for values in zip(*split.values(), strict=True)]
        split["rest"] = [
            max(0.0, 1e3 * r["step_seconds"] - k) for r, k in zip(run.train, known, strict=True)
        ]
        title = f"Where a step's time goes on rank 0, {run.name}"
        text += figure(stacked_chart(title, [r["step"] for r in run.train], split), title)
    return text


def _plans(runs: Sequence[Run], site: Site) -> str:
    """Compare each run with the forecast for its world size."""
    rows, told = [], ""
    for run in runs:
        found = compare_run(run, site)
        if found is None:
            told += f"<p>{escape(run.name)}: no step to compare is recorded yet.</p>"
            continue
        told += f"<p>{escape(f'{run.name}: {found.sentence()}')}.</p>"
        low, high = (1e3 * bound for bound in found.expected.step)
        least, most = (100.0 * share for share in found.expected_efficiency)
        rows.append(
            [
                run.name,
                f"{found.expected.ranks:,}",
                f"{low:,.4g}–{high:,.4g}",
                f"{1e3 * found.step:,.4g}",
                f"{least:.0f}–{most:.0f} %",
                f"{100.0 * found.efficiency:.0f} %",
            ]
        )
    head = [
        "run", "ranks", "ms a step, planned", "ms a step", "efficiency, planned", "efficiency",
    ]  # fmt: skip
    note = (
        f"The plan is that of hvd-lars plan with measurements of {site.config} on {site.ranks} "
        "ranks. Efficiency: the share of a step that its images take on a rank that waits for "
        "nothing, at the site's larger micro-batch."
    )
    compared = table(head, rows, figures=True)
    return f"<h3>Plan and run</h3>{told}{compared}<p class=none>{escape(note)}</p>"


def _ranks(run: Run) -> str:
    timed = [r for r in run.train if "rank_busy_seconds" in r]
    if not timed:
        return f"<p class=none>{escape(run.name)}: one rank, which waits for no other.</p>"
    size = len(timed[-1]["rank_busy_seconds"])
    timed = [r for r in timed if len(r["rank_busy_seconds"]) == size]
    hosts: list[str] = next((e["hosts"] for e in reversed(run.events) if e.get("hosts")), [])
    stride = -(-len(timed) // _COLUMNS)
    kept = timed[::stride]
    own = [[r["rank_data_seconds"][k] + r["rank_busy_seconds"][k] for r in kept]
           for k in range(size)]  # fmt: skip
    labels = [f"rank {k} · {hosts[k] if k < len(hosts) else ''}" for k in range(size)]
    title = f"Seconds a step without waiting for others, {run.name}: ranks by step"
    text = figure(heat_map(title, labels, [f"{r['step']:,}" for r in kept], own), title)
    usual = median(median(values) for values in own)
    rows = [
        [labels[k], f"{1e3 * median(r['rank_data_seconds'][k] for r in timed):,.1f}",
         f"{1e3 * median(r['rank_busy_seconds'][k] for r in timed):,.1f}",
         f"{median(own[k]) / usual:.2f} ×" if usual else "–"]
        for k in range(size)
    ]  # fmt: skip
    head = ["rank", "waits for data, ms a step", "computes, ms a step", "of the median rank"]
    return text + table(head, rows)


def _events(run: Run) -> str:
    told = [e for e in run.events if e["event"] not in ("checkpoint",)]
    rows = [
        [f"{e['step']:,}", e["event"],
         ", ".join(f"{k} {v}" for k, v in e.items()
                   if k not in ("kind", "step", "epoch", "event", "unix_seconds", "hosts"))]
        for e in told
    ]  # fmt: skip
    stalls = [e["stall_seconds"] for e in run.events if e["event"] == "checkpoint"]
    kept = f"{len(stalls)} checkpoints"
    if stalls:
        kept += f", which stalled training for {median(stalls):.3f} s (median)"
    return f"<h3>{escape(run.name)}</h3>" + table(["step", "event", ""], rows) + f"<p>{kept}.</p>"


def _config(runs: Sequence[Run]) -> str:
    flat = [dict(leaves(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    if len(runs) == 1:
        rows = [[key, flat[0][key]] for key in keys]
        return f"<details><summary>All values</summary>{table(['key', 'value'], rows)}</details>"
    rows = [
        [key, *(each.get(key, "–") for each in flat)]
        for key in keys
        if len({repr(each.get(key)) for each in flat}) > 1
    ]
    return table(["differs", *(run.name for run in runs)], rows)


def _environment(runs: Sequence[Run]) -> str:
    flat = [dict(leaves(run.environment)) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    rows = [[key, *(each.get(key, "–") for each in flat)] for key in keys]
    return table(["", *(run.name for run in runs)], rows)
