#!/usr/bin/env python3
"""Draw what benchmarks/large_batch.py wrote: ``python benchmarks/plot_large_batch.py FILE…``.

For each FILE.json two pictures in docs/pictures: accuracy against batch by method beside the
critical batch that the gradient noise tells, and the trust ratio of every layer over the steps of
one LARS run.  Then docs/reproduction.md is written with the tables.  Needs the extra ``plot``:
``pip install -e .[plot]``.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

LOSES_NOTHING = 0.3  # points: about what the seeds of one method differ by
LOST = (-1, -0.3, 0, 0.3, 1, 3, 10, 30, 90)
DOCS = Path(__file__).resolve().parent.parent / "docs"
# Okabe and Ito's colours, told apart by every eye; markers tell them apart in grey.
STYLES = {
    "LARS": ("#0072B2", "o", "-"),
    "LAMB": ("#E69F00", "P", "-"),
    "Nesterov": ("#D55E00", "s", "-"),
    "SGD": ("#009E73", "^", "-"),
    "sqrt": ("#CC79A7", "v", "--"),
    "linear": ("#56B4E9", "D", "--"),
}
NAMES = {
    "LARS": "LARS",
    "LAMB": "LAMB",
    "Nesterov": "Nesterov",
    "SGD": "SGD",
    "sqrt": "SGD, rate × √k",
    "linear": "SGD, rate × k",
}


def mean(row: dict[str, Any]) -> float:
    """Mean accuracy of the held-out runs."""
    return statistics.mean(row["top1"])


def spread(row: dict[str, Any]) -> float | None:
    """Their standard deviation; None of one run."""
    return statistics.stdev(row["top1"]) if len(row["top1"]) > 1 else None


def rows_of(result: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The rows of a method that were measured, by batch."""
    rows = [
        row for row in result["rows"]
        if row["method"] == method and row["top1"] and "change" not in row
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["batch"])


def draw_accuracy(result: dict[str, Any], axes: Axes) -> None:
    """Points lost against the smallest batch: the mean over seeds, from the best to the worst."""
    batches = sorted({row["batch"] for row in result["rows"]})
    small = rows_of(result, "SGD")[0]
    axes.axhspan(-LOSES_NOTHING, LOSES_NOTHING, color="0.93", zorder=0)
    axes.axhline(0.0, color="0.6", linewidth=1, zorder=0)
    axes.annotate(
        f"0: SGD at B = {small['batch']}, {mean(small):.2f} ± {spread(small) or 0.0:.2f} %; "
        f"grey: within {LOSES_NOTHING} points",
        (0.02, 0.95), xycoords="axes fraction", ha="left", color="0.35", fontsize="small",
    )  # fmt: skip
    best = -1.0
    for offset, (method, (colour, marker, line)) in enumerate(STYLES.items()):
        rows = rows_of(result, method)
        if not rows:
            continue
        shift = 1.0 + 0.03 * (offset - 2)  # error bars of one batch stand side by side
        lost = [[mean(small) - value for value in sorted(row["top1"])] for row in rows]
        middle = [statistics.mean(each) for each in lost]
        axes.errorbar(
            [row["batch"] * shift for row in rows], middle,
            [[at - each[-1] for at, each in zip(middle, lost, strict=True)],
             [each[0] - at for at, each in zip(middle, lost, strict=True)]],
            label=NAMES[method], color=colour, marker=marker, linestyle=line, capsize=3,
            markersize=6,
        )  # fmt: skip
        best = min(best, *(each[-1] for each in lost))
    known = critical_batch(small)
    if known is not None:
        axes.axvline(known, color="0.35", linestyle=":", linewidth=1.2)
        axes.annotate(
            f"critical batch {known:,.0f}", (known, 0.91), xycoords=("data", "axes fraction"),
            rotation=90, xytext=(-12, 0), va="top", textcoords="offset points", color="0.35",
            fontsize="small",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    # Linear up to one point, then logarithmic: 0.3 points and a run that diverged are both seen.
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_yticks(LOST, [f"{lost:g}" for lost in LOST])
    axes.set_ylim(100.0, 1.5 * best)
    axes.set_xlabel(f"global batch B, {result['epochs']} epochs each")
    axes.set_ylabel("points of test accuracy lost; bars: best to worst seed")
    axes.legend(loc="lower left", frameon=False, fontsize="small")
    axes.grid(axis="y", color="0.92")


def critical_batch(row: dict[str, Any]) -> float | None:
    """The critical batch of a run, the median over its epochs, with two digits."""
    known = [value for _, value in row.get("critical_batches") or ()]
    return float(f"{statistics.median(known):.2g}") if known else None


def draw_critical(result: dict[str, Any], axes: Axes) -> None:
    """The critical batch over the epochs of a run at every batch, and the batch itself."""
    chosen = [row for row in rows_of(result, "LARS") if row.get("critical_batches")]
    chosen = [row for row in rows_of(result, "SGD")[:1] if row.get("critical_batches")] + chosen
    for number, row in enumerate(chosen):
        epochs, values = zip(*row["critical_batches"], strict=True)
        colour = plt.get_cmap("viridis")(number / max(1, len(chosen)))
        axes.plot(epochs, values, color=colour, label=f"{row['method']} at {row['batch']:,}")
        axes.axhline(row["batch"], color=colour, linestyle="--", linewidth=0.9)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("critical batch; dashed: the batch used")
    axes.legend(loc="upper left", fontsize="small", edgecolor="none")
    axes.grid(color="0.92")


def draw_result(result: dict[str, Any], path: Path) -> None:
    """Accuracy, and beside it the critical batch if it was measured."""
    noise = critical_batch(rows_of(result, "SGD")[0]) is not None
    width = 11.0 if noise else 7.0
    figure, both = plt.subplots(
        1, 1 + noise, figsize=(width, 4.2), layout="constrained", squeeze=False
    )
    draw_accuracy(result, both[0][0])
    both[0][0].set_title(f"{result['case']}: accuracy as the batch grows")
    if noise:
        draw_critical(result, both[0][1])
        both[0][1].set_title("how large a batch is worth it")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def watched(result: dict[str, Any]) -> dict[str, Any]:
    """The row whose trust ratios are shown: LARS at 1,024, or at its largest batch below."""
    rows = [row for row in rows_of(result, "LARS") if row.get("ratios") and row["batch"] <= 1024]
    return (rows or rows_of(result, "LARS"))[-1]


def draw_ratios(result: dict[str, Any], path: Path) -> None:
    """λ of every layer over the steps."""
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    row = watched(result)
    steps = [record["step"] for record in row["ratios"]]
    curves: dict[tuple[float, ...], str] = {}  # once for a bias that has its weight's
    for layer in adapted(row):
        curves.setdefault(tuple(record["trust_ratio"][layer] for record in row["ratios"]), layer)
    colours = plt.get_cmap("viridis")
    for i, (values, layer) in enumerate(curves.items()):
        axes.plot(steps, values, label=layer, color=colours(i / len(curves)), linewidth=1.4)
    axes.set_yscale("log")
    axes.set_xlabel(f"step of {row['batch']:,} samples")
    axes.set_ylabel("trust ratio λ")
    axes.set_title(f"{result['case']}: every layer has its own rate")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    axes.grid(color="0.92")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def adapted(row: dict[str, Any]) -> list[str]:
    """The layers that LARS gives a ratio; those of BatchNorm have 1 throughout."""
    records = [record["trust_ratio"] for record in row["ratios"]]
    return [layer for layer in records[0] if any(record[layer] != 1.0 for record in records)]


def spread_of_ratios(result: dict[str, Any]) -> float:
    """Median over the records of the largest λ over the smallest."""
    row = watched(result)
    layers = adapted(row)
    records = [[record["trust_ratio"][layer] for layer in layers] for record in row["ratios"]]
    return statistics.median(max(values) / min(values) for values in records)


def measured(row: dict[str, Any]) -> str:
    """Mean ± deviation."""
    return f"{mean(row):.2f}" + (f" ± {spread(row):.2f}" if len(row["top1"]) > 1 else " (one seed)")


def cell(row: dict[str, Any] | None) -> str:
    """Accuracy and the values that made it."""
    if row is None:
        return "–"
    if not row["top1"]:
        return "all trials diverged"
    values = {key.rpartition(".")[2]: value for key, value in row["params"].items()}
    names = {"base_lr": "γ", "weight_decay": "β", "warmup_duration": "warmup"}
    shown = ", ".join(
        f"{names.get(key, key)} {value:.3g}" if isinstance(value, float)
        else f"{names.get(key, key)} {value}"
        for key, value in values.items()
    )  # fmt: skip
    return f"{measured(row)}, {shown}"


def changes(result: dict[str, Any]) -> str:
    """Tables of the runs in which one thing of LARS was changed."""
    text = ""
    for base in rows_of(result, "LARS"):
        rows = [row for row in result["rows"] if "change" in row and row["batch"] == base["batch"]]
        if rows:
            text += (
                f"\nOne thing of LARS at {base['batch']:,} changed, its rate not tuned again:\n\n"
                f"| changed | test accuracy |\n|---|---|\n| nothing | {measured(base)} |\n"
            )
        text += "".join(f"| {row['change']} | {measured(row)} |\n" for row in rows)
    return text


def section(result: dict[str, Any]) -> str:
    """One case's part of the page."""
    case, rows = result["case"], result["rows"]
    calls = [row["environment"] for row in rows if "environment" in row] or [result["environment"]]
    facts = calls[-1]
    commits = " ".join(dict.fromkeys(f"`{call['commit'][:12]}`" for call in calls))
    commands = "\n".join(
        dict.fromkeys(
            f"`horovodrun -np {call['ranks']} python {' '.join(call['command'])}`" for call in calls
        )
    )
    trials = sum(len(row["trials"]) for row in rows)
    runs = sum(len(row["top1"]) for row in rows)
    text = (
        f"## {case}\n\n{result['epochs']} epochs at every batch. {result['search']} "
        f"{facts['processor']}, {facts['cores']} cores, {facts['ranks']} ranks on "
        f"{facts['backend']}, torch {facts['versions']['torch']}, commit {commits}"
        + (f"; {trials} trials and {runs} held-out runs" if trials else "")
        + f"\n({commands}).\n\n"
    )
    methods = [method for method in STYLES if rows_of(result, method)]
    text += f"| batch | {' | '.join(NAMES[m] for m in methods)} | critical batch |\n"
    text += f"|---|{'---|' * len(methods)}---|\n"
    for batch in sorted({row["batch"] for row in rows}):
        here = {row["method"]: row for row in rows if row["batch"] == batch and "change" not in row}
        known = critical_batch(here.get("LARS") or here.get("SGD") or {})
        critical = f"{known:,.0f}" if known is not None else "–"
        cells = [cell(here.get(method)) for method in methods]
        text += f"| {batch:,} | {' | '.join(cells)} | {critical} |\n"
    text += changes(result)
    return text + (
        f"\n![Points of accuracy lost by batch and method](pictures/large_batch-{case}.png)\n\n"
        f"![Trust ratios by layer](pictures/trust_ratios-{case}.png)\n\n"
        f"In the LARS run of the second picture the largest trust ratio of a layer is "
        f"{spread_of_ratios(result):.0f} times the smallest, the median over the records.\n"
    )


HEAD = """# The paper's claim, small

Made by `python benchmarks/plot_large_batch.py`; not to be edited by hand. Networks shaped like
AlexNet, on three data sets, in `fashion-bn` with BatchNorm; in `fashion-full` warmup and weight
decay are searched, too, and `fashion-10` is an earlier look in fewer epochs. The same number of
epochs at every batch, gradual warmup over a quarter of them unless it was searched, poly decay of
power 2, momentum 0.9, weight decay 5e-4, over two real ranks. Values are chosen on other seeds than
those that are shown as mean ± standard deviation, in percent. The scaled rates are SGD's best at
the smallest batch times √k or k, with k how many times larger the batch is; they are not tuned. The
critical batch is the gradient noise scale of one run of LARS, or else SGD, the median over its
epochs ([algorithm](algorithm.md#how-large-a-batch-is-worth-it)); the dotted line in the pictures is
that of SGD at the smallest batch. Not run so far: on Fashion-MNIST LAMB and Nesterov at other
batches than 1,024 and with BatchNorm, scaled rates at 2,048 and 4,096 (times k at 512, too) and
with BatchNorm, `fashion-bn` at 512 and 8,192, `fashion-full` beyond 1,024, and `fashion-bn` with
the full search.

"""


def main() -> None:
    """Draw every file and write the page."""
    (DOCS / "pictures").mkdir(exist_ok=True)
    page = HEAD
    for name in sys.argv[1:]:
        result = json.loads(Path(name).read_text(encoding="utf-8"))
        draw_result(result, DOCS / f"pictures/large_batch-{result['case']}.png")
        draw_ratios(result, DOCS / f"pictures/trust_ratios-{result['case']}.png")
        page += section(result) + "\n"
    (DOCS / "reproduction.md").write_text(page.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
