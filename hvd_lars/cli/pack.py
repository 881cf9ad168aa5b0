"""``hvd-lars pack``: pack an image folder into tar shards, with a progress bar."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hvd_lars.errors import UserError
from hvd_lars.runtime.terminal import warn

NAME, HELP = "pack", "write an image folder as tar shards; run again to resume"
Progress = Callable[[int, int], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, its shards, and how they are written."""
    parser.add_argument(
        "source", metavar="SRC", help="root/train/CLASS/image, root/val/CLASS/image"
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
        "--verify", action="store_true", help="then read every shard and compare it with SRC"
    )


def run(options: argparse.Namespace) -> int:
    """Pack the folder."""
    return pack(
        options.source, options.target, options.workers, options.shard_samples, options.verify
    )


def pack(source: str, target: Path, workers: int, shard_samples: int, verify: bool) -> int:
    """Write the shards, and with ``verify`` compare them with SRC; return the exit code.

    Raises:
        UserError: an option or a folder is invalid.
    """
    from hvd_lars.data.shards import writer as shard_writer
    from hvd_lars.data.shards.cache import verify as verify_shards
    from hvd_lars.data.shards.origins import compare

    for option, value in (("--workers", workers), ("--shard-samples", shard_samples)):
        if value < 1:
            raise UserError(f"{option}: found {value}; must be 1 or more")
    begun = time.perf_counter()
    try:
        with _progress("packing", "images") as progress:
            packed = shard_writer.pack(source, target, workers, shard_samples, progress)
    except UserError as error:  # the layout's checks name the config's key
        raise UserError(str(error).replace("data.root: ", "SRC: ")) from None
    seconds = time.perf_counter() - begun
    if packed.left_out:
        warn(f"{source}: skipped, not images of a class: {packed.left_out}")
    rest = packed.samples - packed.written
    parts = [f"{packed.samples:,} images in {packed.shards:,} shards, {packed.bytes / 1e9:.3f} GB"]
    parts += [f"{rest:,} were there already"] if rest else []
    parts += [f"{packed.written / seconds:,.0f} images/s"] if packed.written else []
    for name in packed.mended:
        print(f"{target / name}: was missing or of the wrong size; written again")
    print(f"{target}: {'; '.join(parts)}")
    if verify:
        with _progress("verifying", "shards") as progress:
            count = verify_shards(target, workers, progress)
        print(f"{target}: {count:,} shards have the SHA-256 of dataset.json")
        with _progress("comparing", "shards") as progress:
            compare(packed.root, target, packed.sources, progress, workers)
        print(f"{target}: the shards match the files of {source}")
    return 0


@contextmanager
def _progress(title: str, unit: str) -> Iterator[Progress]:
    """Show a bar on a terminal, else a line every tenth; yield a function of (done, total)."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (title, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = -1

    def say(done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // total
        if tenth > last:
            last = tenth
            with suppress(OSError):
                print(f"{title}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    yield say
