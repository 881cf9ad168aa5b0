#!/usr/bin/env python3
"""What a checkpoint costs training, and what going on from one costs.

    python benchmarks/checkpoint.py [--rounds 3]

Jobs of two ranks of one thread train on made-up images of 64² pixels, with a checkpoint every 10 of
40 steps, and go on from it, ``--rounds`` times.  ``stall`` is how long training stands still, the
median of all checkpoints but a run's last; beside it what it must take at least, copying the bytes
once, and what it takes where training waits for ``torch.save`` and fsync.  ``resume`` is what a
start takes longer with ``--resume`` than a fresh one: reading the file twice (for its checksum, and
for its tensors) and sending it to the other rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import print_head
from safetensors.torch import load_file

from hvd_lars.launchers.local import run_here, this_python

NETWORKS = {"ResNet-50": "resnet50", "AlexNet": "alexnet"}


def train(run: Path, network: str, steps: int) -> tuple[float, list[dict]]:
    """Train up to ``steps``; seconds from the start of the job to the first step, and events."""
    data = "{name: synthetic, image_size: 64, num_classes: 1000, num_train: 4096, num_eval: 16}"
    options = [
        f"data={data}", f"model.name={network}", f"run.dir={run}", "train.global_batch=16",
        f"train.duration={steps} steps", "schedule.warmup_duration=1 steps",
        "train.eval_every=1000 steps", "checkpoint.every=10 steps", "schedule.base_lr=0.1",
    ]  # fmt: skip
    program = this_python("-m", "hvd_lars", "train", "digits", *options, "--resume")
    begun = time.time()
    result = run_here("mpirun", 2, program, 600, {"OMP_NUM_THREADS": "1"})
    if result.returncode != 0:
        raise SystemExit(result.stdout)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [r for r in records if r["kind"] == "event" and r["unix_seconds"] >= begun]
    first = next(e for e in events if e["event"] in ("start", "resume"))
    return first["unix_seconds"] - begun, events


def seconds(work: Callable[[], object]) -> float:
    """The median of five."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def save_and_sync(state: dict, path: Path) -> None:
    """As trainers do that write nothing beside training."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Measure both networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print_head("Checkpoints", ["torch", "safetensors", "horovod"])
    print("| | size, MB | stall, s | copy once, s | torch.save + fsync, s | start, s | resume, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, network in NETWORKS.items():
        stalls, fresh, again, copies, saves = [], [], [], [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="hvd_lars-checkpoint-") as folder:
                run = Path(folder) / "run"
                begun, events = train(run, network, 40)
                fresh.append(begun)
                kept = [e for e in events if e["event"] == "checkpoint"]
                stalls += [e["stall_seconds"] for e in kept[:-1]]
                begun, events = train(run, network, 42)
                assert events[0]["event"] == "resume" and events[0]["step"] == 40
                again.append(begun)
                file = run / "checkpoints/step-00000040/state.safetensors"
                size = file.stat().st_size
                state = load_file(file)
                copies.append(seconds(lambda s=state: {n: t.clone() for n, t in s.items()}))
                path = Path(folder) / "state.pt"
                saves.append(seconds(lambda s=state, p=path: save_and_sync(s, p)))
        middle = statistics.median
        print(f"| {name} | {size / 1e6:.0f} | {middle(stalls):.3f} | {middle(copies):.3f} | "
              f"{middle(saves):.3f} | {middle(fresh):.1f} | "
              f"{middle(again) - middle(fresh):+.1f} |", flush=True)  # fmt: skip
    print("\nParallel file systems, GPUs: not run.")


if __name__ == "__main__":
    main()
