"""Resolve the ``auto`` settings of a config by measurements before training.

A run keeps the choices in its ``config.yaml``, as others would change its bits.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

from hvd_lars.assemble.placing import place
from hvd_lars.comm.base import Communicator
from hvd_lars.config.schema import Config
from hvd_lars.optim import Placement
from hvd_lars.optim.protocol import Optimizer
from hvd_lars.runtime.terminal import tell

_TRIALS = 5
_BUCKETS = (1.0, 5.0, 25.0, 100.0)  # MiB


def settle(
    config: Config,
    model: nn.Module,
    num_classes: int,
    comm: Communicator,
    device: torch.device,
) -> Config:
    """Return the config with kernel, bucket size and placement chosen; collective.

    Rank 0 prints the measurements.

    Raises:
        UserError: on every rank alike: some rank does not have the requested kernel.
    """
    config = config.with_section("optimizer", config.optimizer.resolved(device, comm))
    if config.comm.bucket_mb == "auto":
        step = _Trial(model, num_classes, config, comm, device)
        found = {f"{mb:g}": step.milliseconds(bucket_mb=mb) for mb in _BUCKETS}
        config = config.with_values(
            "comm", bucket_mb=float(_fastest("comm.bucket_mb", found, comm))
        )
    if config.optimizer.placement == "auto":
        placement = "replicated"
        if comm.size > 1 and config.comm.compression == "none":
            step = _Trial(model, num_classes, config, comm, device)
            found = {kind: step.milliseconds(kind) for kind in ("replicated", "sharded")}
            placement = _fastest("optimizer.placement", found, comm)
        elif comm.rank == 0:
            why = "there is one rank" if comm.size == 1 else "gradients are compressed"
            tell(f"optimizer.placement auto: replicated, as {why}")
        config = config.with_values("optimizer", placement=placement)
    return config


class _Trial:
    """Training steps of a copy of the model on made-up images."""

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        config: Config,
        comm: Communicator,
        device: torch.device,
    ) -> None:
        self._model, self._config, self._comm = model, config, comm
        batch = config.train.micro_batch
        self._images = torch.zeros(batch, *config.data.shapes[0], device=device)
        self._labels = torch.arange(batch, device=device) % num_classes

    def milliseconds(self, kind: str = "replicated", bucket_mb: float | None = None) -> float:
        """Return the median step time, averaged over the ranks and equal on all of them."""
        config = self._config.with_values("optimizer", placement=kind)
        if bucket_mb is not None:
            config = config.with_values("comm", bucket_mb=bucket_mb)
        model = copy.deepcopy(self._model).train()
        placement = place(model, self._comm, config.optimizer, config.comm)
        optimizer = config.optimizer.build(model, 0.0, placement)
        taken = [self._seconds(model, optimizer, placement) for _ in range(_TRIALS + 2)]
        del model, placement, optimizer
        gc.collect()  # a placement is part of a reference cycle, which keeps the device's memory
        total = torch.tensor(statistics.median(taken[2:]) * 1e3, dtype=torch.float64)
        self._comm.start_all_reduce_sum(total, "step_milliseconds").wait()
        return total.item() / self._comm.size

    def _seconds(self, model: nn.Module, optimizer: Optimizer, placement: Placement) -> float:
        self._comm.barrier()
        started = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(model(self._images), self._labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if self._images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def _fastest(key: str, found: dict[str, float], comm: Communicator) -> str:
    best = min(found, key=lambda name: found[name])
    if comm.rank == 0:
        told = ", ".join(f"{name} {took:.1f} ms" for name, took in found.items())
        tell(f"{key} auto: {best}; step time: {told} (medians of {_TRIALS})")
    return best
