"""Verify shards against their checksums, and copy them to a node."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from hvd_lars.data.located import LocatedSet
from hvd_lars.data.shards.index import DATASET, read_manifest
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user, sha256_of


def cached_root(shards: LocatedSet, cache_dir: str) -> Path:
    """Return the folder of this data set's copy, which differs by data set and version."""
    facts = [str(Path(shards.root).resolve()), shards.version]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return expand_user(cache_dir, "data.cache_dir") / f"shards-{key}"


def copy_shards(shards: LocatedSet, cache_dir: str, threads: int = 4) -> None:
    """Copy the shards that the node lacks; a copy is either complete or absent.

    Raises:
        UserError: there is no room, the folder cannot be written, or a copy does not match
            dataset.json.
    """
    target = cached_root(shards, cache_dir)
    try:
        target.mkdir(parents=True, exist_ok=True)
        left = {
            name: size
            for name, size in shards.bytes.items()
            if not (target / name).is_file() or (target / name).stat().st_size != size
        }
        needed, free = sum(left.values()), shutil.disk_usage(target).free
        if needed > free:
            raise UserError(
                f"data.cache_dir: {cache_dir}: {needed / 1e9:.1f} GB are needed, "
                f"{free / 1e9:.1f} GB are free"
            )
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda name: _copy(shards, name, target / name), left))
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {error.filename or cache_dir}: {error.strerror or error}"
        ) from None


def _copy(shards: LocatedSet, name: str, target: Path) -> None:
    source = Path(shards.root, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, draft)
        wanted = shards.sha256.get(name)
        if wanted is not None and sha256_of(draft) != wanted:
            raise UserError(
                f"{source}: its copy in data.cache_dir does not match the SHA-256 in {DATASET}; "
                "check the disks, or pack again"
            )
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)


def verify(folder: Path, threads: int, progress: Callable[[int, int], None]) -> int:
    """Compare every shard's SHA-256 with dataset.json; returns the number of shards.

    Args:
        folder: written by ``hvd-lars pack``.
        threads: shards read at once.
        progress: called with the numbers of shards read and of all shards.

    Raises:
        UserError: a line for every shard that is missing or damaged.
    """
    manifest = read_manifest(folder)
    entries = manifest["train"] + manifest["val"]
    problems = []
    with ThreadPoolExecutor(threads) as pool:
        sums = {pool.submit(sha256_of, folder / entry["name"]): entry for entry in entries}
        for done, future in enumerate(as_completed(sums), start=1):
            path, error = folder / sums[future]["name"], future.exception()
            if isinstance(error, OSError):
                problems.append(f"{path}: cannot be read: {error.strerror}")
            elif future.result() != sums[future]["sha256"]:
                problems.append(f"{path}: damaged: does not match {DATASET}'s SHA-256")
            progress(done, len(entries))
    if problems:
        raise UserError("\n".join([*sorted(problems), "remove these and pack again"]))
    return len(entries)
