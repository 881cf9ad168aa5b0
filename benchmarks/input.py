#!/usr/bin/env python3
"""Images a second that one core makes ready to train on, from JPEGs of ImageNet's usual size.

    pip install -e '.[vision,bench]' && python benchmarks/input.py [--images 256] [--rounds 7]
    pip install nvidia-dali-cuda130    # for DALI's row

Decoding, a random resized crop to 224×224 and flipping, from a folder in ImageNet's layout:

* the peer is torchvision's ImageFolder and a DataLoader with one worker, as everybody writes it
  (RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize): float32 batches;
* ours are uint8 batches, which the device normalises; also with that on the same core, as on a
  machine without a GPU, from tar shards, from shards packed with --shorter-side 320 and 256, and
  with whole images decoded, as in earlier versions;
* FFCV's recipe: simplejpeg, then the crop resized by OpenCV with INTER_AREA, in the same loader;
* DALI's CPU pipeline (image_random_crop, antialiased resize, mirror), one thread;
* the floor is decoding the same parts of the same JPEGs, and nothing else.

Everything, worker included, is held to one core; all take turns, medians over the rounds.  Time
runs from an epoch's first batch to its last: starting a worker is not counted.  A second table has
photographs of 2,000×1,500, whose crops are decoded at reduced size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from imagenet_like import make_folder, table
from report import print_head
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from hvd_lars.data import decoding
from hvd_lars.data.augment import Augment
from hvd_lars.data.crops import NUM_DRAWS, random_part
from hvd_lars.data.image_folder import FolderImages
from hvd_lars.data.images import Images, Sizes
from hvd_lars.data.listing import list_folder
from hvd_lars.data.loader import stream
from hvd_lars.data.located import LocatedImages
from hvd_lars.data.randomness import uniforms
from hvd_lars.data.region import decode_region
from hvd_lars.data.shards.index import load_shards
from hvd_lars.data.shards.shrink import Shrink
from hvd_lars.data.shards.writer import pack
from hvd_lars.data.source import Batch, Indices, Request, Source
from hvd_lars.sources.images import IMAGENET_STATISTICS

try:
    import cv2
except ImportError:
    cv2 = None
try:
    import nvidia.dali as dali
except ImportError:
    dali = None

BATCH = 32
OPTIONS = (Augment(), Sizes(224, 256), 0, IMAGENET_STATISTICS)
TORCHVISION = transforms.Compose(
    [
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*IMAGENET_STATISTICS),
    ]
)


def cases_of(root: Path, shards: Path) -> dict[str, Callable[[], Iterator[object]]]:
    """Every contestant, making the batches of one epoch."""
    listing = list_folder(str(root), None)
    folder = Images(
        FolderImages(listing.root, listing.train),
        FolderImages(listing.root, listing.val),
        listing.identity(),
        *OPTIONS,
    )
    order = np.random.default_rng(1).permutation(folder.num_train)
    requests = [Request(0, piece) for piece in np.split(order, len(order) // BATCH)]
    dataset = datasets.ImageFolder(root / "train", TORCHVISION)
    paths = [path for path, _ in dataset.samples]

    def ours(source: Source, normalise: bool = False) -> Callable[[], Iterator[object]]:
        def epoch() -> Iterator[object]:
            for request, (images, labels) in stream(source, requests, workers=1):
                yield source.on_device(images, labels, request) if normalise else images

        return epoch

    cases = {
        "torchvision ImageFolder + DataLoader": lambda: iter(
            DataLoader(dataset, BATCH, shuffle=True, num_workers=1)
        ),
        "hvd_lars, folder": ours(folder),
        "hvd_lars, folder, whole images decoded": ours(Whole(folder)),
        "hvd_lars, folder, normalised on the core": ours(folder, normalise=True),
    }
    for side in (None, 320, 256):
        title = "hvd_lars, shards" + (f", shorter side {side}" if side else "")
        cases[title] = ours(packed_images(root, shards / str(side), side))
    if cv2 is not None:
        cases["FFCV's recipe: simplejpeg + OpenCV"] = ours(Ffcv(paths))
    if dali is not None:
        cases["DALI, CPU pipeline"] = dali_epoch(paths, len(requests))
    return cases | {"floor: decoding the parts": floor_epoch(paths)}


def packed_images(root: Path, target: Path, side: int | None) -> Images:
    """The folder's images from shards, perhaps smaller ones."""
    shrink = None if side is None else Shrink(side, 90)
    pack(str(root), target, 1, 512, lambda *_: None, shrink)
    packed = load_shards(str(target), "", "", None)
    stores = LocatedImages(target, packed.train), LocatedImages(target, packed.val)
    return Images(*stores, packed.identity, *OPTIONS)


class Whole:
    """A source whose JPEGs are decoded whole, in its worker process."""

    def __init__(self, source: Source) -> None:
        self.source, self.unreadable = source, source.unreadable

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """As the source, without the decoder of parts."""
        decoding.decode_region = lambda *_: None  # type: ignore[assignment]
        return self.source.train_batch(epoch, indices)


class Ffcv:
    """FFCV's way with a JPEG: decoded whole, the crop resized by OpenCV, perhaps mirrored."""

    def __init__(self, paths: list[str]) -> None:
        self.paths, self.unreadable = paths, []

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """Return crops (n, 224, 224, 3) uint8, and labels."""
        cv2.setNumThreads(1)
        out = np.empty((len(indices), 224, 224, 3), dtype=np.uint8)
        draws = uniforms(0, epoch, indices, NUM_DRAWS).tolist()
        for image, i, row in zip(out, indices.tolist(), draws, strict=True):
            data = Path(self.paths[i]).read_bytes()
            pixels = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)
            top, left, height, width = random_part(row, *pixels.shape[:2], (0.08, 1.0))
            part = pixels[top : top + height, left : left + width]
            cv2.resize(part, (224, 224), image, interpolation=cv2.INTER_AREA)
            if row[0] < 0.5:
                image[:] = image[:, ::-1]
        return torch.from_numpy(out), torch.zeros(len(indices))


def dali_epoch(paths: list[str], batches: int) -> Callable[[], Iterator[object]]:
    """DALI's pipeline for training, on one thread of the CPU."""

    @dali.pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> object:
        files, labels = dali.fn.readers.file(files=paths, random_shuffle=True)
        images = dali.fn.decoders.image_random_crop(files, random_area=[0.08, 1.0])
        images = dali.fn.resize(images, size=[224, 224], antialias=True)
        return dali.fn.flip(images, horizontal=dali.fn.random.coin_flip()), labels

    def epoch() -> Iterator[object]:
        made = pipeline()
        made.build()
        for _ in range(batches):
            yield made.run()

    return epoch


def floor_epoch(paths: list[str]) -> Callable[[], Iterator[object]]:
    """Decoding the parts that training needs."""
    files = [Path(path).read_bytes() for path in paths]
    draws = uniforms(0, 0, np.arange(len(files)), NUM_DRAWS).tolist()

    def part_of(data: bytes, row: list[float]) -> object:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        part = random_part(row, height, width, (0.08, 1.0))
        shrink = next((s for s in (8, 4, 2) if min(part[2:]) >= s * 224), 1)
        return decode_region(data, shrink, tuple(n // shrink for n in part))  # type: ignore[arg-type]

    def epoch() -> Iterator[object]:
        for begin in range(0, len(files), BATCH):
            chosen = slice(begin, begin + BATCH)
            yield [part_of(d, row) for d, row in zip(files[chosen], draws[chosen], strict=True)]

    return epoch


def images_per_second(batches: Iterator[object], count: int) -> float:
    """From the first batch to the last."""
    next(batches)
    begun = time.perf_counter()
    for _ in batches:
        pass
    return (count - BATCH) / (time.perf_counter() - begun)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048, help="a round; the larger are 1/8")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    print_head("Training input on one core", ["torch", "torchvision", "pillow", "simplejpeg"])
    for size, count in (((500, 375), arguments.images), ((2000, 1500), arguments.images // 8)):
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            make_folder(work / "images", count // BATCH, 1, classes=BATCH, size=size)
            cases = cases_of(work / "images", work / "shards")
            rates: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(arguments.rounds + 1):  # the first fills the page cache
                for who, case in cases.items():
                    rates[who].append(images_per_second(case(), count))
            found = {who: statistics.median(values[1:]) for who, values in rates.items()}
        print(f"\n{size[0]}×{size[1]}, {count} JPEGs, {arguments.rounds} rounds\n")
        table(found, "floor: decoding the parts")
        peer = found["torchvision ImageFolder + DataLoader"]
        before = found["hvd_lars, folder, whole images decoded"]
        print(f"hvd_lars from a folder over whole images: {found['hvd_lars, folder'] / before:.2f}")
        print(f"hvd_lars from a folder over torchvision: {found['hvd_lars, folder'] / peer:.2f}; "
              "normalised on the core: "
              f"{found['hvd_lars, folder, normalised on the core'] / peer:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
