#!/usr/bin/env python3
"""A generated folder in ImageNet's layout through pack, train and eval.

    python benchmarks/imagenet_like.py [--train 4] [--val 1] [--rounds 5]

Makes 1,000 classes of JPEGs of ImageNet's usual size (500×375, about 110 KB), then

1. packs them with one worker and with one a core; the floor is copying the same bytes in one
   stream with fsync, measured in the same rounds;
2. runs the ResNet-50 recipe at B = 8192, scaled down by overrides, over two ranks, and evaluates.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from hvd_lars.data.shards.writer import pack
from hvd_lars.launchers.local import local_command, this_python
from hvd_lars.state.run_folder import environment_facts

CLASSES = 1000


def make_folder(
    root: Path, train: int, val: int, classes: int = CLASSES, size: tuple[int, int] = (500, 375)
) -> None:
    """Smooth random fields with fine noise: JPEGs of the size that photographs have."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(32):
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        field = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        noise = generator.normal(scale=14.0, size=(size[1], size[0], 1))
        pixels = (np.asarray(field, dtype=np.float64) + noise).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                data = files[(label * 7 + i) % len(files)]
                (folder / f"n{label:08d}_{i}.JPEG").write_bytes(data)


def copy_stream(files: list[Path], target: Path) -> None:
    """Every file's bytes into one file, synced: what any packer must do at least."""
    with target.open("wb") as out:
        for path in files:
            out.write(path.read_bytes())
        out.flush()
        os.fsync(out.fileno())


def timed(action: Callable[[], object]) -> float:
    """Seconds that the action took."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def rates(cases: dict[str, Callable[[], object]], count: int, rounds: int) -> dict[str, float]:
    """Median images/s of every case, the cases taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, action in cases.items():
            seconds[name].append(timed(action))
    return {name: count / statistics.median(values) for name, values in seconds.items()}


def table(found: dict[str, float], floor: str, digits: int = 0) -> None:
    """Rates and their ratio to the floor's."""
    print("| | images/s | of the floor |\n|---|---|---|")
    for name, rate in found.items():
        print(f"| {name} | {rate:,.{digits}f} | {rate / found[floor]:.2f} |")
    print(flush=True)


def measure_pack(root: Path, work: Path, rounds: int) -> None:
    """Part 1."""
    files = sorted(path for path in root.glob("*/*/*"))
    size = sum(path.stat().st_size for path in files)
    cores = len(os.sched_getaffinity(0))

    def packing(workers: int) -> Callable[[], object]:
        def action() -> None:
            shutil.rmtree(work / "timed", ignore_errors=True)
            pack(str(root), work / "timed", workers, 512, lambda *_: None)

        return action

    cases: dict[str, Callable[[], object]] = {
        "floor: copy in one stream": lambda: copy_stream(files, work / "copy"),
        "pack, 1 worker": packing(1),
        f"pack, {cores} workers": packing(cores),
    }
    print(f"## Pack: {len(files):,} files, {size / 1e9:.2f} GB\n")
    table(rates(cases, len(files), rounds), "floor: copy in one stream")


def show_training(shards: Path, work: Path) -> None:
    """Part 2."""
    recipe = "resnet50-lars-b8192"
    overrides = [
        "data.name=shards", "data.expect=null", f"data.root={shards}", "data.image_size=64",
        "data.eval_resize=72",
        "data.workers=1", "train.global_batch=128", "train.micro_batch=32", "train.eval_batch=32",
        "train.duration=4 steps", "schedule.warmup_duration=1 steps", "schedule.base_lr=2",
        "train.eval_every=4 steps", "train.log_every=1 steps", "checkpoint.every=4 steps",
        f"run.dir={work}/run",
    ]  # fmt: skip
    print("## The ResNet-50 recipe, scaled down, over two ranks, then evaluated\n\n```text")
    print(f"$ horovodrun -np 2 hvd-lars train {recipe} {' '.join(overrides)}", flush=True)
    train = this_python("-m", "hvd_lars", "train", recipe, *overrides)
    evaluate = this_python("-m", "hvd_lars", "eval", f"{work}/run")
    for title, program in (("", train), (f"$ horovodrun -np 2 hvd-lars eval {work}/run", evaluate)):
        print(title, end="\n" if title else "", flush=True)
        result = subprocess.run(
            local_command("horovodrun", 2, program), capture_output=True, text=True, check=False
        )
        print(result.stdout.replace("[1,0]<stdout>: ", "").strip(), flush=True)
        if result.returncode != 0:
            sys.exit(result.stderr)
    print("```")


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=4, help="training images a class")
    parser.add_argument("--val", type=int, default=1, help="evaluation images a class")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    facts = environment_facts()
    print("# Input from a generated folder in ImageNet's layout\n")
    print(f"{facts['processor']}, {facts['cores']} cores, commit {facts['commit']}; "
          f"`python {' '.join(sys.argv)}`\n")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_folder(work / "images", options.train, options.val)
        measure_pack(work / "images", work, options.rounds)
        pack(str(work / "images"), work / "shards", 2, 512, lambda *_: None)
        show_training(work / "shards", work)


if __name__ == "__main__":
    main()
