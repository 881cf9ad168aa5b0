"""This rank's device and CPU threads."""

from __future__ import annotations

import os

import torch

from hvd_lars.launchers.environment import Launch
from hvd_lars.runtime.allocator import keep_freed_memory


def choose_device(local_rank: int) -> torch.device:
    """Return this rank's GPU, or the CPU; if a launcher shows each rank one GPU, that is GPU 0."""
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of ``device``; ``torch.manual_seed`` visits every one."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)  # the current device's


def set_threads(wanted: int | None, launch: Launch) -> int:
    """Set and return this rank's CPU threads: ``wanted``, OMP_NUM_THREADS, or its share of cores.

    Ranks that share cores wait for each other's threads in every small operation, so a rank takes
    one thread if the number of ranks on its machine is unknown.
    """
    if wanted is None and "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    share = len(os.sched_getaffinity(0)) // launch.local_size if launch.local_size else 1
    if launch.threads is not None:  # the affinity is already that of one task
        share = launch.threads
    threads = wanted or max(1, share)
    torch.set_num_threads(threads)
    return threads
