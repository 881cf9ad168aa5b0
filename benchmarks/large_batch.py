#!/usr/bin/env python3
"""Which method keeps the small batch's accuracy as the batch grows, at the same number of epochs?

    horovodrun -np 2 python benchmarks/large_batch.py [--data digits|glyphs] [--full]
        [--batches 256 1024] [-o FILE]

For every batch and method a rate is chosen on tuning seeds, then five seeds that no rate was
chosen with give mean and standard deviation of the final test accuracy.  SGD's grid includes the
small batch's rate times √k and times k.  The short form has small grids and one tuning seed;
``--full`` has larger ones, three tuning seeds, tunes the length of Nesterov's ramp too, runs every
method at every batch, and shows the two scaled rates on the held-out seeds as well.  Every run and
the trust ratios of one LARS run go into FILE, which benchmarks/plot_large_batch.py draws.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from hvd_lars.assemble import build_run
from hvd_lars.comm import Communicator, connect, detect_launch
from hvd_lars.config.file import load_config
from hvd_lars.state.run_folder import environment_facts

SMALL, SMALL_RATE = 32, 0.04
TUNING_SHORT, TUNING_FULL, HELD_OUT = range(1), range(3), range(101, 106)
SGD, NESTEROV = "name: sgd, adapt: weights", "name: sgd, adapt: weights, nesterov: true"
LARS = "name: lars, adapt: layer"

SHORT = {
    256: {"SGD": [0.08], "Nesterov": [0.04, 0.08], "LARS": [8.0, 16.0]},
    1024: {"SGD": [0.01, 0.02, 0.03], "Nesterov": [0.01, 0.02, 0.03], "LARS": [24.0, 32.0, 40.0]},
    4096: {"SGD": [0.05, 0.1, 0.2], "Nesterov": [0.05, 0.1, 0.2], "LARS": [8.0, 16.0, 24.0]},
}
_RATES = [0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2]
_LARS_RATES = [4.0, 8.0, 16.0, 24.0, 32.0, 40.0, 56.0]
FULL = {
    batch: {"SGD": _RATES, "Nesterov": _RATES, "LARS": _LARS_RATES}
    for batch in (32, 256, 1024, 4096)
}
OPTIMIZERS = {"SGD": SGD, "Nesterov": NESTEROV, "LARS": LARS}
Choice = tuple[float, int]
"""A rate, and the length of the ramp in epochs."""


class Bench:
    """Runs of one data set; remembers every one."""

    def __init__(self, comm: Communicator, data: str, folder: str) -> None:
        self.comm, self.data, self.folder = comm, data, folder
        self.runs: list[dict[str, object]] = []
        self.ratios: list[dict[str, float]] = []
        self.scaled: dict[tuple[int, str], tuple[float, float]] = {}  # (rate, tuning accuracy)

    def accuracy(
        self, batch: int, method: str, rate: float, ramp: int, seed: int, watch: bool = False
    ) -> float:
        """Final top-1 of one run in percent; the warmup lasts ``ramp`` epochs."""
        overrides = [
            f"optimizer={{{OPTIMIZERS[method]}, momentum: 0.9, weight_decay: 5.0e-4}}",
            f"schedule.base_lr={rate}",
            f"schedule.warmup_duration={ramp} epochs",
            f"train.global_batch={batch}",
            "train.micro_batch=512",
            "train.eval_every=20 epochs",
            "checkpoint.every=20 epochs",
            "train.max_skipped_steps=1000000",  # a rate that is too high has no other end
            f"run.seed={seed}",
            "run.console=none",
            f"run.dir={self.folder}/{len(self.runs)}",
        ]
        name = {"digits": "digits-sgd-b32", "glyphs": "glyphs-sgd-b32"}[self.data]
        launch = detect_launch(os.environ)
        loop, _ = build_run(load_config(name, overrides), self.comm, launch)
        if watch:
            self._watch(loop.trainer)
        top1 = 100.0 * loop.run().evaluation.top1
        self.runs.append(
            {
                "batch": batch,
                "method": method,
                "rate": rate,
                "ramp": ramp,
                "seed": seed,
                "top1": top1,
            }
        )
        return top1

    def _watch(self, trainer) -> None:
        """Keep λ of every weight, from the step's gradient and the weight that the step left."""
        step = trainer.train_step

        def watched(batches):
            loss = step(batches)
            for group in trainer.optimizer.param_groups:
                if group["adapt"] != "own":
                    continue
                ratios = {"step": trainer.state.progress.step - 1}
                for layer, param in zip(group["names"], group["params"], strict=True):
                    w, g = param.detach().norm().item(), param.grad.norm().item()
                    beta = group["weight_decay"]
                    ratios[layer] = group["trust_coefficient"] * w / (g + beta * w)
                self.ratios.append(ratios)
            return loss

        trainer.train_step = watched


def scaled_rates(batch: int) -> dict[str, float]:
    """The small batch's rate scaled by the square root of, and by, the growth of the batch."""
    k = batch / SMALL
    return {"sqrt": SMALL_RATE * k**0.5, "linear": SMALL_RATE * k} if k > 1 else {}


def tune(bench: Bench, batch: int, method: str, rates: list[float], full: bool) -> Choice:
    """The choice of rate and ramp that is best on the tuning seeds; remembers all of them."""
    ramps = (2, 5, 10) if full and method == "Nesterov" else (5,)
    scaled = scaled_rates(batch) if method == "SGD" else {}
    found: dict[Choice, float] = {}
    for choice in [(rate, ramp) for ramp in ramps for rate in (*rates, *scaled.values())]:
        if choice not in found:
            seeds = TUNING_FULL if full else TUNING_SHORT
            found[choice] = statistics.mean(
                bench.accuracy(batch, method, *choice, seed) for seed in seeds
            )
    for name, rate in scaled.items():
        bench.scaled[batch, name] = rate, found[rate, 5]
    return max(found, key=found.__getitem__)


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["digits", "glyphs"], default="digits")
    parser.add_argument("--full", action="store_true")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=sorted(FULL), choices=sorted(FULL)
    )
    parser.add_argument("-o", "--output", type=Path, default=None)
    options = parser.parse_args()
    full = options.full
    tuning = TUNING_FULL if full else TUNING_SHORT
    comm = connect()
    say = print if comm.rank == 0 else lambda *_, **__: None
    facts = environment_facts()
    say(f"# {options.data}, {'full' if full else 'short'} form\n")
    say(
        f"{facts['processor']}, {facts['cores']} cores, {comm.size} ranks on {comm.backend}, torch "
        f"{facts['versions']['torch']}, commit {facts['commit']}"
    )
    say(f"`horovodrun -np {comm.size} python {' '.join(sys.argv)}`\n")
    say(f"| batch | method | rate, chosen on {len(tuning)} other seeds | test accuracy, % |")
    say("|---|---|---|---|", flush=True)
    begun, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as mine:
        bench = Bench(comm, options.data, comm.broadcast_object(mine))

        def report(batch: int, method: str, choice: Choice, note: str, found: list[float]) -> None:
            spread = statistics.stdev(found) if len(found) > 1 else None
            rate, ramp = choice
            rows.append(
                {"batch": batch, "method": method, "rate": rate, "ramp": ramp, "seeds": len(found)}
                | {"mean": statistics.mean(found), "spread": spread}
            )
            shown = f"{rows[-1]['mean']:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
            say(f"| {batch} | {method} | {rate:.3g}{note} | {shown} |", flush=True)

        def held_out(batch: int, method: str, choice: Choice) -> list[float]:
            watched = HELD_OUT[0] if (batch, method) == (1024, "LARS") else None
            return [bench.accuracy(batch, method, *choice, s, s == watched) for s in HELD_OUT]

        for batch in options.batches:
            if batch == SMALL and not full:
                choice = (SMALL_RATE, 5)
                report(batch, "SGD", choice, ", not tuned", held_out(batch, "SGD", choice))
                continue
            for method, rates in (FULL if full else SHORT)[batch].items():
                choice = tune(bench, batch, method, rates, full)
                note = f", ramp {choice[1]} epochs" if choice[1] != 5 else ""
                report(batch, method, choice, note, held_out(batch, method, choice))
            for name, (rate, tuned) in bench.scaled.items():
                if name[0] == batch:
                    found = held_out(batch, "SGD", (rate, 5)) if full else [tuned]
                    note = ", scaled" + ("" if full else "; one tuning seed")
                    report(batch, name[1], (rate, 5), note, found)
        comm.barrier()
    minutes = (time.perf_counter() - begun) / 60.0
    say(
        f"\n{len(bench.runs)} runs of 20 epochs in {minutes:.1f} minutes; seeds {HELD_OUT[0]} to "
        f"{HELD_OUT[-1]} were held out."
    )
    if options.output is not None and comm.rank == 0:
        result = {
            "data": options.data,
            "full": full,
            "environment": facts,
            "minutes": minutes,
            "table": rows,
            "runs": bench.runs,
            "ratios": bench.ratios,
        }
        options.output.write_text(json.dumps(result) + "\n")
    comm.close()


if __name__ == "__main__":
    main()
