"""Locate the images in tar shards.

``hvd-lars pack`` writes ``dataset.json`` (classes, and size and SHA-256 of every shard) and
``index.safetensors`` (the location of every image).  Other shards in WebDataset's layout have
neither: their headers are read once and the result is cached.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hvd_lars.data.identity import DataIdentity, SplitIdentity
from hvd_lars.data.listing import cache_file, read_arrays, write_arrays
from hvd_lars.data.located import ARRAYS, Located, LocatedSet
from hvd_lars.data.naming import describe_left_out, image_endings, is_litter
from hvd_lars.data.shards.samples import scan_tar
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user, sha256_of

DATASET, INDEX = "dataset.json", "index.safetensors"
FORMAT = "hvd_lars shards 1"
_INDEX_FORMAT = "index 3"
_STORED = ("shard", "offset", "size", "labels")  # names of located.ARRAYS in the index file
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")


def load_shards(
    root: str,
    train: str,
    val: str,
    cache: Path | None,
    num_classes: int | None = None,
    needs_val: bool = True,
) -> LocatedSet:
    """Load the data set in ``root`` after checking that every shard is complete.

    Args:
        root: a folder that ``hvd-lars pack`` wrote, or one of shards in WebDataset's layout.
        train: pattern of the training shards' names, for a folder without dataset.json.
        val: the same for the evaluation shards.
        cache: where the index of such a folder is cached.
        num_classes: of such a folder; if None, the number of labels in training.
        needs_val: whether evaluation shards are needed; without, that split is empty.

    Raises:
        UserError: a shard is missing, truncated or not a tar file, a sample is not one image and
            one label, or a label is out of range.
    """
    folder = expand_user(root, "data.root")
    if (folder / DATASET).is_file():
        found = _load_packed(folder)
    else:
        patterns = {"train": train, "val": val if needs_val else None}
        found = _load_foreign(folder, patterns, cache, num_classes)
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
    for key, split in (("train", found.train), ("val", found.val))[: 1 + needs_val]:
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
            if "images" in manifest and not isinstance(manifest["images"][split], str):
                raise ValueError("images is not a hash for each split")
        if not all(isinstance(name, str) for name in manifest["classes"]):
            raise ValueError("classes are not names")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    return dict(manifest)


def _load_packed(folder: Path) -> LocatedSet:
    manifest = read_manifest(folder)
    try:
        if sha256_of(folder / INDEX) != manifest["index"]:
            raise UserError(
                f"{folder / INDEX}: damaged: does not match {DATASET}'s SHA-256; pack again"
            )
        arrays = load_file(folder / INDEX)
        train, val = (
            Located(
                tuple(entry["name"] for entry in manifest[key]),
                *(arrays[f"{key}/{array}"].astype(np.int64) for array in _STORED),
            )
            for key in ("train", "val")
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder / INDEX}: damaged: {error}; pack again") from None
    entries = manifest["train"] + manifest["val"]
    sizes = {entry["name"]: entry["bytes"] for entry in entries}
    sums = {entry["name"]: entry["sha256"] for entry in entries}
    classes = tuple(manifest["classes"])
    if "images" in manifest:  # the identity of the folder that was packed
        train_identity, val_identity = (
            SplitIdentity(len(split.labels), manifest["images"][key])
            for key, split in (("train", train), ("val", val))
        )
        prepared = str(manifest.get("prepared", ""))
        identity = DataIdentity(classes, train_identity, val_identity, prepared)
    else:
        identity = _identity(classes, train, val, sizes, sums)
    version = manifest["index"]
    return LocatedSet(str(folder), version, classes, train, val, sizes, sums, identity)


def _identity(
    classes: tuple[str, ...],
    train: Located,
    val: Located,
    sizes: dict[str, int],
    sums: dict[str, str],
) -> DataIdentity:
    """Return an identity by names, sizes and checksums of the shards, in whatever folder."""

    def of(split: Located) -> SplitIdentity:
        facts = [[name, sizes[name], sums.get(name)] for name in split.files]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for array in ARRAYS:
            digest.update(np.ascontiguousarray(getattr(split, array)).tobytes())
        return SplitIdentity(len(split.labels), digest.hexdigest())

    return DataIdentity(classes, of(train), of(val))


def _check_split(folder: Path, key: str, split: Located, found: LocatedSet) -> None:
    """Check that every image is inside its shard and every label is a class."""
    count = split.labels.size
    if count == 0:
        instead = "; data.val_fraction=0.02 holds some of the training images out"
        raise UserError(f"data.root: {folder}: no images in {key}{instead if key == 'val' else ''}")
    if (
        any(getattr(split, array).shape != (count,) for array in ARRAYS)
        or not ((split.file >= 0) & (split.file < len(split.files))).all()
    ):
        raise UserError(f"{folder / INDEX}: damaged: its arrays do not fit together")
    sizes = np.array([found.bytes[name] for name in split.files])
    room = sizes[split.file] - split.offset  # compared with size, as a sum could overflow
    bad = (split.offset < 512) | (split.size < 0) | (split.size > room)
    if bad.any():
        raise UserError(
            f"data.root: {folder / split.files[split.file[bad.argmax()]]}: an image lies beyond "
            f"its end"
        )
    classes = len(found.classes)
    out = (split.labels < 0) | (split.labels >= classes)
    if out.any():
        i = int(out.argmax())
        path = folder / split.files[split.file[i]]
        raise UserError(
            f"data.root: {path}: the image at byte {split.offset[i]} has label {split.labels[i]}; "
            f"allowed with {classes} classes: 0 to {classes - 1}"
        )


def _load_foreign(
    folder: Path, patterns: dict[str, str | None], cache: Path | None, num_classes: int | None
) -> LocatedSet:
    paths: dict[str, list[Path]] = {}
    for key, pattern in patterns.items():
        if pattern is None:
            paths[key] = []
            continue
        try:
            if ".." in Path(pattern).parts:
                raise ValueError("leads out of data.root")
            found = (path for path in folder.glob(pattern) if not is_litter(path.name))
            paths[key] = sorted(path for path in found if path.is_file())
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"data.{key}_shards: {pattern!r}: {error}") from None
        if not paths[key]:
            raise UserError(
                f"data.root: {folder}: neither {DATASET} nor shards that match {pattern} in it"
            )
    both = sorted(set(paths["train"]) & set(paths["val"]))
    if both:
        raise UserError(
            f"data.root: {both[0]}: matches data.train_shards {patterns['train']} and "
            f"data.val_shards {patterns['val']}; give patterns that no shard has in common"
        )
    names = {key: tuple(str(p.relative_to(folder)) for p in paths[key]) for key in paths}
    sizes = {str(p.relative_to(folder)): p.stat().st_size for key in paths for p in paths[key]}
    times = [p.stat().st_mtime_ns for key in paths for p in paths[key]]
    endings = sorted(image_endings())  # another version of Pillow may read more
    text = json.dumps([_INDEX_FORMAT, str(folder.resolve()), names, sizes, times, endings])
    file = cache_file(cache, text)
    wanted = [f"{key}_{array}" for key in paths for array in ARRAYS] + ["left_out"]
    arrays = read_arrays(file, wanted)
    if arrays is None:
        arrays, left_out = {}, Counter[str]()
        for key in paths:
            rows = [
                (number, *row)
                for number, path in enumerate(paths[key])
                for row in scan_tar(path, left_out)
            ]
            table = np.array(rows, dtype=np.int64).reshape(-1, 4)
            arrays |= {f"{key}_{array}": table[:, i] for i, array in enumerate(ARRAYS)}
        arrays["left_out"] = np.array(describe_left_out(left_out))
        write_arrays(file, arrays)
    train, val = (Located(names[k], *(arrays[f"{k}_{a}"] for a in ARRAYS)) for k in paths)
    count = num_classes or len(np.unique(train.labels))
    classes = tuple(map(str, range(count)))
    left = str(arrays["left_out"])
    identity = _identity(classes, train, val, sizes, {})
    return LocatedSet(str(folder), text, classes, train, val, sizes, {}, identity, left)
