#!/usr/bin/env python3
"""What a step costs beside forward and backward on 1, 2 and 4 ranks, and a rank's memory.

    pip install -e '.[bench]' && python benchmarks/scaling.py [--ranks 1 2 4] [--rounds 3]

Every contestant is a job of its own under mpirun, one thread a rank, jobs in turn.  With more ranks
than cores a clock on the wall would measure the waiting for a core, so costs are processor time of
a rank, all its threads, a step:

* ``beside``: of whole steps, less that of forward and backward alone in the same process;
* ``optimizer``: of the thread that calls ``optimizer.step()``, in that call;
* ``momentum``: bytes of it a rank holds;
* ``memory``: the rank's peak resident memory above what it was before the network was made.

hvd_lars is on Horovod, Sharded with mpi4py beside it.  The peers are DDP, DDP with torch's
ZeroRedundancyOptimizer, and FSDP2, each with timm's Lars on Gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import print_head
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import get_model

from hvd_lars import LARS, parameter_groups
from hvd_lars.comm.base import Communicator
from hvd_lars.comm.horovod import HorovodCommunicator
from hvd_lars.comm.mpi import MpiCommunicator
from hvd_lars.launchers.local import run_here, this_python
from hvd_lars.optim import Replicated, Sharded

NETWORKS = {"ResNet-50": ("resnet50", 64), "AlexNet": ("alexnet", 64)}
BATCH, STEPS = 4, 8
CONTESTANTS = [
    "hvd_lars, replicated",
    "hvd_lars, sharded",
    "DDP + timm Lars",
    "DDP + ZeroRedundancyOptimizer(timm Lars)",
    "FSDP2 + timm Lars",
]


def peak_memory() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start(
    who: str, model: nn.Module, comm: Communicator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A contestant's model and optimizer."""
    if who.startswith("hvd_lars"):
        kind = Sharded if "sharded" in who else Replicated
        placement = kind(model.parameters(), comm, early_norms=True)
        groups = parameter_groups(model, 1e-4)
        return model, LARS(groups, lr=1e-3, trust_coefficient=0.001, placement=placement)
    import timm.optim

    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29518")
    torch.distributed.init_process_group("gloo", rank=comm.rank, world_size=comm.size)
    if who.startswith("FSDP2"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (comm.size,))
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, timm.optim.Lars(model.parameters(), **options)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if "Zero" in who:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return wrapped, ZeroRedundancyOptimizer(model.parameters(), timm.optim.Lars, **options)
    return wrapped, timm.optim.Lars(model.parameters(), **options)


def momentum_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the momentum that this rank holds."""
    inner = getattr(optimizer, "optim", optimizer)
    total = 0
    for state in inner.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                local = value.to_local() if hasattr(value, "to_local") else value
                total += local.numel() * local.element_size()
    return total


def work(who: str, network: str) -> None:
    """One job: rank 0 prints what the costliest rank needed."""
    torch.set_num_threads(1)
    comm: Communicator
    if who.startswith("hvd_lars"):
        comm = HorovodCommunicator(mpi_parts="sharded" in who)
    else:
        comm = MpiCommunicator()
    before = peak_memory()
    name, side = NETWORKS[network]
    torch.manual_seed(0)
    model = get_model(name).train()
    images = torch.randn(BATCH, 3, side, side)
    labels = torch.randint(1000, (BATCH,))

    def forward_and_backward(network: nn.Module) -> None:
        functional.cross_entropy(network(images), labels).backward()

    plain: list[float] = []
    for _ in range(STEPS):
        model.zero_grad()
        begun = time.process_time()
        forward_and_backward(model)
        plain.append(time.process_time() - begun)
    model.zero_grad()
    network_on_ranks, optimizer = start(who, model, comm)
    whole: list[float] = []
    updates: list[float] = []
    for _ in range(STEPS + 2):
        comm.barrier()
        begun = time.process_time()
        optimizer.zero_grad()
        forward_and_backward(network_on_ranks)
        update = time.thread_time()
        optimizer.step()
        updates.append(time.thread_time() - update)
        whole.append(time.process_time() - begun)
    found = torch.zeros(comm.size, 4, dtype=torch.float64)
    beside = statistics.median(whole[2:]) - statistics.median(plain[2:])
    memory, momentum = peak_memory() - before, momentum_bytes(optimizer)
    mine = [beside * 1e3, statistics.median(updates[2:]) * 1e3, momentum / 1e6, memory / 1e6]
    found[comm.rank] = torch.tensor(mine, dtype=torch.float64)
    comm.start_all_reduce_sum(found, "found").wait()
    if comm.rank == 0:
        print(f"FOUND {json.dumps(found.amax(0).tolist())}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    comm.close()


def measure(network: str, sizes: list[int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """By contestant and number of ranks: beside, optimizer (ms), momentum, memory (MB)."""
    results: dict[str, dict[int, list[list[float]]]] = {
        who: {size: [] for size in sizes} for who in CONTESTANTS
    }
    for _ in range(rounds):
        for size in sizes:
            for who in CONTESTANTS:
                program = this_python(str(Path(__file__)), "--worker", who, "--networks", network)
                result = run_here("mpirun", size, program, 600, {"OMP_NUM_THREADS": "1"})
                line = re.search(r"FOUND (\[.*\])", result.stdout)
                if line is None:
                    raise SystemExit(f"{who} on {network} failed:\n{result.stdout}")
                results[who][size].append(json.loads(line.group(1)))
    return {
        who: {
            size: [statistics.median(v) for v in zip(*runs, strict=True)]
            for size, runs in by_size.items()
        }
        for who, by_size in results.items()
    }


def table(found: dict[str, dict[int, list[float]]], sizes: list[int]) -> str:
    """A row a contestant, columns of the four figures by ranks."""
    figures = ["beside, ms", "optimizer, ms", "momentum, MB", "memory, MB"]
    columns = [f"{figure}: {size}" for figure in figures for size in sizes]
    lines = ["| by ranks | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    rate: Callable[[float], str] = lambda value: f"{value:.1f}" if value < 100 else f"{value:.0f}"  # noqa: E731
    for who, by_size in found.items():
        cells = [rate(by_size[size][i]) for i in range(len(figures)) for size in sizes]
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Start the jobs in turn and print a table a network; or be one rank of a job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.networks[0])
        return
    print_head("Cost of a step beside forward and backward, by ranks", ["torch", "timm", "horovod"])
    print(f"Medians of {arguments.rounds} rounds of jobs of {STEPS} steps.  "
          "GPU and several nodes: not run.")  # fmt: skip
    for network in arguments.networks:
        print(f"\n## {network} at 64², {BATCH} images a rank\n")
        print(table(measure(network, arguments.ranks, arguments.rounds), arguments.ranks))
        print(flush=True)


if __name__ == "__main__":
    main()
