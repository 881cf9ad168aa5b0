#!/usr/bin/env python3
"""Digits at B = 32 and B = 1024: does LARS keep the accuracy that SGD loses?

    horovodrun -np 2 python benchmarks/large_batch.py [--seeds 5]

Trains the three bundled digits configs, SGD at 1024 over a grid of rates, on seeds that no rate
was chosen with, and prints mean and standard deviation of the final test accuracy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile

from hvd_lars.assemble import build_trainer
from hvd_lars.comm import Communicator, connect, detect_launch
from hvd_lars.config_file import load_config
from hvd_lars.run_folder import environment_facts

FIRST_SEED = 101  # rates were chosen with seeds 0 to 12

CASES = [
    ("SGD, B = 32", "digits-sgd-b32", [0.02, 0.04]),
    ("SGD, B = 1024", "digits-sgd-b1024", [0.01, 0.02, 0.03, 0.05, 0.12]),
    ("SGD, B = 1024, linear scaling", "digits-sgd-b1024", [0.64]),
    ("LARS, B = 1024", "digits", [16.0, 24.0, 32.0, 40.0]),
]


def accuracy(comm: Communicator, name: str, rate: float, seed: int, folder: str) -> float:
    """Final top-1 of one run, in percent."""
    overrides = [f"schedule.base_lr={rate}", f"run.seed={seed}", "train.eval_every=20 epochs"]
    overrides += [f"run.dir={folder}/{name}-{rate}-{seed}", "checkpoint.every=20 epochs"]
    trainer, _ = build_trainer(load_config(name, overrides), comm, detect_launch(os.environ))
    trainer.sinks = []
    return 100.0 * trainer.run().evaluation.top1


def main() -> None:
    """Train every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(FIRST_SEED, FIRST_SEED + parser.parse_args().seeds)
    comm = connect()
    facts = environment_facts()
    say = print if comm.rank == 0 else lambda *_, **__: None
    say(f"{facts['processor']}, {facts['cores']} cores, {comm.size} ranks on {comm.backend}")
    say(f"{facts['versions']}\ncommand: {' '.join(sys.argv)}; seeds {seeds[0]} to {seeds[-1]}\n")
    say("| run | rate γ | test accuracy, % |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as mine:
        folder = comm.broadcast_object(mine)
        for title, name, rates in CASES:
            for rate in rates:
                found = [accuracy(comm, name, rate, seed, folder) for seed in seeds]
                mean, spread = statistics.mean(found), statistics.stdev(found)
                say(f"| {title} | {rate:g} | {mean:.2f} ± {spread:.2f} |", flush=True)
        comm.barrier()
    comm.close()


if __name__ == "__main__":
    main()
