#!/usr/bin/env python3
"""Draw what benchmarks/large_batch.py wrote: ``python benchmarks/plot_large_batch.py FILE…``.

For each FILE.json two pictures in docs/pictures: accuracy against batch by method, and the trust
ratio of every layer over the steps of one LARS run.  Then docs/reproduction.md is written with the
tables.  Needs the extra ``plot``: ``pip install -e .[plot]``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Okabe and Ito's colours, told apart by every eye; markers tell them apart in grey.
STYLES = {
    "LARS": ("#0072B2", "o", "-"),
    "Nesterov": ("#D55E00", "s", "-"),
    "SGD": ("#009E73", "^", "-"),
    "sqrt": ("#CC79A7", "v", "--"),
    "linear": ("#56B4E9", "D", "--"),
}
NAMES = {
    "LARS": "LARS, rate chosen",
    "Nesterov": "Nesterov, rate chosen",
    "SGD": "SGD, rate chosen",
    "sqrt": "SGD, rate scaled by √k",
    "linear": "SGD, rate scaled by k",
}


def draw_accuracy(result: dict[str, Any], path: Path) -> None:
    """Mean and standard deviation of the held-out seeds."""
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    batches = sorted({row["batch"] for row in result["table"]})
    small = next(row for row in result["table"] if row["batch"] == batches[0])
    axes.axhline(small["mean"], color="0.6", linewidth=1, zorder=0)
    axes.annotate(
        f"SGD at B = {batches[0]}: {small['mean']:.2f} %", (batches[0], small["mean"]),
        xytext=(10, 5), textcoords="offset points", ha="left", color="0.35",
    )  # fmt: skip
    for offset, (method, (colour, marker, line)) in enumerate(STYLES.items()):
        rows = [row for row in result["table"] if row["method"] == method]
        if not rows:
            continue
        shift = 1.0 + 0.03 * (offset - 2)  # error bars of one batch stand side by side
        seeds = "" if rows[0]["spread"] is not None else ", one seed"
        axes.errorbar(
            [row["batch"] * shift for row in rows], [row["mean"] for row in rows],
            [row["spread"] or 0.0 for row in rows], label=NAMES[method] + seeds, color=colour,
            marker=marker, linestyle=line, capsize=3 if not seeds else 0, markersize=6,
            markerfacecolor="white" if seeds else colour,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_ylim(0, 106)
    axes.set_xlabel("global batch B, 20 epochs each")
    axes.set_ylabel("test accuracy, %; five held-out seeds where filled")
    axes.set_title(f"{result['data']}: accuracy as the batch grows")
    axes.legend(loc="lower left", frameon=False)
    axes.grid(axis="y", color="0.92")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_ratios(result: dict[str, Any], path: Path) -> None:
    """λ of every weight over the steps."""
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    steps = [row["step"] for row in result["ratios"]]
    layers = [key for key in result["ratios"][0] if key != "step"]
    colours = plt.get_cmap("viridis")
    for i, layer in enumerate(layers):
        values = [row[layer] for row in result["ratios"]]
        axes.plot(steps, values, label=layer, color=colours(i / len(layers)), linewidth=1.4)
    axes.set_yscale("log")
    axes.set_xlabel("step of 1,024 samples; warmup ends at a quarter")
    axes.set_ylabel("λ = 0.001·‖w‖ / (‖g‖ + β‖w‖), w after the step")
    axes.set_title(f"{result['data']}: every layer has its own rate")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    axes.grid(color="0.92")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def spread_of_ratios(result: dict[str, Any]) -> float:
    """Median over the steps of the largest λ over the smallest."""
    quotients = []
    for row in result["ratios"]:
        values = [value for key, value in row.items() if key != "step"]
        quotients.append(max(values) / min(values))
    return sorted(quotients)[len(quotients) // 2]


def cell(row: dict[str, Any]) -> str:
    """Accuracy and the rate that made it."""
    spread = f" ± {row['spread']:.2f}" if row["spread"] is not None else " (one seed)"
    return f"{row['mean']:.2f}{spread}, γ {row['rate']:.3g}"


def section(result: dict[str, Any]) -> str:
    """One data set's part of the page."""
    data, facts = result["data"], result["environment"]
    form = "full" if result["full"] else "short"
    text = f"## {data}\n\n"
    text += (
        f"{form.capitalize()} form, {len(result['runs'])} runs in {result['minutes']:.0f} minutes: "
        f"{facts['processor']}, {facts['cores']} cores, 2 ranks, torch "
        f"{facts['versions']['torch']}, commit `{facts['commit'][:12]}`\n"
        f"(`horovodrun -np 2 python {' '.join(facts['command'])}`).\n\n"
    )
    methods = [m for m in STYLES if any(row["method"] == m for row in result["table"])]
    text += f"| batch | {' | '.join(NAMES[m] for m in methods)} |\n|---|{'---|' * len(methods)}\n"
    for batch in sorted({row["batch"] for row in result["table"]}):
        cells = []
        for method in methods:
            rows = [r for r in result["table"] if (r["batch"], r["method"]) == (batch, method)]
            cells.append(cell(rows[0]) if rows else "–")
        text += f"| {batch:,} | {' | '.join(cells)} |\n"
    text += (
        f"\n![Accuracy against batch by method](pictures/large_batch-{data}.png)\n\n"
        f"![Trust ratios by layer](pictures/trust_ratios-{data}.png)\n\n"
        f"In the LARS run of the second picture the largest trust ratio of a layer is "
        f"{spread_of_ratios(result):.0f} times the smallest, the median over the steps.\n"
    )
    return text


HEAD = """# The paper's claim, small

Made by `python benchmarks/plot_large_batch.py`; not to be edited by hand. One network shaped like
AlexNet, without normalisation; 20 epochs at every batch, gradual warmup over 5 of them, poly decay
of power 2, momentum 0.9, weight decay 5e-4, over two real ranks. A rate is chosen on other seeds
than the five that are shown as mean ± standard deviation, in percent. The scaled rates are 0.04,
the small batch's, times √k or k with k = B/32; SGD may choose them too.

"""


def main() -> None:
    """Draw every file and write the page."""
    (DOCS / "pictures").mkdir(exist_ok=True)
    page = HEAD
    for name in sys.argv[1:]:
        result = json.loads(Path(name).read_text(encoding="utf-8"))
        draw_accuracy(result, DOCS / f"pictures/large_batch-{result['data']}.png")
        draw_ratios(result, DOCS / f"pictures/trust_ratios-{result['data']}.png")
        page += section(result) + "\n"
    (DOCS / "reproduction.md").write_text(page.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
