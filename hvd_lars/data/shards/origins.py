"""Check whether shards still match their source files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from hvd_lars.data.shards.index import scan_tar
from hvd_lars.errors import UserError

Samples = Sequence[tuple[str, int]]
"""(path in the source folder, label) of each sample of a shard, in order."""

_THREADS = 16  # mostly waiting for the file system


def stamps(root: str, shards: Mapping[str, Samples]) -> dict[str, str]:
    """Return by shard a hash that changes with any source's size or modification time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda samples: _stamp(root, samples), shards.values())
        return dict(zip(shards, found, strict=True))


def _stamp(root: str, samples: Samples) -> str:
    facts: list[tuple[str, int, int] | tuple[str, None, None]] = []
    for path, _ in samples:
        try:
            status = os.stat(os.path.join(root, path))
            facts.append((path, status.st_size, status.st_mtime_ns))
        except OSError:  # reported when the file is read
            facts.append((path, None, None))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def compare(
    root: str,
    target: Path,
    shards: Mapping[str, Samples],
    progress: Callable[[int, int], None],
    threads: int = _THREADS,
) -> None:
    """Read the sources of ``shards`` and compare every byte with what was packed.

    Args:
        root: the source folder.
        target: the folder of the shards.
        shards: by name.
        progress: called with the numbers of compared shards and of all shards.
        threads: shards compared at once.

    Raises:
        UserError: files have changed or cannot be read; names the first, and gives their number.
    """
    changed: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        running = [
            pool.submit(_changed, root, target / name, samples) for name, samples in shards.items()
        ]
        for done, future in enumerate(as_completed(running), start=1):
            changed += future.result()
            progress(done, len(running))
    if changed:
        raise UserError(
            f"{target}: {Path(root, min(changed))}: changed since it was packed ({len(changed):,} "
            f"such files); name another folder for the shards, or remove this one"
        )


def _changed(root: str, shard: Path, samples: Samples) -> list[str]:
    """Return the paths of the sources that differ from the shard."""
    found = []
    rows = scan_tar(shard)
    if len(rows) != len(samples):
        raise UserError(f"{shard}: damaged: {len(rows):,} samples; {len(samples):,} were packed")
    with shard.open("rb") as file:
        for (path, _), (offset, size, _) in zip(samples, rows, strict=True):
            try:
                data = Path(root, path).read_bytes()
            except OSError as error:
                raise UserError(f"{Path(root, path)}: cannot be read: {error.strerror}") from None
            if len(data) != size or data != os.pread(file.fileno(), size, offset):
                found.append(path)
    return found
