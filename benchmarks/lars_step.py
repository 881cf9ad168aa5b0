#!/usr/bin/env python3
"""Milliseconds of one optimizer step: ours by kernel, other people's LARS, and torch's SGD.

    pip install -e '.[bench]' && python benchmarks/lars_step.py [--threads 1 2] [--rounds 15]

For the shapes of ResNet-50, AlexNet, ViT-B and of 1,000 small layers, float32, every optimizer on
its own copy of the weights.  All are timed one after the other in every round, after warm-up, and
medians over the rounds are given.  Floors, measured in the same rounds:

* ``floor 28 B`` a parameter: a step that reads w and g for the norms, then reads w, g, v and writes
  w, v, at the bandwidth of ``a.add_(b)`` (2 reads, 1 write) over as many bytes;
* ``torch SGD fused`` moves 20 bytes a parameter and takes no norms.

``ours native`` is a whole step alone.  ``ours native, exposed`` is what a training step waits for:
gradients' squares were summed while their reduction went on, so one update pass is left.
On a machine with an NVIDIA GPU the same is run there as well, twice: as the time that the GPU takes
while it has other work queued before, as in training, and as the time of a step alone, which for
many small layers is the host's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import print_head
from torch import nn
from torchvision.models import get_model

from hvd_lars import LARS, Replicated
from hvd_lars.comm import connect
from hvd_lars.models import build_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from reference.peers import LarcSgd  # noqa: E402

Step = Callable[[], None]


def shapes_of(name: str) -> list[torch.Size]:
    """Parameter shapes of one of the four networks."""
    if name == "1,000 layers":
        return [torch.Size((64, 64)), torch.Size((64,))] * 500
    with torch.device("meta"):
        if name == "AlexNet":
            model = build_model("alexnet_caffe", 1000)
        else:
            model = get_model({"ResNet-50": "resnet50", "ViT-B": "vit_b_16"}[name])
    return [param.shape for param in model.parameters()]


def make_params(shapes: list[torch.Size], device: torch.device) -> list[nn.Parameter]:
    """Parameters with gradients, in one piece of memory each, as a model's are."""
    torch.manual_seed(0)
    params = []
    for shape in shapes:
        param = nn.Parameter(torch.randn(shape, device=device) / 100)
        param.grad = torch.randn(shape, device=device) / 1000
        params.append(param)
    return params


def groups_of(params: list[nn.Parameter]) -> list[dict[str, object]]:
    """Weights adapted and decayed, the others neither, as every recipe does."""
    weights = [param for param in params if param.dim() > 1]
    others = [param for param in params if param.dim() < 2]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": "none"}]


def ours(kernel: str) -> Callable[[list[nn.Parameter]], Step]:
    """LARS with a kernel, alone."""

    def make(params: list[nn.Parameter]) -> Step:
        return LARS(groups_of(params), lr=0.1, weight_decay=1e-4, kernel=kernel).step

    return make


def exposed(params: list[nn.Parameter]) -> Step:
    """LARS.step after a backward that has summed the squares already (one rank)."""
    gradients = [param.grad for param in params]
    placement = Replicated(params, connect("local"), early_norms=True)
    optimizer = LARS(groups_of(params), lr=0.1, weight_decay=1e-4, placement=placement)

    def before() -> None:
        optimizer.zero_grad()
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        placement.gradients.finish()

    def step() -> None:
        optimizer.step()

    before()
    optimizer.step()  # from here on the placement takes the sums early
    step.before = before  # type: ignore[attr-defined]
    return step


PEERS = {
    "timm Lars": ("timm.optim", "Lars"),
    "pytorch_optimizer LARS": ("pytorch_optimizer", "LARS"),
    "torch_optimizer LARS": ("torch_optimizer", "LARS"),
    "lightly LARS": ("lightly.utils.lars", "LARS"),
}


def peers() -> dict[str, Callable[[list[nn.Parameter]], Step]]:
    """Other people's LARS for PyTorch that are installed, with weight decay so that all adapt."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    found: dict[str, Callable[[list[nn.Parameter]], Step]] = {
        "apex-style LARC": lambda p: LarcSgd(p, 0.1, 0.9, 1e-4, 0.001, False, 1e-8).step
    }
    for name, (module, attribute) in PEERS.items():
        if importlib.util.find_spec(module.partition(".")[0]):
            theirs = getattr(importlib.import_module(module), attribute)
            found[name] = lambda p, theirs=theirs: theirs(p, **options).step
    return found


def sgd(**how: bool) -> Callable[[list[nn.Parameter]], Step]:
    """Momentum SGD of torch itself."""
    return lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-4, **how).step


def floor(params: list[nn.Parameter]) -> Step:
    """28 bytes a parameter at the bandwidth of add_: 12 bytes an element, so 28 / 12 elements."""
    numel = sum(param.numel() for param in params) * 28 // 12
    a = torch.zeros(numel, device=params[0].device)
    b = torch.ones(numel, device=params[0].device)
    return lambda: a.add_(b)


def alone(step: Step, device: torch.device) -> float:
    """Milliseconds from the call until the step is done."""
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    settle()
    started = time.perf_counter()
    step()
    settle()
    return (time.perf_counter() - started) * 1e3


def queued(step: Step, device: torch.device) -> float:
    """Milliseconds on the GPU, as in training, where the host is a step ahead.

    Products keep the GPU busy while the host queues the step; a host that takes longer than they
    do counts.
    """
    large = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(large)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(20):  # about 30 ms on an H200
        torch.mm(large, large, out=out)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(
    name: str, threads: int, rounds: int, device: torch.device, way: Callable[..., float]
) -> dict[str, float]:
    """Median milliseconds by contestant, all interleaved; ``way`` times a step."""
    torch.set_num_threads(threads)
    contestants: dict[str, Callable[[list[nn.Parameter]], Step]] = {
        "floor 28 B": floor,
        "ours native, exposed": exposed,
        "ours native": ours("native"),
        "ours fused": ours("fused"),
        "ours eager": ours("eager"),
        "torch SGD fused": sgd(fused=True),
        "torch SGD foreach": sgd(foreach=True),
    } | peers()
    if device.type != "cpu":
        del contestants["ours fused"]
    shapes = shapes_of(name)
    gradients = [param.grad for param in make_params(shapes, device)]
    params = {who: make_params(shapes, device) for who in contestants}
    steps = {who: make(params[who]) for who, make in contestants.items()}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for i in range(rounds + 2):
        for who, step in steps.items():
            for param, gradient in zip(params[who], gradients, strict=True):
                param.grad.copy_(gradient)  # some peers rewrite it
            getattr(step, "before", lambda: None)()
            took = way(step, device)
            if i >= 2:
                times[who].append(took)
    return {who: statistics.median(found) for who, found in times.items()}


def table(results: dict[tuple[str, int], dict[str, float]]) -> str:
    """Rows of contestants, columns of networks; and the ratios that are claimed."""
    columns = [f"{name}, {threads} thread{'s' * (threads > 1)}" for name, threads in results]
    lines = ["| ms a step | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    whos = list(next(iter(results.values())))
    for who in whos:
        lines.append(f"| {who} | " + " | ".join(f"{r[who]:.2f}" for r in results.values()) + " |")
    theirs = list(peers())

    def ratio(text: str, of: Callable[[dict[str, float]], float]) -> None:
        lines.append(f"| {text} | " + " | ".join(f"{of(r):.2f}" for r in results.values()) + " |")

    ratio("native / floor", lambda r: r["ours native"] / r["floor 28 B"])
    ratio("exposed / SGD fused", lambda r: r["ours native, exposed"] / r["torch SGD fused"])
    ratio("fastest peer / native", lambda r: min(r[w] for w in theirs) / r["ours native"])
    ratio("fastest peer / exposed", lambda r: min(r[w] for w in theirs) / r["ours native, exposed"])
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep what was printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    names = ["ResNet-50", "AlexNet", "ViT-B", "1,000 layers"]
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only there")
    parser.add_argument("--json", type=Path, help="also write the medians there")
    arguments = parser.parse_args()
    modules = {module.partition(".")[0] for module, _ in PEERS.values()}
    print_head("One optimizer step", ["torch", *filter(importlib.util.find_spec, sorted(modules))])
    there = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    devices = [torch.device(name) for name in there if arguments.device in (None, name)]
    ways = {"cpu": {"alone": alone}, "cuda": {"on the GPU, behind other work": queued,
                                              "alone, host and GPU": alone}}  # fmt: skip
    for device, (how, way) in [(d, each) for d in devices for each in ways[d.type].items()]:
        results = {
            (name, threads): measure(name, threads, arguments.rounds, device, way)
            for threads in (arguments.threads if device.type == "cpu" else [1])
            for name in arguments.networks
        }
        print(f"\n{device.type}, {how}, medians of {arguments.rounds} interleaved rounds\n")
        print(table(results), flush=True)
    if len(there) == 1:
        print("\nGPU: not run (there is none here)")
    if arguments.json:
        rows = [
            {"network": name, "threads": threads, "ms": found}
            for (name, threads), found in results.items()
        ]
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
