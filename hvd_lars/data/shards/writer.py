"""From an image folder to tar shards in WebDataset's layout.

A shard is written
under another name, synced and renamed, then its facts are written beside it in ``.packing/``: what
was finished before an interruption is not written again.  The same folder gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import save_file

from hvd_lars.data.listing import Listing, Split, list_folder
from hvd_lars.data.shards.index import DATASET, FORMAT, INDEX, read_manifest, scan_tar
from hvd_lars.data.shards.origins import Samples, compare, stamps
from hvd_lars.data.source import Indices
from hvd_lars.data.worker_processes import leave_with_owner
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import HashingWriter, let_umask_decide, sha256_of, sync

_PACKING, _STAMP = ".packing", "identity"
_ENTRY = ("name", "bytes", "sha256", "source")  # of a shard in dataset.json


@dataclass(frozen=True)
class _Job:
    """One shard to write: (path in the source folder, label) of each of its samples."""

    name: str
    first: int
    samples: list[tuple[str, int]]


@dataclass(frozen=True)
class Packed:
    """What a pack came to; ``written`` counts the samples of this call, ``mended`` names shards.

    A mended shard had been written before, and was missing or of another size.  ``left_out`` counts
    the files that are no images; ``root`` and ``sources`` are what :func:`compare` takes.
    """

    samples: int
    written: int
    shards: int
    bytes: int
    mended: tuple[str, ...]
    left_out: str
    root: str
    sources: dict[str, Samples]


def pack(
    source: str,
    target: Path,
    workers: int,
    shard_samples: int,
    progress: Callable[[int, int], None],
) -> Packed:
    """Write the shards of ``source``, an ImageNet-like folder, that ``target`` does not have yet.

    Training images are shuffled once, so that a reader that streams shards sees them mixed.  Where
    the size or time of a source file is not what it was, the shard is compared with its sources.

    Args:
        source: root/train/CLASS/image and root/val/CLASS/image.
        target: folder to make.
        workers: processes.
        shard_samples: images a shard.
        progress: called with the number of samples that are done and of all samples.

    Raises:
        UserError: the folder is not laid out as it should be, ``target`` holds another folder's
            shards, or other bytes than its sources have now, or cannot be written.
    """
    listing = list_folder(source, None)
    jobs = {key: list(_jobs(listing, key, shard_samples)) for key in ("train", "val")}
    identity = _identity(listing, jobs)
    total = len(listing.train.labels) + len(listing.val.labels)
    everything = [job for key in jobs for job in jobs[key]]
    sources: dict[str, Samples] = {job.name: job.samples for job in everything}
    now = stamps(listing.root, sources)
    try:
        known = _known(target, identity, everything, now)
        done = {name: facts for name, facts in known.items() if _is_there(target, facts)}
        touched = {name: sources[name] for name in done if done[name].get("source") != now[name]}
        compare(listing.root, target, touched, lambda *_: None)
        _begin(target, identity)
        left = [job for job in everything if job.name not in done]
        count = total - sum(len(job.samples) for job in left)
        progress(count, total)
        sums = {name: facts["sha256"] for name, facts in known.items()}
        for facts, samples in _write_all(listing.root, target, left, sums, workers, now):
            done[facts["name"]] = facts
            count += samples
            progress(count, total)
        if not _index_is_sound(target):
            _finish(target, identity, listing.classes, jobs, done)
        if touched:
            _restamp(target, now)
        shutil.rmtree(target / _PACKING)
    except OSError as error:
        where = error.filename or target
        raise UserError(f"{where}: cannot be written: {error.strerror or error}") from None
    size = sum(facts["bytes"] for facts in done.values())
    mended = tuple(job.name for job in left if job.name in known)
    written = sum(len(job.samples) for job in left)
    left_out = listing.left_out
    return Packed(total, written, len(done), size, mended, left_out, listing.root, sources)


def _jobs(listing: Listing, key: str, shard_samples: int) -> Iterator[_Job]:
    split: Split = getattr(listing, key)
    order: Indices = np.arange(len(split.labels))
    if key == "train":
        order = np.random.default_rng(0).permutation(len(order))
    for number, first in enumerate(range(0, len(order), shard_samples)):
        chosen = order[first : first + shard_samples]
        samples = [(os.fsdecode(split.paths[i]), int(split.labels[i])) for i in chosen]
        yield _Job(f"{key}-{number:06d}.tar", first, samples)


def _identity(listing: Listing, jobs: dict[str, list[_Job]]) -> str:
    """Changes with the classes, the files' names and how they are cut."""
    digest = hashlib.sha256(json.dumps([FORMAT, listing.classes]).encode())
    for key in jobs:
        for job in jobs[key]:
            digest.update(json.dumps([job.name, job.samples]).encode())
    return digest.hexdigest()


def _known(
    target: Path, identity: str, jobs: list[_Job], now: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Facts of the shards that were written before, by name.

    Of a set that is not finished, shards whose sources have changed are written again.
    """
    stamp = target / _PACKING / _STAMP
    if (target / DATASET).exists():
        manifest = read_manifest(target)
        if manifest.get("identity") != identity:
            raise UserError(
                f"{target}: holds shards of other images, or of another --shard-samples; name "
                f"another folder"
            )
        return {entry["name"]: entry for entry in manifest["train"] + manifest["val"]}
    if stamp.exists() and stamp.read_text() != identity:
        raise UserError(
            f"{target}: shards of other images, or of another --shard-samples, were begun here; "
            f"remove it"
        )
    if not stamp.exists():
        foreign = next((job.name for job in jobs if (target / job.name).exists()), None)
        if foreign is not None:
            raise UserError(
                f"{target}: {foreign} is there already, and pack did not write it; name another "
                f"folder"
            )
    known = {}
    for job in jobs:
        # A note that is torn is as good as none: its shard is written again.
        with contextlib.suppress(OSError, ValueError):
            facts = json.loads((target / _PACKING / f"{job.name}.json").read_bytes())
            if facts.get("source") == now[job.name]:
                known[job.name] = facts
    return known


def _begin(target: Path, identity: str) -> None:
    """Make the folder; the stamp that says whose it is stays as it is."""
    (target / _PACKING).mkdir(parents=True, exist_ok=True)
    if not (target / _PACKING / _STAMP).exists():
        _write_synced(target / _PACKING / _STAMP, identity)


def _write_synced(path: Path, text: str) -> None:
    """The whole text under its name, or nothing."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.rename(path)


def _is_there(target: Path, facts: dict[str, Any]) -> bool:
    path = target / str(facts["name"])
    return path.is_file() and path.stat().st_size == int(facts["bytes"])


def _index_is_sound(target: Path) -> bool:
    """Whether dataset.json is there and the index is what it says."""
    if not (target / DATASET).exists() or not (target / INDEX).exists():
        return False
    return bool(read_manifest(target)["index"] == sha256_of(target / INDEX))


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
    return ProcessPoolExecutor(workers, context, initializer=leave_with_owner)


def _write_all(
    root: str,
    target: Path,
    jobs: list[_Job],
    sums: dict[str, str],
    workers: int,
    now: dict[str, str],
) -> Iterator[tuple[dict[str, Any], int]]:
    """Write shards in parallel; yields each one's facts and number of samples when it is done."""
    if min(workers, len(jobs)) <= 1:
        for job in jobs:
            facts = _write(root, target, job, sums.get(job.name), now[job.name])
            yield facts, len(job.samples)
        return
    with _pool(min(workers, len(jobs))) as pool:
        running = {
            pool.submit(_write, root, target, job, sums.get(job.name), now[job.name]): job
            for job in jobs
        }
        try:
            for future in as_completed(running):
                yield future.result(), len(running[future].samples)
        except BrokenProcessPool:
            raise UserError(
                "a packing process was killed: out of memory? try fewer --workers"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write(root: str, target: Path, job: _Job, wanted: str | None, stamp: str) -> dict[str, Any]:
    """One shard; its name is its own only when it is whole, and what it was before."""
    draft = target / _PACKING / f"{job.name}.{os.getpid()}.tmp"
    try:
        facts = _fill(root, draft, job) | {"source": stamp}
        if wanted is not None and facts["sha256"] != wanted:
            raise UserError(f"{target / job.name}: not what it was: files of {root} have changed")
        draft.rename(target / job.name)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _write_synced(target / _PACKING / f"{job.name}.json", json.dumps(facts))
    return facts


def _fill(root: str, draft: Path, job: _Job) -> dict[str, Any]:
    offsets, sizes = [], []
    with draft.open("wb") as file:
        out = HashingWriter(file)
        with tarfile.open(fileobj=cast(Any, out), mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (path, label) in enumerate(job.samples, start=job.first):
                stem, _, extension = path.rpartition("/")[2].rpartition(".")
                key = f"{number:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:60]}"
                try:
                    data = Path(root, path).read_bytes()
                except OSError as error:
                    problem = f"{Path(root, path)}: cannot be read: {error.strerror}"
                    raise UserError(problem) from None
                offsets.append(_add(tar, f"{key}.{extension.lower()}", data))
                sizes.append(len(data))
                _add(tar, f"{key}.cls", str(label).encode())
        file.flush()
        os.fsync(file.fileno())
    return {
        "name": job.name,
        "bytes": out.position,
        "sha256": out.digest.hexdigest(),
        "offset": offsets,
        "size": sizes,
        "labels": [label for _, label in job.samples],
    }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file and return where its bytes begin."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o444
    begin = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return begin


def _finish(
    target: Path,
    identity: str,
    classes: tuple[str, ...],
    jobs: dict[str, list[_Job]],
    done: dict[str, dict[str, Any]],
) -> None:
    """The index, then dataset.json, which says that all is there.

    Of shards that an earlier run finished, the manifest does not say where the images lie.
    """
    arrays, entries = {}, {}
    for key in jobs:
        facts = [done[job.name] for job in jobs[key]]
        entries[key] = [{field: f[field] for field in _ENTRY if field in f} for f in facts]
        tables = [
            list(zip(f["offset"], f["size"], f["labels"], strict=True))
            if "offset" in f
            else scan_tar(target / f["name"])
            for f in facts
        ]
        table = np.array([row for rows in tables for row in rows], dtype=np.int64).reshape(-1, 3)
        arrays[f"{key}/shard"] = np.repeat(np.arange(len(facts)), [len(rows) for rows in tables])
        for i, array in enumerate(("offset", "size", "labels")):
            arrays[f"{key}/{array}"] = np.ascontiguousarray(table[:, i])
    draft = target / _PACKING / INDEX
    save_file(arrays, draft)
    let_umask_decide(draft)
    sync(draft)
    index = sha256_of(draft)
    draft.rename(target / INDEX)
    manifest = {"format": FORMAT, "identity": identity, "classes": classes, "index": index}
    _write_synced(target / DATASET, json.dumps(manifest | entries, indent=1) + "\n")
    sync(target)


def _restamp(target: Path, now: dict[str, str]) -> None:
    """Note the times of sources that were written anew with the same bytes."""
    manifest = read_manifest(target)
    for entry in manifest["train"] + manifest["val"]:
        entry["source"] = now[entry["name"]]
    _write_synced(target / DATASET, json.dumps(manifest, indent=1) + "\n")
