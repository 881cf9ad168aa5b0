"""Locate the images in tar shards.

``hvd-lars pack`` writes ``dataset.json`` (classes, and size and SHA-256 of every shard) and
``index.safetensors`` (the location of every image).  Other shards in WebDataset's layout have
neither: their headers are read once and the result is cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hvd_lars.data.identity import DataIdentity, SplitIdentity
from hvd_lars.data.listing import read_arrays, write_arrays
from hvd_lars.data.naming import (
    count_left_out,
    describe_left_out,
    image_endings,
    is_litter,
)
from hvd_lars.data.source import Indices
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user, sha256_of

DATASET, INDEX = "dataset.json", "index.safetensors"
FORMAT = "hvd_lars shards 1"
_INDEX_FORMAT = "index 2"
_ARRAYS = ("shard", "offset", "size", "labels")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")


@dataclass(frozen=True)
class ShardSplit:
    """Images of one split: ``shard`` (a position in ``names``), ``offset``, ``size``, ``labels``.

    All four are (n,) int64; offset and size are in bytes.
    """

    names: tuple[str, ...]
    shard: Indices
    offset: Indices
    size: Indices
    labels: Indices


@dataclass(frozen=True)
class ShardSet:
    """A sharded data set: ``bytes`` of every shard, ``sha256`` if known.

    ``version`` changes with the files or their location; ``left_out`` counts skipped members by
    kind, in one line.
    """

    root: str
    version: str
    classes: tuple[str, ...]
    train: ShardSplit
    val: ShardSplit
    bytes: dict[str, int]
    sha256: dict[str, str]
    left_out: str = ""

    def identity(self) -> DataIdentity:
        """Return the identity that a run records of its data, wherever the shards are."""
        return DataIdentity(self.classes, self._of(self.train), self._of(self.val))

    def _of(self, split: ShardSplit) -> SplitIdentity:
        facts = [[name, self.bytes[name], self.sha256.get(name)] for name in split.names]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for array in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(split, array)).tobytes())
        return SplitIdentity(len(split.labels), digest.hexdigest())


def load_shards(
    root: str, train: str, val: str, cache: Path | None, num_classes: int | None = None
) -> ShardSet:
    """Load the data set in ``root`` after checking that every shard is complete.

    Args:
        root: a folder that ``hvd-lars pack`` wrote, or one of shards in WebDataset's layout.
        train: pattern of the training shards' names, for a folder without dataset.json.
        val: the same for the evaluation shards.
        cache: where the index of such a folder is cached.
        num_classes: of such a folder; if None, the number of labels in training.

    Raises:
        UserError: a shard is missing, truncated or not a tar file, a sample is not one image and
            one label, or a label is out of range.
    """
    folder = expand_user(root, "data.root")
    if (folder / DATASET).is_file():
        found = _load_packed(folder)
    else:
        found = _load_foreign(folder, {"train": train, "val": val}, cache, num_classes)
    for name, size in found.bytes.items():
        try:
            actual = (folder / name).stat().st_size
        except OSError as error:
            raise UserError(f"data.root: {folder / name}: {error.strerror}") from None
        if actual != size:
            raise UserError(
                f"data.root: {folder / name}: truncated or replaced: {actual} bytes, the index "
                f"says {size}"
            )
    for key, split in (("train", found.train), ("val", found.val)):
        _check_split(folder, key, split, found)
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read dataset.json, which names shards by plain file names.

    Raises:
        UserError: it is damaged, of a later version, or names a file outside the folder.
    """
    path = folder / DATASET
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: format {manifest['format']!r}; {FORMAT!r} is supported")
        for split in ("train", "val"):
            if not isinstance(manifest[split], list):
                raise ValueError(f"{split} is not a list")
            for entry in manifest[split]:
                if not _SHARD_NAME.fullmatch(entry["name"]):
                    raise UserError(f"{path}: {entry['name']!r} is not the name of a shard")
                int(entry["bytes"]), str(entry["sha256"]), str(manifest["index"])
        if not all(isinstance(name, str) for name in manifest["classes"]):
            raise ValueError("classes are not names")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    return dict(manifest)


def _load_packed(folder: Path) -> ShardSet:
    manifest = read_manifest(folder)
    try:
        if sha256_of(folder / INDEX) != manifest["index"]:
            raise UserError(
                f"{folder / INDEX}: damaged: does not match {DATASET}'s SHA-256; pack again"
            )
        arrays = load_file(folder / INDEX)
        train, val = (
            ShardSplit(
                tuple(entry["name"] for entry in manifest[key]),
                *(arrays[f"{key}/{array}"].astype(np.int64) for array in _ARRAYS),
            )
            for key in ("train", "val")
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder / INDEX}: damaged: {error}; pack again") from None
    entries = manifest["train"] + manifest["val"]
    return ShardSet(
        str(folder),
        manifest["index"],
        tuple(manifest["classes"]),
        train,
        val,
        {entry["name"]: entry["bytes"] for entry in entries},
        {entry["name"]: entry["sha256"] for entry in entries},
    )


def _check_split(folder: Path, key: str, split: ShardSplit, found: ShardSet) -> None:
    """Check that every image is inside its shard and every label is a class."""
    count = split.labels.size
    if count == 0:
        raise UserError(f"data.root: {folder}: no images in {key}")
    if (
        any(getattr(split, array).shape != (count,) for array in _ARRAYS)
        or not ((split.shard >= 0) & (split.shard < len(split.names))).all()
    ):
        raise UserError(f"{folder / INDEX}: damaged: its arrays do not fit together")
    sizes = np.array([found.bytes[name] for name in split.names])
    room = sizes[split.shard] - split.offset  # compared with size, as a sum could overflow
    bad = (split.offset < 512) | (split.size < 0) | (split.size > room)
    if bad.any():
        raise UserError(
            f"data.root: {folder / split.names[split.shard[bad.argmax()]]}: an image lies beyond "
            f"its end"
        )
    classes = len(found.classes)
    out = (split.labels < 0) | (split.labels >= classes)
    if out.any():
        i = int(out.argmax())
        path = folder / split.names[split.shard[i]]
        raise UserError(
            f"data.root: {path}: the image at byte {split.offset[i]} has label {split.labels[i]}; "
            f"allowed with {classes} classes: 0 to {classes - 1}"
        )


def _load_foreign(
    folder: Path, patterns: dict[str, str], cache: Path | None, num_classes: int | None
) -> ShardSet:
    paths: dict[str, list[Path]] = {}
    for key, pattern in patterns.items():
        try:
            if ".." in Path(pattern).parts:
                raise ValueError("leads out of data.root")
            paths[key] = sorted(path for path in folder.glob(pattern) if path.is_file())
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"data.{key}_shards: {pattern!r}: {error}") from None
        if not paths[key]:
            raise UserError(
                f"data.root: {folder}: neither {DATASET} nor shards that match {pattern} in it"
            )
    names = {key: tuple(str(p.relative_to(folder)) for p in paths[key]) for key in paths}
    sizes = {str(p.relative_to(folder)): p.stat().st_size for key in paths for p in paths[key]}
    times = [p.stat().st_mtime_ns for key in paths for p in paths[key]]
    endings = sorted(image_endings())  # another version of Pillow may read more
    text = json.dumps([_INDEX_FORMAT, str(folder.resolve()), names, sizes, times, endings])
    file = cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz" if cache else None
    wanted = [f"{key}_{array}" for key in paths for array in _ARRAYS] + ["left_out"]
    arrays = read_arrays(file, wanted) if file is not None else None
    if arrays is None:
        arrays, left_out = {}, Counter[str]()
        for key in paths:
            rows = [
                (number, *row)
                for number, path in enumerate(paths[key])
                for row in scan_tar(path, left_out)
            ]
            table = np.array(rows, dtype=np.int64).reshape(-1, 4)
            arrays |= {f"{key}_{array}": table[:, i] for i, array in enumerate(_ARRAYS)}
        arrays["left_out"] = np.array(describe_left_out(left_out))
        if file is not None:
            write_arrays(file, arrays)
    train, val = (ShardSplit(names[k], *(arrays[f"{k}_{a}"] for a in _ARRAYS)) for k in paths)
    count = num_classes or len(np.unique(train.labels))
    classes = tuple(map(str, range(count)))
    left = str(arrays["left_out"])
    return ShardSet(str(folder), text, classes, train, val, sizes, {}, left)


def scan_tar(path: Path, left_out: Counter[str] | None = None) -> list[tuple[int, int, int]]:
    """Return offset and size in bytes, and label, of every sample of a WebDataset shard.

    A sample is the files whose names agree up to the first dot of the last part: an image, and
    ``.cls``, which holds the label as text.  Hidden files and groups with neither are skipped and
    counted in ``left_out``.

    Raises:
        UserError: not an uncompressed tar file, truncated, or a sample is not one image and one
            label.
    """
    samples: dict[str, _Sample] = {}
    end = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            files: dict[str, tarfile.TarInfo] = {}
            for member in tar:
                if member.islnk():  # a second name of an earlier file
                    target = files.get(member.linkname)
                    if target is None:
                        raise UserError(
                            f"{path}: {_shown(member.name)} is a link to "
                            f"{_shown(member.linkname)}, which does not precede it in the shard"
                        )
                    member.offset_data, member.size = target.offset_data, target.size
                elif member.isfile():
                    files[member.name] = member
                else:
                    if not member.isdir() and left_out is not None:
                        left_out["links and devices"] += 1
                    continue
                if member.offset_data + member.size > end:
                    raise UserError(f"{path}: truncated: it ends inside {_shown(member.name)}")
                _take(path, file.fileno(), member, samples, left_out)
            # tarfile takes a damaged header for the end: the real end is a block of zeros.
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{path}: truncated or damaged at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: truncated, or not an uncompressed tar file: {error}") from None
    rows = []
    for key, sample in samples.items():
        if sample.image is not None and sample.label is not None:
            rows.append((sample.image.offset_data, sample.image.size, sample.label))
        elif sample.image is not None or sample.label is not None:
            lacks = ".cls label" if sample.image is not None else "readable image"
            others = f" (found {', '.join(map(_shown, sample.others))})" if sample.others else ""
            raise UserError(f"{path}: sample {_shown(key)} has no {lacks}{others}")
        elif left_out is not None:
            for name in sample.others:
                count_left_out(left_out, name)
    return rows


@dataclass
class _Sample:
    """The files of a shard under one key; ``others`` are names of unused files."""

    image: tarfile.TarInfo | None = None
    label: int | None = None
    others: list[str] = field(default_factory=list)


def _take(
    path: Path,
    file: int,
    member: tarfile.TarInfo,
    samples: dict[str, _Sample],
    left_out: Counter[str] | None,
) -> None:
    """Add a member to its sample."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    hidden = next((part for part in parts if is_litter(part)), None)
    base = hidden or (parts[-1] if parts else "")
    stem, dot, extension = base.partition(".")
    if hidden is not None or not dot:  # no dot: a README, which WebDataset skips, too
        if left_out is not None:
            count_left_out(left_out, base)
        return
    key = "/".join([*parts[:-1], stem])
    sample = samples.setdefault(key, _Sample())
    if extension.lower() == "cls":
        if sample.label is not None:
            raise UserError(f"{path}: sample {_shown(key)} has two labels (.cls); it must have one")
        sample.label = _label(path, file, member)
    elif f".{extension.lower()}" in image_endings():
        if sample.image is not None:
            raise UserError(
                f"{path}: sample {_shown(key)} has two images, {_shown(sample.image.name)} and "
                f"{_shown(member.name)}; it must have one image and one label"
            )
        sample.image = member
    else:
        sample.others.append(base)


def _shown(name: str) -> str:
    """Return the name on one line, whatever its characters."""
    return name if name.isprintable() else repr(name)


def _label(path: Path, file: int, member: tarfile.TarInfo) -> int:
    text = os.pread(file, min(member.size, 99), member.offset_data)
    try:
        label = int(text)
        if abs(label) >= 2**31:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{path}: {_shown(member.name)}: found {text[:40]!r}; a label must be a number"
        ) from None
    return label
