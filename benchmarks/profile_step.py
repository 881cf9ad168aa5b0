#!/usr/bin/env python3
"""Where the time of a training step goes, operation by operation.

    mpirun -np 2 python benchmarks/profile_step.py [key=value …]

ResNet-50 at 64² on made-up images, 8 a rank, one thread a rank, as ``hvd-lars train`` takes its
steps; ``key=value`` changes the config.  The first table is the split of a step by the trainer's
own clock, without the profiler; the second has the operations of rank 0 that most of the time goes
to, by torch's profiler: each one's own time, without what it calls.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from report import print_head
from torch.profiler import ProfilerActivity, profile

from hvd_lars.assemble.trainer import build_trainer
from hvd_lars.comm import connect, detect_launch
from hvd_lars.config.file import load_config
from hvd_lars.runtime.stopwatch import PARTS
from hvd_lars.state.replicas import broadcast_and_verify

STEPS, TOP = 10, 14
SETTINGS = [
    "model.name=resnet50", "data.name=synthetic", "data.num_train=4096", "data.num_eval=1",
    "data.num_classes=1000", "data.image_size=64", "data.channels=3", "train.micro_batch=8",
    "train.threads=1", "train.duration=100 steps", "schedule.warmup_duration=1 steps",
    "checkpoint.every=100 steps",
]  # fmt: skip


def main() -> None:
    """Both tables, from rank 0."""
    launch = detect_launch(os.environ)
    size = [f"train.global_batch={8 * (launch.size or 1)}"]
    config = load_config("digits", [*SETTINGS, *size, *sys.argv[1:]])
    comm = connect(config.comm.backend, parts=config.optimizer.placement != "replicated")
    built = build_trainer(config, comm, launch)
    trainer, config = built.trainer, built.config
    broadcast_and_verify(trainer.state.tensors(), comm)
    trainer.model.train()
    batches = trainer.feed.from_step(0)
    for _ in range(3):
        trainer.train_step(batches)
    comm.barrier()
    trainer.watch.reset()
    begun = time.perf_counter()
    for _ in range(STEPS):
        trainer.train_step(batches)
    seconds = time.perf_counter() - begun
    parts = {part: trainer.watch.seconds[part] / STEPS * 1e3 for part in PARTS}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            trainer.train_step(batches)
    if comm.rank == 0:
        whole = seconds / STEPS * 1e3
        print_head(f"A training step of {config.model.name}, {comm.size} ranks", ["torch"])
        print(f"| part | ms | share |\n|---|---|---|\n| step | {whole:.1f} | 100 % |")
        for part, took in (parts | {"rest": whole - sum(parts.values())}).items():
            print(f"| {part} | {took:.1f} | {took / whole:.1%} |")
        events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        print("\n| operation | ms a step | share | calls a step |\n|---|---|---|---|")
        for event in events[:TOP]:
            took = event.self_cpu_time_total / STEPS / 1e3
            share = event.self_cpu_time_total / total
            print(f"| `{event.key}` | {took:.1f} | {share:.1%} | {event.count / STEPS:.0f} |")
        if not torch.cuda.is_available():
            print("\nGPU: not run (there is none here)")
    comm.close()


if __name__ == "__main__":
    main()
