#!/usr/bin/env python3
"""The cost model of hvd_lars.planning against published runs of ResNet-50 on several nodes.

    python benchmarks/plan_check.py

The points (benchmarks/data/mlperf_resnet50.csv) are the 221 GPU systems of MLPerf Training v0.5 to
v4.0 whose logs have the times of epochs: facts from the result files of
github.com/mlcommons/training_results_v0.5 … v4.0, medians over the epochs of five runs.

Calibration: every point takes the cost of an image from a one-node entry of the same GPU, the
nearest in round and in images a GPU; the fixed cost of a step comes from one point with a small
batch for each generation of GPU and software (CALIBRATION), which is not counted.  Everything else
is predicted: nothing is fitted to it.  Gradients are 51 MB of float16, all-reduced after backward
(no overlap), as the entries' configs have it; 80 % of a node's nominal network is reached.
"""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

from hvd_lars.planning.cost import Compute, Links, step_seconds

DATA = Path(__file__).parent / "data/mlperf_resnet50.csv"
GRADIENTS = 51e6  # bytes, float16
REACHED = 0.8  # of the nominal network
# Bus bandwidth inside a node, bytes a second, as measured with nccl-tests on machines of the kind.
IN_NODE = {"V100": 130e9, "A100": 235e9, "H100": 360e9, "H200": 360e9, "PCIE": 20e9, "L40S": 20e9}
# Of each generation the point that tells the fixed cost: round, submitter, GPU, nodes.
CALIBRATION = [
    ("0.5", "nvidia", "V100", 80),
    ("0.6", "NVIDIA", "V100", 130),
    ("0.7", "NVIDIA", "A100-40", 96),
    ("1.1", "NVIDIA", "A100", 128),
    ("3.0", "NVIDIA", "H100", 64),
    ("4.0", "NVIDIA", "L40S", 16),
]


@dataclass(frozen=True)
class Point:
    """One published system."""

    round: str
    submitter: str
    gpu: str
    nodes: int
    per_node: int
    network: float  # bytes a second of a node, nominal
    images: float  # a GPU, in a step
    seconds: float  # a step

    @property
    def generation(self) -> int:
        """The index in CALIBRATION of its GPU and software."""
        if self.gpu.startswith("V100"):
            return 0 if self.round == "0.5" else 1
        if self.gpu.startswith("A100"):
            return 2 if self.round == "0.7" else 3
        return 5 if self.gpu == "L40S" else 4

    @property
    def all_reduce(self) -> float:
        """Seconds of its all-reduce."""
        kind = next(kind for kind in ("PCIE", *IN_NODE) if kind in self.gpu)
        links = Links(self.per_node, IN_NODE[kind], REACHED * self.network)
        return links.all_reduce_seconds(self.nodes, GRADIENTS)

    @property
    def key(self) -> tuple[str, str, str, int]:
        """As CALIBRATION names points."""
        return self.round, self.submitter, self.gpu, self.nodes


def read_points() -> list[Point]:
    """Read the table."""
    with DATA.open() as file:
        return [
            Point(
                row["round"], row["submitter"], row["gpu"], int(row["nodes"]),
                int(row["gpus_per_node"]), 1e9 * float(row["network_gbyte_per_s_per_node"]),
                float(row["images_per_gpu"]), 1e-3 * float(row["ms_per_step"]),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def anchor_of(point: Point, single: list[Point]) -> Point | None:
    """The one-node entry of the same GPU that is nearest in round, then in images a GPU."""
    same = [each for each in single if each.gpu == point.gpu]
    return min(
        same,
        key=lambda each: (
            abs(float(each.round) - float(point.round)),
            abs(each.images - point.images),
        ),
        default=None,
    )


def fixed_cost(point: Point, anchor: Point) -> float:
    """The fixed cost of a step with which the model gives this point's time exactly."""
    ours, theirs = point.seconds - point.all_reduce, anchor.seconds - anchor.all_reduce
    return max(0.0, Compute.of_two((point.images, ours), (anchor.images, theirs)).fixed)


def predict(point: Point, anchor: Point, fixed: float) -> float:
    """Seconds of a step."""
    compute = Compute.of_one(anchor.images, anchor.seconds - anchor.all_reduce, fixed)
    return step_seconds(compute, point.images, point.all_reduce)


def line(title: str, errors: list[float]) -> str:
    """A row of the table."""
    sizes = sorted(map(abs, errors))
    tenth = sizes[min(len(sizes) - 1, round(0.9 * (len(sizes) - 1)))]
    within = sum(size <= 0.10 for size in sizes)
    return (
        f"| {title} | {len(sizes)} | {statistics.median(sizes):.1%} | {tenth:.1%} | "
        f"{sizes[-1]:.1%} | {statistics.median(errors):+.1%} | {within} |"
    )


def main() -> None:
    """Print the errors, by submitter and size, and the worst points."""
    points = read_points()
    single = [point for point in points if point.nodes == 1]
    several = [point for point in points if point.nodes > 1]
    spent = {point.key: point for point in several if point.key in CALIBRATION}
    fixed = []
    for key in CALIBRATION:
        anchor = anchor_of(spent[key], single)
        assert anchor is not None
        fixed.append(fixed_cost(spent[key], anchor))
    found: list[tuple[Point, float]] = []
    rate_only = []
    for point in several:
        anchor = anchor_of(point, single)
        if point.key not in spent and anchor is not None:
            predicted = predict(point, anchor, fixed[point.generation])
            found.append((point, predicted / point.seconds - 1.0))
            alone = anchor.seconds / anchor.images * point.images
            rate_only.append(alone / point.seconds - 1.0)
    errors = [error for _, error in found]
    print("# The cost model against published runs\n")
    print(f"{len(points)} systems, {len(several)} of several nodes, {len(spent)} of them spent on "
          f"fixed costs; `python benchmarks/plan_check.py`\n")  # fmt: skip
    print("fixed cost of a step: " + ", ".join(
        f"{key[2]} in v{key[0]} {1e3 * cost:.1f} ms"
        for key, cost in zip(CALIBRATION, fixed, strict=True)) + "\n")  # fmt: skip
    head = "predicted / measured − 1 | points | median | 90 % below | worst | bias | within 10 %"
    print(f"| {head} |")
    print("|---|---|---|---|---|---|---|")
    print(line("**the model**", errors))
    print(line("images/s × GPUs, no costs", rate_only))
    groups: dict[str, list[float]] = {}
    for point, error in found:
        name = "NVIDIA" if "nvidia" in point.submitter.lower() else point.submitter
        groups.setdefault(name, []).append(error)
    for name in sorted(groups):
        print(line(name, groups[name]))
    large = [error for point, error in found if point.nodes * point.per_node > 256]
    print(line("257 to 4,320 GPUs", large))
    print("\nWorst: " + "; ".join(
        f"{p.submitter} v{p.round}, {p.nodes} × {p.per_node} {p.gpu}, {p.images:g} images: {e:+.0%}"
        for p, e in sorted(found, key=lambda each: -abs(each[1]))[:5]))  # fmt: skip


if __name__ == "__main__":
    main()
