"""Check whether shards still match their source files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from hvd_lars.data.shards.samples import scan_tar
from hvd_lars.data.shards.samples_to_pack import Samples
from hvd_lars.errors import UserError

# Mostly waiting for the file system.  Each keeps up to 64 files open, of 1,024 that are allowed.
_THREADS = 8


def stamps(shards: Mapping[str, Samples]) -> dict[str, str]:
    """Return by shard a hash that changes with any source's size or modification time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_stamp, shards.values())
        return dict(zip(shards, found, strict=True))


def _stamp(samples: Samples) -> str:
    facts: list[tuple[str, int, int] | tuple[str, None, None]] = []
    for path in samples.store.files():
        try:
            status = os.stat(os.path.join(samples.root, path))
            facts.append((path, status.st_size, status.st_mtime_ns))
        except OSError:  # reported when the file is read
            facts.append((path, None, None))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def compare(
    target: Path,
    shards: Mapping[str, Samples],
    progress: Callable[[int, int], None],
    threads: int = _THREADS,
) -> None:
    """Read the sources of ``shards`` and compare every byte with what was packed.

    Args:
        target: the folder of the shards.
        shards: by name.
        progress: called with the numbers of compared shards and of all shards.
        threads: shards compared at once, at most 8.

    Raises:
        UserError: files have changed or cannot be read; names the first, and gives their number.
    """
    changed: list[str] = []
    with ThreadPoolExecutor(min(threads, _THREADS)) as pool:
        running = [
            pool.submit(_changed, target / name, samples) for name, samples in shards.items()
        ]
        for done, future in enumerate(as_completed(running), start=1):
            changed += future.result()
            progress(done, len(running))
    if changed:
        raise UserError(
            f"{target}: {min(changed)}: changed since it was packed ({len(changed):,} "
            f"such files); name another folder for the shards, or remove this one"
        )


def _changed(shard: Path, samples: Samples) -> list[str]:
    """Return the names of the sources that differ from the shard."""
    found = []
    rows = scan_tar(shard)
    if len(rows) != len(samples):
        raise UserError(f"{shard}: damaged: {len(rows):,} samples; {len(samples):,} were packed")
    with shard.open("rb") as file:
        for index, (offset, size, _) in enumerate(rows):
            data = samples.read(index)
            if len(data) != size or data != os.pread(file.fileno(), size, offset):
                found.append(samples.where(index))
    samples.store.close()
    return found
