"""``hvd-lars pack``: pack a data set into tar shards, with a progress bar."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from hvd_lars.errors import UserError
from hvd_lars.runtime.terminal import progress_bar, warn

NAME, HELP = "pack", "write a data set as tar shards; run again to resume"
EPILOG = "Example: hvd-lars pack /data/imagenet /scratch/shards --shorter-side 320"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, its shards, and how they are written."""
    parser.add_argument(
        "source", metavar="SRC", help="folder of class folders, archives, TFRecord, Parquet, …"
    )
    parser.add_argument("target", metavar="DST", type=Path, help="folder for the shards")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="worker processes")
    parser.add_argument(
        "--shard-samples",
        type=int,
        default=4096,
        metavar="N",
        help="images per shard; default 4096",
    )
    parser.add_argument(
        "--shorter-side",
        type=int,
        metavar="N",
        help="resize larger images to this shorter side, of training and val; off by default",
    )
    parser.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="of resized JPEGs; default 90"
    )
    parser.add_argument(
        "--verify", action="store_true", help="then read every shard and compare it with SRC"
    )


def run(options: argparse.Namespace) -> int:
    """Pack the folder."""
    side, quality = options.shorter_side, options.quality
    for option, value, most in (
        ("--shorter-side", side, None),
        ("--quality", quality, 100),
        ("--workers", options.workers, None),
        ("--shard-samples", options.shard_samples, None),
    ):
        if value is not None and not 1 <= value <= (most or value):
            allowed = f"from 1 to {most}" if most else "1 or more"
            raise UserError(f"{option}: found {value}; must be {allowed}")
    return pack(
        options.source,
        options.target,
        options.workers,
        options.shard_samples,
        options.verify,
        None if side is None else (side, quality),
    )


def pack(
    source: str,
    target: Path,
    workers: int,
    shard_samples: int,
    verify: bool,
    shrink: tuple[int, int] | None = None,
) -> int:
    """Write the shards, and with ``verify`` compare them with SRC; return the exit code.

    Raises:
        UserError: an option or a folder is invalid.
    """
    from hvd_lars.data.shards import writer as shard_writer
    from hvd_lars.data.shards.cache import verify as verify_shards
    from hvd_lars.data.shards.origins import compare
    from hvd_lars.data.shards.shrink import Shrink

    smaller = None if shrink is None else Shrink(*shrink)
    begun = time.perf_counter()
    try:
        with progress_bar("packing", "images") as progress:
            packed = shard_writer.pack(source, target, workers, shard_samples, progress, smaller)
    except UserError as error:  # the layout's checks name the config's key
        raise UserError(str(error).replace("data.root: ", "SRC: ")) from None
    seconds = time.perf_counter() - begun
    if packed.left_out:
        warn(f"{source}: skipped, not images of a class: {packed.left_out}")
    rest = packed.samples - packed.written
    parts = [f"{packed.samples:,} images in {packed.shards:,} shards, {packed.bytes / 1e9:.3f} GB"]
    parts += [str(smaller)] if smaller else []
    parts += [f"{rest:,} were there already"] if rest else []
    parts += [f"{packed.written / seconds:,.0f} images/s"] if packed.written else []
    for name in packed.mended:
        print(f"{target / name}: was missing or of the wrong size; written again")
    print(f"{target}: {'; '.join(parts)}")
    if verify:
        with progress_bar("verifying", "shards") as progress:
            count = verify_shards(target, workers, progress)
        print(f"{target}: {count:,} shards have the SHA-256 of dataset.json")
        with progress_bar("comparing", "shards") as progress:
            compare(target, packed.sources, progress, workers)
        print(f"{target}: the shards match the files of {source}")
    return 0
