#!/usr/bin/env python3
"""A training step over ranks: hvd_lars against DDP and against Horovod's own optimizer.

    python benchmarks/train_step.py [--ranks 2] [--rounds 3] [--networks digits …]

Every contestant is a job of its own under mpirun, one thread a rank (one GPU where there is one),
as a user would run it; the jobs take turns, ``--rounds`` times.  A job takes whole steps
(zero_grad, forward, backward with its communication, optimizer step) and reports its median, the
slowest rank's.  The medians over the rounds are given, and in parentheses the exposed
communication: what the same loop takes longer than without any.

* ``hvd_lars, horovod`` and ``, mpi``: LARS with a Replicated or a Sharded placement, as the trainer
  has them;
* ``DDP + timm Lars``: torch's DistributedDataParallel on Gloo (NCCL on GPUs), bucket views;
* ``Horovod + timm Lars``: ``hvd.DistributedOptimizer`` as Horovod's PyTorch example has it; and
  with the two settings that hvd_lars makes: MPI gives its core away while it waits, and the C
  library keeps freed memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import print_head
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import get_model

from hvd_lars import LARS, parameter_groups
from hvd_lars.comm.base import Communicator
from hvd_lars.comm.horovod import HorovodCommunicator
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.comm.mpi import MpiCommunicator
from hvd_lars.launchers.local import run_here, this_python
from hvd_lars.models import build_model
from hvd_lars.optim import Replicated, Sharded
from hvd_lars.runtime.allocator import keep_freed_memory

Step = Callable[[], None]
# network: batch a rank, channels, side, classes, steps a job
NETWORKS = {
    "ResNet-50 at 64²": (8, 3, 64, 1000, 8),
    "AlexNet at 224²": (8, 3, 224, 1000, 6),
    "digits": (512, 1, 8, 10, 60),
}


def make_model(name: str) -> nn.Module:
    """The network of a row, the same weights every time."""
    torch.manual_seed(0)
    if name == "digits":
        return build_model("digits_alexnet", 10)
    return get_model("resnet50" if name.startswith("ResNet") else "alexnet")


def our_step(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, comm: Communicator, kind: type
) -> Step:
    """As hvd_lars.train.trainer takes it."""
    placement = kind(model.parameters(), comm, early_norms=True)
    groups = parameter_groups(model, 1e-4)
    optimizer = LARS(groups, lr=1e-3, trust_coefficient=0.001, placement=placement)

    def step() -> None:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels, reduction="sum")
        (loss / (len(labels) * comm.size)).backward()
        optimizer.step()

    return step


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> Step:
    """The usual loop around somebody's model and optimizer."""

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def timm_lars(model: nn.Module) -> torch.optim.Optimizer:
    """What a user would pick beside DDP or Horovod."""
    import timm.optim

    return timm.optim.Lars(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


CONTESTANTS = [
    "no communication, timm Lars",
    "no communication, hvd_lars",
    "hvd_lars, horovod, replicated",
    "hvd_lars, horovod, sharded",
    "hvd_lars, mpi, replicated",
    "hvd_lars, mpi, sharded",
    "DDP + timm Lars",
    "Horovod + timm Lars",
    "Horovod + timm Lars, set as hvd_lars",
]


def start(who: str, name: str) -> tuple[Step, Communicator]:
    """A contestant's step on this rank, and what its ranks meet through."""
    # Horovod only where it is measured: its thread takes time from the rank's own.
    uses_horovod = "orovod" in who.removesuffix("set as hvd_lars")
    if who == "Horovod + timm Lars":  # as Horovod's example runs: MPI polls without pause
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "0")
    comm: Communicator = (
        HorovodCommunicator(mpi_parts="sharded" in who) if uses_horovod else MpiCommunicator()
    )
    device = torch.device("cpu")
    if "hvd_lars" in who:
        keep_freed_memory()
    if torch.cuda.is_available():
        device = torch.device("cuda", comm.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    batch, channels, side, classes, _ = NETWORKS[name]
    images = torch.randn(batch, channels, side, side, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    model: nn.Module = make_model(name).to(device).train()
    if who.startswith(("hvd_lars", "no communication, hvd_lars")):
        ranks = LocalCommunicator() if who.startswith("no ") else comm
        kind = Sharded if "sharded" in who else Replicated
        return our_step(model, images, labels, ranks, kind), comm
    if who.startswith("DDP"):
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29517")
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", rank=comm.rank, world_size=comm.size
        )
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, ids, gradient_as_bucket_view=True)
    optimizer = timm_lars(model)
    if who.startswith("Horovod"):
        import horovod.torch as hvd

        named = model.named_parameters()
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=named)
    return plain_step(model, optimizer, images, labels), comm


def work(who: str, name: str) -> None:
    """One job: rank 0 prints the median milliseconds of the slowest rank's steps."""
    torch.set_num_threads(1)
    step, comm = start(who, name)
    turns, times = NETWORKS[name][4], []
    for i in range(turns + 2):
        comm.barrier()
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken = torch.zeros(comm.size, dtype=torch.float64)
        taken[comm.rank] = (time.perf_counter() - started) * 1e3
        comm.start_all_reduce_sum(taken, "taken").wait()
        if i > 1:
            times.append(taken.max().item())
    if comm.rank == 0:
        print(f"MEDIAN {statistics.median(times)}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    comm.close()


def measure(name: str, ranks: int, rounds: int) -> dict[str, float]:
    """Median milliseconds a step by contestant, jobs interleaved."""
    times: dict[str, list[float]] = {who: [] for who in CONTESTANTS}
    for i in range(rounds):
        for who in CONTESTANTS if i % 2 == 0 else reversed(CONTESTANTS):
            if torch.cuda.is_available() and ", mpi" in who:
                continue  # it stages GPU tensors through host memory
            program = this_python(str(Path(__file__)), "--worker", who, "--networks", name)
            result = run_here("mpirun", ranks, program, 600, {"OMP_NUM_THREADS": "1"})
            found = re.search(r"MEDIAN ([0-9.]+)", result.stdout)
            if found is None:
                raise SystemExit(f"{who} on {name} failed:\n{result.stdout}")
            times[who].append(float(found.group(1)))
    return {who: statistics.median(found) for who, found in times.items() if found}


def table(results: dict[str, dict[str, float]]) -> str:
    """Milliseconds, exposed communication, and the ratios that are claimed."""
    names = list(results)
    lines = ["| ms a step (exposed communication) | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for who in results[names[0]]:
        base = "no communication, " + ("hvd_lars" if "hvd_lars" in who else "timm Lars")
        cells = []
        for found in results.values():
            extra = "" if who.startswith("no ") else f" ({found[who] - found[base]:+.1f})"
            cells.append(f"{found[who]:.1f}{extra}")
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    for peer in CONTESTANTS[-3:]:
        for who in (w for w in results[names[0]] if w.startswith("hvd_lars")):
            cells = [f"{found[peer] / found[who]:.2f}" for found in results.values()]
            lines.append(f"| {peer} / {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Start the jobs in turn and print the table; or be one rank of a job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--json", type=Path, help="also write the medians there")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.networks[0])
        return
    print_head("A training step over ranks", ["torch", "timm", "horovod"])
    results = {n: measure(n, arguments.ranks, arguments.rounds) for n in arguments.networks}
    where = "1 GPU" if torch.cuda.is_available() else "1 thread, CPU"
    print(f"\n{arguments.ranks} ranks × {where}, medians of {arguments.rounds} rounds of jobs\n")
    print(table(results))
    if not torch.cuda.is_available():
        print("\nGPU: not run (there is none here)")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
