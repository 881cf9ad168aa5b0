"""Measure a site: two micro-batches, the input alone, and all-reduces by size."""

from __future__ import annotations

import gc
import os
import statistics
import time

import torch

from hvd_lars.assemble.bench import bench, mean_over_ranks
from hvd_lars.assemble.dataset import build_source
from hvd_lars.comm.base import Communicator
from hvd_lars.config.schema import Config
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.launchers.environment import Launch
from hvd_lars.planning.site import Site
from hvd_lars.runtime.device import choose_device
from hvd_lars.state.run_folder import environment_facts
from hvd_lars.train.feed import Feed

_SIZES = (4_000, 64_000, 1_000_000, 4_000_000, 25_000_000, 100_000_000)  # bytes
_REPEATS = 9
_INPUT_SECONDS = 3.0


def measure_site(
    name: str, config: Config, comm: Communicator, launch: Launch, windows: int, steps: int
) -> Site:
    """Return the measurements, the same on every rank; collective.

    Raises:
        UserError: on every rank alike: the config cannot be run.
    """
    block = 2 if config.data.mixes_pairs else 1
    large = config.train.micro_batch
    sizes = sorted({large, max(block, large // 4 // block * block)})
    if len(sizes) == 1:
        sizes.append(4 * large)
    compute, parameters = [], 0
    for size in sizes:
        train = config.train.model_copy(update={"micro_batch": size})
        found = bench(config.with_section("train", train), comm, launch, windows, steps, 1)
        waiting = found.part_seconds["communication"] + found.part_seconds["data"]
        compute.append((float(size), found.step_seconds - waiting))
        parameters = found.parameters
        gc.collect()  # as in the trials of choices.py
    device = choose_device(comm.local_rank)
    local = launch.local_size or _ranks_per_node(comm)
    return Site(
        config=name,
        ranks=comm.size,
        ranks_per_node=local,
        parameters=parameters,
        compute=(compute[0], compute[1]),
        all_reduce=_all_reduces(comm, device) if comm.size > 1 else (),
        input_rate=_input_rate(config, comm, device),
        input_cores=len(os.sched_getaffinity(0)) / local,
        environment=environment_facts(),
    )


def _ranks_per_node(comm: Communicator) -> int:
    """Return the ranks of the fullest node, if they are spread evenly."""
    nodes = torch.tensor(int(comm.local_rank == 0))
    comm.start_all_reduce_sum(nodes, "nodes").wait()
    return -(-comm.size // max(1, int(nodes)))


def _all_reduces(comm: Communicator, device: torch.device) -> tuple[tuple[float, float], ...]:
    """Return (bytes, median seconds) of float32 sums, never falling with the size."""
    curve: list[tuple[float, float]] = []
    for size in _SIZES:
        tensor = torch.zeros(size // 4, device=device)
        taken = []
        for _ in range(_REPEATS):
            comm.barrier()
            started = time.perf_counter()
            comm.start_all_reduce_sum(tensor, "site_curve").wait()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        seconds = mean_over_ranks(statistics.median(taken), comm)
        curve.append((float(size), max(seconds, curve[-1][1] if curve else 0.0)))
    return tuple(curve)


def _input_rate(config: Config, comm: Communicator, device: torch.device) -> float | None:
    """Return images a second that a rank prepares, all ranks at once; None without the data."""
    location = config.data.location
    if location is not None and not location.exists():
        return None
    source = build_source(config, comm, device)
    micro_batch = min(config.train.micro_batch, source.num_train // comm.size)
    batches = GlobalBatches(
        source.num_train, micro_batch * comm.size, config.run.seed, pairs=config.data.mixes_pairs
    )
    feed = Feed(source, batches, comm, device, micro_batch, 10**9, config.data.num_workers)
    stream = feed.from_step(0)
    for _ in range(1 + 2 * config.data.num_workers):  # what was made ahead while workers started
        next(stream)
    comm.barrier()
    started, images = time.perf_counter(), 0
    while time.perf_counter() - started < _INPUT_SECONDS:
        request, (pixels, labels) = next(stream)
        if len(labels):
            source.on_device(pixels, labels, request)
        images += len(labels)
    rate = images / (time.perf_counter() - started)
    stream.close()  # type: ignore[attr-defined]
    return mean_over_ranks(rate, comm)
