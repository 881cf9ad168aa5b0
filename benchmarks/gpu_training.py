#!/usr/bin/env python3
"""Training on one GPU: throughput against a plain loop, memory, decoding, accuracy, NCCL.

    python benchmarks/gpu_training.py throughput [--batches 16 32 64 128 256] [--modes …]

A part of benchmarks/gpu.py; every subcommand prints Markdown.  Without a GPU it runs on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import get_model

from hvd_lars import LARS, Replicated, parameter_groups
from hvd_lars.comm.base import Communicator
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.data.identity import made_identity
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.data.source import Request
from hvd_lars.state.run_state import RunState
from hvd_lars.train.cuda_graphs import GraphedNetwork
from hvd_lars.train.feed import Feed
from hvd_lars.train.precision import Precision
from hvd_lars.train.trainer import StepOptions, Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Mode:
    """How forward and backward are computed; ``sizes`` are the micro-batches, all if empty."""

    precision: Precision
    tf32: bool = True
    channels_last: bool = False
    compiled: bool = False
    graphs: bool = False
    sizes: tuple[int, ...] = ()


ALONE = (64, 2)  # 2 is of the short form on a CPU
MODES = {
    "fp32": Mode("fp32", tf32=False, sizes=ALONE),
    "tf32": Mode("fp32"),
    "bf16": Mode("bf16", sizes=ALONE),
    "fp16, channels last": Mode("fp16", channels_last=True, sizes=ALONE),
    "bf16, channels last": Mode("bf16", channels_last=True),
    "bf16, channels last, graphs": Mode("bf16", channels_last=True, graphs=True),
    "bf16, channels last, compiled": Mode(
        "bf16", channels_last=True, compiled=True, sizes=(16, 64)
    ),
}
_GRAPHS = ("false", "auto")
Step = Callable[[], object]


def settle() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Images:
    """One batch that is on the device already, so that no input is measured."""

    mixes_pairs = False

    def __init__(self, batch: int, side: int) -> None:
        self.num_train, self.num_eval, self.num_classes = 1000 * batch, 1, 1000
        self.identity = made_identity("one batch", self.num_train, 1, 1000)
        self.unreadable: list[object] = []
        self.images = torch.randn(batch, 3, side, side, device=DEVICE)
        self.labels = torch.randint(1000, (batch,), device=DEVICE)

    def on_device(self, images: Tensor, labels: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """Return them."""
        return images, labels

    def forever(self, batch: int) -> Iterator[tuple[Request, tuple[Tensor, Tensor]]]:
        """Yield the batch for one step after the other."""
        step, indices = 0, np.arange(batch)
        while True:
            yield Request(0, indices, step, True), (self.images, self.labels)
            step += 1


def our_step(network: str, batch: int, side: int, mode: str, comm: Communicator) -> Step:
    """A step of this package's trainer, with LARS."""
    how = MODES[mode]
    model = make_model(network, how.channels_last)
    placement = Replicated(model.parameters(), comm, early_norms=True)
    optimizer = LARS(parameter_groups(model, 1e-4), lr=1e-3, placement=placement)
    source = Images(batch, side)
    trainer = Trainer(
        RunState(model, optimizer),
        placement,
        Feed(source, GlobalBatches(source.num_train, batch, 0), comm, DEVICE, batch, 1000),
        lambda step: 1e-3,
        comm,
        StepOptions(0, 0.0, how.precision, how.channels_last, read_late=DEVICE.type == "cuda"),
        forward_of(model, source.images, how, placement),
    )
    batches = source.forever(batch)
    return lambda: (trainer.train_step(batches), list(trainer.outcomes()))


def plain_step(network: str, batch: int, side: int, mode: str, wrap: bool = False) -> Step:
    """A step of the usual loop, with torch's SGD; ``wrap`` adds Horovod's optimizer."""
    how = MODES[mode]
    model = make_model(network, how.channels_last)
    source = Images(batch, side)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), 1e-3, 0.9, weight_decay=1e-4
    )
    if wrap:
        import horovod.torch as hvd

        named = model.named_parameters()
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=named)
    # The usual loop has no graphs: it is what they are measured against.
    run = torch.compile(model) if how.compiled else model
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(how.precision)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=how.precision == "fp16")
    images = laid_out(source.images, how)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype) if dtype else nullcontext():
            loss = functional.cross_entropy(run(images), source.labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def laid_out(images: Tensor, how: Mode) -> Tensor:
    """The images in the mode's memory format."""
    layout = torch.channels_last if how.channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout)


def forward_of(
    model: nn.Module, images: Tensor, how: Mode, placement: Replicated
) -> Callable[[Tensor], Tensor] | None:
    """What computes the logits in our step, None for the model itself."""
    if how.graphs and DEVICE.type == "cuda":
        return GraphedNetwork(model, laid_out(images, how), how.precision, placement.gradients.take)
    return torch.compile(model) if how.compiled else None


def make_model(network: str, channels_last: bool) -> nn.Module:
    """The network in training mode, on the device."""
    torch.manual_seed(0)
    model: nn.Module = get_model(network).to(DEVICE).train()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def timed(contestants: dict[str, Step], steps: int, rounds: int = 3) -> dict[str, float]:
    """Median milliseconds a step, by contestant, in turns of ``steps`` steps without a wait."""
    times: dict[str, list[float]] = {who: [] for who in contestants}
    for step in contestants.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for who, step in contestants.items():
            settle()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            settle()
            times[who].append((time.perf_counter() - started) * 1e3 / steps)
    return {who: statistics.median(found) for who, found in times.items()}


def throughput(options: argparse.Namespace) -> None:
    """Ours against a plain loop with SGD, by micro-batch and mode."""
    print("| images | mode | hvd_lars, LARS, images/s | plain loop, SGD, images/s | ratio | "
          "ms hvd_lars | ms plain |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    fixed: dict[str, dict[int, dict[str, float]]] = {}
    for mode in options.modes:
        how = MODES[mode]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = how.tf32
        for batch in options.batches:
            if how.sizes and batch not in how.sizes:
                continue
            shape = options.network, batch, options.side, mode
            found = timed(
                {"ours": our_step(*shape, LocalCommunicator()), "plain": plain_step(*shape)},
                options.steps,
            )
            fixed.setdefault(mode, {})[batch] = found
            ours, plain = found["ours"], found["plain"]
            print(f"| {batch} | {mode} | {batch * 1e3 / ours:,.0f} | {batch * 1e3 / plain:,.0f} | "
                  f"{plain / ours:.3f} | {ours:.2f} | {plain:.2f} |", flush=True)  # fmt: skip
            torch._dynamo.reset()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    for mode, found in fixed.items():
        if len(found) > 1:
            small, large = sorted(found)[:2]
            rest = {
                who: (large * found[small][who] - small * found[large][who]) / (large - small)
                for who in ("ours", "plain")
            }
            print(f"\nfixed cost a step, {mode}, from {small} and {large} images: hvd_lars "
                  f"{rest['ours']:.2f} ms, plain loop {rest['plain']:.2f} ms")  # fmt: skip


def memory(options: argparse.Namespace) -> None:
    """The peak of a training step against what ``check`` estimates."""
    from hvd_lars.assemble.check import examine
    from hvd_lars.config.file import load_config

    print("| config | micro-batch | graphs | tensors, GB | estimated, GB | reserved, GB | ratio |")
    print("|---|---|---|---|---|---|---|")
    room = torch.cuda.get_device_properties(0).total_memory
    both = itertools.product((("resnet50-lars-b32768", 64), ("alexnet-lars-b8192", 128)), _GRAPHS)
    for (config, batch), graphs in both:
        overrides = [f"train.micro_batch={batch}", f"train.cuda_graphs={graphs}"]
        settings = load_config(config, overrides)
        found = examine(settings, 1, room)
        estimated = found.memory_total
        tensors = estimated - found.memory["libraries"] - found.memory.get("graphs", 0)
        row = f"| {config} | {batch} | {graphs} | {tensors / 1e9:.2f} | {estimated / 1e9:.2f} |"
        command = [sys.executable, "-m", "hvd_lars", "bench", config, *overrides]
        done = subprocess.run(
            [*command, "--steps", "3", "--windows", "3", "--json"], capture_output=True, text=True
        )
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1]
            print(f"{row} {why} | |")
            continue
        peak = json.loads(done.stdout[done.stdout.index("{") :])["peak_bytes"]
        print(f"{row} {peak / 1e9:.2f} | {peak / estimated:.2f} |", flush=True)


def decode(options: argparse.Namespace) -> None:
    """Images of 500×375 a second: files decoded and cropped on the device, and in one process."""
    import simplejpeg

    from hvd_lars.data.augment import Augment
    from hvd_lars.data.crops import NUM_DRAWS, training_crop
    from hvd_lars.data.decoding import Picture
    from hvd_lars.data.encoded import decode as decode_on
    from hvd_lars.data.encoded import encode, why_not_on

    if problem := why_not_on(DEVICE):
        raise SystemExit(f"{DEVICE}: {problem}")
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (64, 3, 24, 32), dtype=np.uint8)
    smooth = functional.interpolate(torch.from_numpy(coarse).float(), (375, 500), mode="bicubic")
    noisy = (smooth + torch.randn(smooth.shape) * 8).clamp(0, 255).byte()
    files = [simplejpeg.encode_jpeg(i.permute(1, 2, 0).contiguous().numpy(), 90) for i in noisy]
    draws = draw.random((len(files), NUM_DRAWS)).tolist()
    crop = training_crop(Augment(), 224, 256)

    def on_device() -> Tensor:
        pictures = decode_on(encode([Picture(file, "") for file in files]), DEVICE)
        return torch.stack([crop(p, row) for p, row in zip(pictures, draws, strict=True) if p])

    def in_process() -> Tensor:
        pictures = [Picture(file, "") for file in files]
        return torch.stack([crop(p, row) for p, row in zip(pictures, draws, strict=True)])

    off = (on_device().cpu().int() - in_process().int()).abs().float().mean().item()
    found = timed({"device": on_device, "process": in_process}, options.steps)
    print("| crops of 224 from 500×375 | images/s |\n|---|---|")
    print(f"| decoded on {DEVICE.type} | {len(files) * 1e3 / found['device']:,.0f} |")
    print(f"| decoded by one process | {len(files) * 1e3 / found['process']:,.0f} |")
    print(f"\nmean difference of pixels: {off:.2f} of 255")


def train(*arguments: str, environment: dict[str, str]) -> dict[str, float]:
    """Train and return the last evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hvd_lars", "train", *arguments, f"run.dir={folder}/run"]
        variables = os.environ | environment
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        if done.returncode:
            raise SystemExit((done.stdout + done.stderr)[-2000:])
        records = map(json.loads, Path(folder, "run/metrics.jsonl").read_text().splitlines())
        return [record for record in records if record["kind"] == "eval"][-1]


def accuracy(options: argparse.Namespace) -> None:
    """The digits on this device and on the CPU."""
    print("| digits, B = 1024 | top-1 | test loss |\n|---|---|---|")
    for device, hidden in (("GPU", {}), ("CPU", {"CUDA_VISIBLE_DEVICES": ""})):
        found = train("digits", environment=hidden)
        print(f"| {device} | {found['top1']:.4f} | {found['loss']:.4f} |", flush=True)


def horovod(options: argparse.Namespace) -> None:
    """Ours on Horovod against ``hvd.DistributedOptimizer`` as Horovod's example has it."""
    from hvd_lars.comm.horovod import HorovodCommunicator

    comm = HorovodCommunicator()
    print("| images | hvd_lars on Horovod, ms | hvd.DistributedOptimizer, ms | ratio |")
    print("|---|---|---|---|")
    for batch in options.batches:
        shape = options.network, batch, options.side, "tf32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        found = timed({"ours": our_step(*shape, comm), "theirs": plain_step(*shape, wrap=True)},
                      options.steps)  # fmt: skip
        print(f"| {batch} | {found['ours']:.2f} | {found['theirs']:.2f} | "
              f"{found['theirs'] / found['ours']:.3f} |", flush=True)  # fmt: skip
    comm.close()


def nccl(options: argparse.Namespace) -> None:
    """The time of an all-reduce over one rank: what a bucket costs before any network."""
    from hvd_lars.comm.horovod import HorovodCommunicator

    comm = HorovodCommunicator()
    print("| all-reduce of one rank | µs |\n|---|---|")
    for count in (1_000, 1_000_000, 25_000_000):
        tensor = torch.zeros(count, device=DEVICE)
        found = timed({"sum": lambda t=tensor: comm.start_all_reduce_sum(t, "t").wait()}, 20)
        print(f"| {4 * count / 1e6:g} MB | {found['sum'] * 1e3:,.0f} |", flush=True)
    comm.close()


def main() -> None:
    """Run one part."""
    parts = [throughput, memory, decode, accuracy, horovod, nccl]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[part.__name__ for part in parts])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--modes", nargs="+", default=list(MODES)[:-1], choices=MODES)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    next(part for part in parts if part.__name__ == options.part)(options)


if __name__ == "__main__":
    main()
