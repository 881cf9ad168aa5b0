"""Pack a data set in any form into tar shards in WebDataset's layout.

A shard is written under another name, synced and renamed, then its facts are written to
``.packing/``, so that an interrupted pack keeps its finished shards.  The same data give the same
bytes.
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
from PIL import Image
from safetensors.numpy import save_file

from hvd_lars.data.naming import ending_of, image_endings
from hvd_lars.data.shards.index import DATASET, FORMAT, INDEX, read_manifest
from hvd_lars.data.shards.origins import compare, stamps
from hvd_lars.data.shards.samples import scan_tar
from hvd_lars.data.shards.samples_to_pack import Collection, Samples, collect, stored_order
from hvd_lars.data.shards.shrink import Shrink
from hvd_lars.data.source import Indices
from hvd_lars.data.worker_processes import leave_with_owner
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import HashingWriter, let_umask_decide, sha256_of, sync

_PACKING, _STAMP = ".packing", "identity"
_SPLITS = ("train", "val", "validation")  # folders of a data set's images
_ENTRY = ("name", "bytes", "sha256", "source")  # of a shard in dataset.json


@dataclass(frozen=True)
class _Job:
    """One shard to write; ``chosen`` are the positions of its samples in their split."""

    name: str
    first: int
    chosen: Indices
    samples: Samples


@dataclass(frozen=True)
class Packed:
    """The result of a pack; ``written`` counts this call's samples, ``mended`` names shards.

    A mended shard was written before, but was missing or of another size.  ``left_out`` counts the
    skipped files by kind; ``sources`` are for :func:`compare`.
    """

    samples: int
    written: int
    shards: int
    bytes: int
    mended: tuple[str, ...]
    left_out: str
    sources: dict[str, Samples]


def pack(
    source: str,
    target: Path,
    workers: int,
    shard_samples: int,
    progress: Callable[[int, int], None],
    shrink: Shrink | None = None,
) -> Packed:
    """Write the shards of ``source``, a data set in any form, that ``target`` lacks.

    Training images are shuffled once, so that streaming readers see them mixed; Parquet's keep
    their order.  The index has the order of the source.  If the size or time of a source file has
    changed, its shard is compared with its sources.

    Args:
        source: folder of the data set.
        target: folder to create.
        workers: number of processes.
        shard_samples: images per shard.
        progress: called with the numbers of finished samples and of all samples.
        shrink: makes large images smaller.

    Raises:
        UserError: no data set is there, or ``target`` holds another one's shards, no longer
            matches its sources or cannot be written.
    """
    _check_apart(Path(source).expanduser().resolve(), target)
    found = collect(source, shrink)
    jobs = _jobs_of(found, shard_samples)
    identity = _identity(found, jobs, shrink)
    total = len(found.train) + len(found.val)
    everything = [job for key in jobs for job in jobs[key]]
    sources = {job.name: job.samples for job in everything}
    now = stamps(sources)
    try:
        known = _known(target, identity, everything, now)
        done = {name: facts for name, facts in known.items() if _is_there(target, facts)}
        touched = {name: sources[name] for name in done if done[name].get("source") != now[name]}
        compare(target, touched, lambda *_: None)
        _begin(target, identity)
        left = [job for job in everything if job.name not in done]
        count = total - sum(len(job.samples) for job in left)
        progress(count, total)
        sums = {name: facts["sha256"] for name, facts in known.items()}
        for facts, samples in _write_all(target, left, sums, workers, now):
            done[facts["name"]] = facts
            count += samples
            progress(count, total)
        if not _index_is_sound(target):
            _finish(target, identity, found, jobs, done, shrink)
        if touched:
            _restamp(target, now)
        shutil.rmtree(target / _PACKING)
    except OSError as error:
        where = error.filename or target
        raise UserError(f"{where}: cannot be written: {error.strerror or error}") from None
    size = sum(facts["bytes"] for facts in done.values())
    mended = tuple(job.name for job in left if job.name in known)
    written = sum(len(job.samples) for job in left)
    return Packed(total, written, len(done), size, mended, found.left_out, sources)


def _check_apart(source: Path, target: Path) -> None:
    """Raise UserError if the shards would lie among the images."""
    place = target.resolve()
    inside = place.is_relative_to(source) and place.relative_to(source).parts[:1]
    if place == source or inside and inside[0] in _SPLITS:
        raise UserError(f"{target}: is the data set itself; name another folder for its shards")


def _jobs_of(found: Collection, shard_samples: int) -> dict[str, list[_Job]]:
    return {
        "train": list(_jobs("train", found.train, shard_samples, found.shuffle)),
        "val": list(_jobs("val", found.val, shard_samples, None if found.shuffle else False)),
    }


def _jobs(key: str, samples: Samples, shard_samples: int, shuffle: bool | None) -> Iterator[_Job]:
    """Yield the shards of a split: shuffled, in the order of their files (False), or as it is."""
    order: Indices = np.arange(len(samples))
    if shuffle:
        order = np.random.default_rng(0).permutation(len(order))
    elif shuffle is False:
        order = stored_order(samples)
    for number, first in enumerate(range(0, len(order), shard_samples)):
        chosen = order[first : first + shard_samples]
        yield _Job(f"{key}-{number:06d}.tar", first, chosen, samples.take(chosen))


def _identity(found: Collection, jobs: dict[str, list[_Job]], shrink: Shrink | None) -> str:
    """Return a hash of the classes, the files' names, their split into shards, and the shrink."""
    how = [] if shrink is None else [str(shrink)]
    digest = hashlib.sha256(json.dumps([FORMAT, found.classes, *how]).encode())
    for key in jobs:
        for job in jobs[key]:
            digest.update(json.dumps([job.name, job.samples.facts()]).encode())
    return digest.hexdigest()


def _known(
    target: Path, identity: str, jobs: list[_Job], now: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Return the facts of the shards that were written before, by name.

    In an unfinished set, shards whose sources have changed are written again.
    """
    stamp = target / _PACKING / _STAMP
    if (target / DATASET).exists():
        manifest = read_manifest(target)
        if manifest.get("identity") != identity:
            raise UserError(
                f"{target}: holds shards of other images, or of other options of pack; name "
                f"another folder"
            )
        return {entry["name"]: entry for entry in manifest["train"] + manifest["val"]}
    if stamp.exists() and stamp.read_text() != identity:
        raise UserError(
            f"{target}: holds an unfinished pack of other images, or of other options of pack; "
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
        # If a shard's facts are torn, it is written again.
        with contextlib.suppress(OSError, ValueError):
            facts = json.loads((target / _PACKING / f"{job.name}.json").read_bytes())
            if facts.get("source") == now[job.name]:
                known[job.name] = facts
    return known


def _begin(target: Path, identity: str) -> None:
    """Create the folder and the stamp of its identity, if missing."""
    (target / _PACKING).mkdir(parents=True, exist_ok=True)
    if not (target / _PACKING / _STAMP).exists():
        _write_synced(target / _PACKING / _STAMP, identity)


def _write_synced(path: Path, text: str) -> None:
    """Write the whole text under its name, or nothing."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.rename(path)


def _is_there(target: Path, facts: dict[str, Any]) -> bool:
    path = target / str(facts["name"])
    return path.is_file() and path.stat().st_size == int(facts["bytes"])


def _index_is_sound(target: Path) -> bool:
    """Return whether dataset.json exists and matches the index."""
    if not (target / DATASET).exists() or not (target / INDEX).exists():
        return False
    return bool(read_manifest(target)["index"] == sha256_of(target / INDEX))


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
    return ProcessPoolExecutor(workers, context, initializer=leave_with_owner)


def _write_all(
    target: Path,
    jobs: list[_Job],
    sums: dict[str, str],
    workers: int,
    now: dict[str, str],
) -> Iterator[tuple[dict[str, Any], int]]:
    """Write shards in parallel; yields the facts and sample count of each finished shard."""
    if min(workers, len(jobs)) <= 1:
        for job in jobs:
            facts = _write(target, job, sums.get(job.name), now[job.name])
            yield facts, len(job.samples)
        return
    with _pool(min(workers, len(jobs))) as pool:
        running = {
            pool.submit(_write, target, job, sums.get(job.name), now[job.name]): job for job in jobs
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


def _write(target: Path, job: _Job, wanted: str | None, stamp: str) -> dict[str, Any]:
    """Write one shard, renamed only if it is complete and the same as before."""
    draft = target / _PACKING / f"{job.name}.{os.getpid()}.tmp"
    try:
        facts = _fill(draft, job) | {"source": stamp}
        if wanted is not None and facts["sha256"] != wanted:
            raise UserError(
                f"{target / job.name}: files of {job.samples.root} changed since it was packed; "
                f"name another folder for the shards"
            )
        draft.rename(target / job.name)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _write_synced(target / _PACKING / f"{job.name}.json", json.dumps(facts))
    return facts


def _fill(draft: Path, job: _Job) -> dict[str, Any]:
    offsets, sizes = [], []
    labels = job.samples.labels
    with draft.open("wb") as file:
        out = HashingWriter(file)
        with tarfile.open(fileobj=cast(Any, out), mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index, (name, label) in enumerate(job.samples.facts()):
                stem = os.path.splitext(name.rpartition("/")[2])[0]
                key = f"{job.first + index:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:60]}"
                data = job.samples.read(index)
                ending = _ending(name, data, job.samples.shrink is not None)
                offsets.append(_add(tar, f"{key}.{ending}", data))
                sizes.append(len(data))
                _add(tar, f"{key}.cls", str(label).encode())
        file.flush()
        os.fsync(file.fileno())
    job.samples.store.close()
    return {
        "name": job.name,
        "bytes": out.position,
        "sha256": out.digest.hexdigest(),
        "offset": offsets,
        "size": sizes,
        "labels": labels,
    }


def _ending(name: str, data: bytes, shrunk: bool) -> str:
    """Return the extension of a packed image: of its name, or of its format if that has none."""
    ending = ending_of(name.rpartition("/")[2])
    if ending in image_endings() and not shrunk:
        return ending[1:]
    try:
        with Image.open(io.BytesIO(data)) as file:
            format_ = file.format
    except (OSError, Image.DecompressionBombError):  # training will not read it, either
        format_ = "JPEG"
    usual = {"JPEG": "jpg", "PNG": "png"}
    others = sorted(e[1:] for e, kind in Image.registered_extensions().items() if kind == format_)
    return usual.get(str(format_)) or next(iter(others), "jpg")


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
    found: Collection,
    jobs: dict[str, list[_Job]],
    done: dict[str, dict[str, Any]],
    shrink: Shrink | None,
) -> None:
    """Write the index, then dataset.json, which marks the set as complete.

    Shards that an earlier run finished are scanned: the manifest does not locate their images.
    """
    arrays, entries = {}, {}
    # Runs that have begun on the shards of an earlier version know them in the shards' order.
    earlier = (target / DATASET).exists() and "images" not in read_manifest(target)
    for key in jobs:
        facts = [done[job.name] for job in jobs[key]]
        entries[key] = [{field: f[field] for field in _ENTRY if field in f} for f in facts]
        tables = [
            list(zip(f["offset"], f["size"], f["labels"], strict=True))
            if "offset" in f
            else scan_tar(target / f["name"])
            for f in facts
        ]
        shards = np.repeat(np.arange(len(facts)), [len(rows) for rows in tables])
        written = np.array([row for rows in tables for row in rows], dtype=np.int64).reshape(-1, 3)
        order = np.concatenate([np.arange(0), *(job.chosen for job in jobs[key])])
        table = np.empty((len(order), 4), dtype=np.int64)
        table[np.arange(len(order)) if earlier else order] = np.column_stack([shards, written])
        for i, array in enumerate(("shard", "offset", "size", "labels")):
            arrays[f"{key}/{array}"] = np.ascontiguousarray(table[:, i])
    draft = target / _PACKING / INDEX
    save_file(arrays, draft)
    let_umask_decide(draft)
    sync(draft)
    index = sha256_of(draft)
    draft.rename(target / INDEX)
    manifest: dict[str, Any] = {"format": FORMAT, "identity": identity, "classes": found.classes}
    manifest |= {"index": index} if earlier else {"index": index, "images": found.images}
    if shrink is not None:
        manifest["prepared"] = str(shrink)
    _write_synced(target / DATASET, json.dumps(manifest | entries, indent=1) + "\n")
    sync(target)


def _restamp(target: Path, now: dict[str, str]) -> None:
    """Record the times of sources that were rewritten with the same bytes."""
    manifest = read_manifest(target)
    for entry in manifest["train"] + manifest["val"]:
        entry["source"] = now[entry["name"]]
    _write_synced(target / DATASET, json.dumps(manifest, indent=1) + "\n")
