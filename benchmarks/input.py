#!/usr/bin/env python3
"""Images a second that one core makes ready to train on, from JPEGs of ImageNet's usual size.

    pip install -e '.[vision]' && python benchmarks/input.py [--images 256] [--rounds 7]

Decoding, a random resized crop to 224×224 and flipping, from a folder in ImageNet's layout:

* the peer is torchvision's ImageFolder and a DataLoader with one worker, as everybody writes it
  (RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize): float32 batches;
* ours are uint8 batches, which the device normalises; also with that on the same core, as on a
  machine without a GPU, and from tar shards;
* the floor is decoding the same JPEGs whole, with the decoder that we use, and nothing else.

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

from hvd_lars.data import Augment, FolderImages, Images, LocatedImages, list_folder, load_shards
from hvd_lars.data.images import Sizes
from hvd_lars.data.loader import stream
from hvd_lars.data.shards.writer import pack
from hvd_lars.data.source import Request
from hvd_lars.sources.images import IMAGENET_STATISTICS

BATCH = 32


def cases_of(root: Path, shards: Path) -> dict[str, Callable[[], Iterator[object]]]:
    """Every contestant, making the batches of one epoch."""
    listing, packed = list_folder(str(root), None), load_shards(str(shards), "", "", None)
    options = (Augment(), Sizes(224, 256), 0, IMAGENET_STATISTICS)
    folder = Images(
        FolderImages(listing.root, listing.train),
        FolderImages(listing.root, listing.val),
        listing.identity(),
        *options,
    )
    stores = LocatedImages(shards, packed.train), LocatedImages(shards, packed.val)
    sharded = Images(*stores, packed.identity, *options)
    order = np.random.default_rng(1).permutation(folder.num_train)
    requests = [Request(0, piece) for piece in np.split(order, len(order) // BATCH)]
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET_STATISTICS),
        ]
    )
    dataset = datasets.ImageFolder(root / "train", transform)
    files = [Path(path).read_bytes() for path, _ in dataset.samples]

    def ours(source: Images, normalise: bool) -> Callable[[], Iterator[object]]:
        def epoch() -> Iterator[object]:
            for request, (images, labels) in stream(source, requests, workers=1):
                yield source.on_device(images, labels, request) if normalise else images

        return epoch

    def decoding() -> Iterator[object]:
        for begin in range(0, len(files), BATCH):
            yield [simplejpeg.decode_jpeg(data) for data in files[begin : begin + BATCH]]

    return {
        "torchvision ImageFolder + DataLoader": lambda: iter(
            DataLoader(dataset, BATCH, shuffle=True, num_workers=1)
        ),
        "hvd_lars, folder": ours(folder, normalise=False),
        "hvd_lars, shards": ours(sharded, normalise=False),
        "hvd_lars, folder, normalised on the core": ours(folder, normalise=True),
        "floor: decoding whole": decoding,
    }


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
            pack(str(work / "images"), work / "shards", 1, 512, lambda *_: None)
            cases = cases_of(work / "images", work / "shards")
            rates: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(arguments.rounds + 1):  # the first fills the page cache
                for who, case in cases.items():
                    rates[who].append(images_per_second(case(), count))
            found = {who: statistics.median(values[1:]) for who, values in rates.items()}
        print(f"\n{size[0]}×{size[1]}, {count} JPEGs, {arguments.rounds} rounds\n")
        table(found, "floor: decoding whole")
        peer = found["torchvision ImageFolder + DataLoader"]
        print(f"hvd_lars from a folder over torchvision: {found['hvd_lars, folder'] / peer:.2f}; "
              "normalised on the core: "
              f"{found['hvd_lars, folder, normalised on the core'] / peer:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
