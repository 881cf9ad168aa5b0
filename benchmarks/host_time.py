#!/usr/bin/env python3
"""How long the host is busy in a training step on a GPU, beside forward and backward.

    python benchmarks/host_time.py [--steps 300] [-o FILE]

On a GPU the host only queues work: while it is quicker than the device, a step costs nothing of
it.  This measures the host alone, without a GPU: the network has ResNet-50's 161 parameters and 159
buffers, but with 64 elements each, so that an operation on the CPU costs about what queueing it
costs; launches of our Triton kernels, copies of many tensors in
one launch, and the collectives are empty.

A step's time is split by who spends it: forward and backward (torch's own), the hooks that
backward calls for each gradient, ``LARS.step``, and the rest of ``Trainer.train_step``.  The
operations of torch in ``LARS.step``, views too, are counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.data.source import Request
from hvd_lars.data.synthetic import Synthetic
from hvd_lars.optim import LARS, Replicated, Sharded, device_step, parameter_groups
from hvd_lars.optim.distributed.buckets import GradientBuckets
from hvd_lars.optim.kernels import gpu
from hvd_lars.state.run_folder import environment_facts
from hvd_lars.state.run_state import RunState
from hvd_lars.train import trainer as trainer_module
from hvd_lars.train.feed import Feed
from hvd_lars.train.trainer import StepOptions, Trainer

BATCH = 64


class Launch:
    """In place of a Triton kernel: its launch does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


class Sent:
    """In place of the copy of a step's outcome to the host."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = [1.0] * len(values)

    def read(self) -> list[float]:
        """Return ones."""
        return self._values


class Timed:
    """Sums the time of a function's calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function."""
        begun = time.perf_counter()
        try:
            return self.function(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - begun


def kernel() -> gpu.GpuKernel:
    """The GPU's kernel, whose launches are empty."""
    made = gpu.GpuKernel()
    names = ("tl", "CHUNK", "FOLD")
    real = {name: getattr(made._triton, name) for name in names}
    made._triton = mock.Mock(**real, sums_kernel=Launch(), update_kernel=Launch())
    return made


class Network(nn.Module):
    """The parameters and buffers of another network, made small; its logits are their sums."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        for number, param in enumerate(like.parameters()):
            shape = (8, 8) if param.dim() > 1 else (64,)
            self.register_parameter(f"p{number}", nn.Parameter(torch.ones(shape)))
        for number, buffer in enumerate(like.buffers()):
            small = torch.zeros(64 if buffer.dim() else (), dtype=buffer.dtype)
            self.register_buffer(f"b{number}", small)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (n, 2)."""
        total = torch.stack([param.sum() for param in self.parameters()]).sum()
        return (images + total).expand(-1, 2)


def make_trainer(network: nn.Module, placed: Any, precision: str) -> Trainer:
    """Return a trainer of one rank."""
    comm = LocalCommunicator()
    placement = placed(network.parameters(), comm, early_norms=True, root=None)
    optimizer = LARS(parameter_groups(network, 5e-5, adapt="weights"), placement=placement)
    source = Synthetic(1000, 1000, 2, 1, 1, 0)
    device = torch.device("cpu")
    feed = Feed(source, GlobalBatches(1000, BATCH, seed=0), comm, device, BATCH, 10_000)
    options = StepOptions(0, 0.1, precision, read_late=True)
    return Trainer(
        RunState(network, optimizer), placement, feed, lambda step: 1.0 + step, comm, options
    )


def batches() -> Iterator[tuple[Request, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield the same micro-batch for ever; loading is another benchmark's subject."""
    images, labels = torch.zeros(BATCH, 1), torch.zeros(BATCH, dtype=torch.int64)
    for step in range(10**9):
        yield Request(0, np.arange(BATCH), step=step, last=True), (images, labels)


class Counted(TorchDispatchMode):
    """Counts operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None):  # type: ignore[no-untyped-def]
        """Run an operation."""
        self.operations += function.namespace == "aten"  # not the profiler's
        return function(*given, **(named or {}))


def operations(trainer: Trainer) -> int:
    """Return how many operations ``LARS.step`` queues in a step."""
    step, counted = trainer.optimizer.step, Counted()

    def watched(*arguments: Any, **options: Any) -> None:
        with counted:
            step(*arguments, **options)

    with mock.patch.object(trainer.optimizer, "step", watched):
        trainer.train_step(batches())
    return counted.operations


def measure(trainer: Trainer, steps: int) -> dict[str, float]:
    """Return the parts of a quick step in milliseconds: each one's fastest tenth."""
    rows: list[dict[str, float]] = []
    hook, step = Timed(GradientBuckets._on_gradient), Timed(trainer.optimizer.step)

    def on_gradient(buckets: GradientBuckets, *arguments: Any) -> None:
        hook(buckets, *arguments)

    given = batches()
    with (
        mock.patch.object(GradientBuckets, "_on_gradient", on_gradient),
        mock.patch.object(trainer.optimizer, "step", step),
    ):
        for _ in range(steps):
            hook.seconds = step.seconds = 0.0
            trainer.watch.reset()
            begun = time.perf_counter()
            trainer.train_step(given)
            whole = time.perf_counter() - begun
            spent = trainer.watch.seconds
            own = spent["forward"] + spent["backward"] + spent["communication"]
            rows.append(
                {"hooks": hook.seconds, "LARS.step": step.seconds, "rest": whole - own
                 - step.seconds}
            )  # fmt: skip
            for _ in trainer.outcomes():
                pass
    kept = rows[steps // 3 :]  # without the steps that make tables
    return {key: 1e3 * statistics.quantiles((row[key] for row in kept), n=10)[0] for key in rows[0]}


def main() -> None:
    """Measure ResNet-50 and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment_facts()
    lines = [
        "# Host time of a step\n",
        f"As many tensors as ResNet-50 has; {facts['processor']}, torch "
        f"{facts['versions']['torch']}, Python {facts['python']}, commit `{facts['commit']}`; ms, "
        f"the fastest tenth of {options.steps - options.steps // 3} steps; no GPU.",
        f"`python {' '.join(sys.argv)}`\n",
        "| placement, precision | hooks | LARS.step | rest of train_step | together | operations |",
        "|---|---|---|---|---|---|",
    ]
    with (
        mock.patch.object(device_step, "choose_kernel", lambda *_: stub),
        mock.patch.object(trainer_module, "Readback", Sent),
        mock.patch.object(torch, "_foreach_copy_", lambda into, given: None),  # a launch, too
        mock.patch.object(trainer_module, "autocast", lambda *_: nullcontext()),  # a CPU's is slow
    ):
        stub = kernel()
        for placed in (Replicated, Sharded):
            for precision in ("fp32", "fp16"):
                trainer = make_trainer(Network(models.resnet50()), placed, precision)
                found = measure(trainer, options.steps)
                ours = found["hooks"] + found["LARS.step"] + found["rest"]
                lines.append(
                    f"| {placed.__name__}, {precision} | {found['hooks']:.2f} | "
                    f"{found['LARS.step']:.2f} | {found['rest']:.2f} | {ours:.2f} | "
                    f"{operations(trainer)} |"
                )
    text = "\n".join(lines)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
