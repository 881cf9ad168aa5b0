#!/usr/bin/env python3
"""``hvd-lars plan`` against runs on this machine.

    python benchmarks/plan_runs.py [--config digits] [--measured-on 2] [--ranks 1 2 4] [-o FILE]

``bench --save`` measures the site on ``--measured-on`` ranks; then every number of ranks trains for
three epochs, and the median step of the records is set beside the plan's range.  More ranks than
cores share the cores, which the plan does not know: it says how long ranks with a core each take.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from hvd_lars.launchers.local import run_here, this_python
from hvd_lars.state.run_folder import environment_facts

LIMIT = 1800.0  # seconds


def run(ranks: int, *arguments: str) -> str:
    """Run the command on some ranks; return its output, or end with it if it failed."""
    program = this_python("-m", "hvd_lars", *arguments)
    done = run_here("mpirun", ranks, program, LIMIT, {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{shlex.join(arguments)} on {ranks} ranks:\n{done.stdout}")
    return str(done.stdout)


def measure(config: str, ranks: int, folder: Path) -> float:
    """Return the median step of a run, in seconds."""
    run(ranks, "train", config, "train.duration=3 epochs", "schedule.warmup_duration=1 epochs",
        "train.log_every=5 steps", f"run.dir={folder}")  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return statistics.median(record["step_seconds"] for record in records[1:])


def table(plan: dict[str, Any], measured: dict[int, float], cores: int) -> list[str]:
    """Return the table's lines."""
    lines = ["| ranks | planned, ms a step | measured | |", "|---|---|---|---|"]
    for each in plan["forecasts"]:
        low, high = (1e3 * bound for bound in each["step"])
        took = 1e3 * measured[each["ranks"]]
        off = took / high - 1 if took > high else took / low - 1 if took < low else 0.0
        note = f"{off:+.0%} of the nearer bound" if off else "inside"
        if each["ranks"] > cores:
            note += f"; {each['ranks']} ranks share {cores} cores"
        lines.append(f"| {each['ranks']} | {low:.1f}–{high:.1f} | {took:.1f} | {note} |")
    return lines


def main() -> None:
    """Measure, plan, run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--measured-on", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = str(folder / "site.json")
        run(options.measured_on, "bench", options.config, "--save", site)
        ranks = ",".join(map(str, options.ranks))
        planned = run(1, "plan", options.config, "--from", site, "--ranks", ranks, "--json")
        plan = json.loads(planned[planned.index("{") :])
        measured = {n: measure(options.config, n, folder / str(n)) for n in options.ranks}
    facts = environment_facts()
    text = "\n".join(
        [
            f"# Plan and runs: {options.config}\n",
            f"{facts['processor']}, {facts['cores']} cores, torch {facts['versions']['torch']}, "
            f"commit `{facts['commit']}`; the site was measured on {options.measured_on} ranks.",
            f"`python {shlex.join(sys.argv)}`\n",
            *table(plan, measured, cores),
        ]
    )
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
