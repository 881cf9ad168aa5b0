#!/usr/bin/env python3
"""``tune`` against a grid by hand: which rate does each find, for how many epochs?

    horovodrun -np 2 python benchmarks/tune_against_grid.py [--folder DIR] [-o FILE]

LARS on digits at B = 1,024.  The grid trains every one of seven rates to the end; ``tune`` tries as
many, by its defaults: in runs half as long, with four seeds of its own.  Both see the same held-out
part of the training images.  Then each one's rate is run with five other seeds on all training
images and tested.  A stopped job continues by the same command.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from large_batch import CASES, FIRST_HELD_OUT, Bench, quiet

from hvd_lars.comm import connect
from hvd_lars.state.run_folder import environment_facts

BATCH, TRIALS, SEEDS = 1024, 7, 5
RATES = [4.0, 8.0, 16.0, 24.0, 32.0, 40.0, 56.0]
SEARCHES: dict[str, dict[str, Any]] = {
    "grid": {"sampler": "grid", "pruning": "none", "duration": "20 epochs",
             "space": {"schedule.base_lr": {"choices": RATES}}},
} | {
    f"tune, sampler seed {seed}": {
        "trials": TRIALS, "sampler_seed": seed, "space": {"schedule.base_lr": {"log": [2.0, 64.0]}}
    }
    for seed in range(4)
}  # fmt: skip


def main() -> None:
    """Run both searches and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/tune_against_grid"))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    options.epochs, options.root, options.full = CASES["digits"].epochs, None, False
    options.trials, options.seeds, options.search_seeds = TRIALS, SEEDS, 1
    comm = connect()
    facts = environment_facts()
    lines = [
        "# tune against a grid\n",
        f"LARS on digits at B = {BATCH:,}, {options.epochs} epochs; {facts['processor']}, "
        f"{facts['cores']} cores, {comm.size} ranks on {comm.backend}, commit `{facts['commit']}`",
        f"`horovodrun -np {comm.size} python {shlex.join(sys.argv)}`\n",
        "| search | trials | epochs trained | γ found | test accuracy, % |",
        "|---|---|---|---|---|",
    ]
    with quiet():
        for name, search in SEARCHES.items():
            bench = Bench(
                comm, CASES["digits"], options.folder / name.replace(", sampler seed ", ""), options
            )
            values, trials = bench.search(BATCH, "LARS", search)
            seeds = range(FIRST_HELD_OUT, FIRST_HELD_OUT + SEEDS)
            top1 = [bench.held_out(BATCH, "LARS", values, seed) for seed in seeds]
            epochs = sum(trial["evaluations"] for trial in trials)
            lines.append(
                f"| {name} | {len(trials)} | {epochs} | {values['schedule.base_lr']:.3g} | "
                f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} |"
            )
    if comm.rank == 0:
        text = "\n".join(lines)
        print(text, flush=True)
        if options.output is not None:
            options.output.write_text(text + "\n")
    comm.close()


if __name__ == "__main__":
    main()
