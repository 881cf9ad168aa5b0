"""Which images an ImageNet-like folder holds; imports errors.

Scanned by one rank and remembered: a million files are not listed by every rank at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from hvd_lars.data.source import Indices
from hvd_lars.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")
Paths = np.ndarray[tuple[int], np.dtype[np.bytes_]]


@dataclass(frozen=True)
class Split:
    """Images of ``train`` or ``val``: paths below the root as bytes, and labels, both (n,)."""

    paths: Paths
    labels: Indices


@dataclass(frozen=True)
class Listing:
    """An ImageNet-like folder: ``root/train/CLASS/image`` and ``root/val/CLASS/image``."""

    root: str
    classes: tuple[str, ...]
    train: Split
    val: Split


def list_folder(root: str, cache: Path | None) -> Listing:
    """List both splits, or read the list from ``cache`` if no class folder has changed since.

    Raises:
        UserError: a split or its class folders are missing, a class has no images, or the
            classes of the splits differ.
    """
    folder = Path(root).expanduser()
    classes = {split: _class_folders(folder, split) for split in ("train", "val")}
    odd = sorted(set(classes["train"]) ^ set(classes["val"]))
    if odd:
        where, other = ("train", "val") if odd[0] in classes["train"] else ("val", "train")
        raise UserError(
            f"data.root: {folder}: class {odd[0]} is in {where} but not in {other} "
            f"({len(odd)} in one split only)"
        )
    names = [f"{key}_{field}" for key in ("train", "val") for field in ("paths", "labels")]
    file = cache / f"{_key(folder, classes)}.npz" if cache is not None else None
    arrays = read_arrays(file, names) if file is not None else None
    if arrays is None:
        train, val = (_scan(folder, key, classes[key]) for key in ("train", "val"))
        arrays = dict(zip(names, (train.paths, train.labels, val.paths, val.labels), strict=True))
        if file is not None:
            write_arrays(file, arrays)
    train, val = (
        Split(arrays[f"{key}_paths"], arrays[f"{key}_labels"]) for key in ("train", "val")
    )
    return Listing(str(folder), tuple(classes["train"]), train, val)


def _class_folders(folder: Path, split: str) -> list[str]:
    """Sorted names of the class folders of a split."""
    try:
        with os.scandir(folder / split) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise UserError(
            f"data.root: {folder / split}: {error.strerror}; a folder with one folder of images "
            f"a class is expected"
        ) from None
    if not names:
        raise UserError(f"data.root: {folder / split}: no class folders in it")
    return names


def _key(folder: Path, classes: dict[str, list[str]]) -> str:
    """Changes when a file is added to or removed from any class folder."""
    facts = [
        [split, name, (folder / split / name).stat().st_mtime_ns]
        for split, names in classes.items()
        for name in names
    ]
    text = json.dumps([str(folder.resolve()), facts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _scan(folder: Path, split: str, classes: list[str]) -> Split:
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        try:
            with os.scandir(folder / split / name) as entries:
                images = sorted(e.name for e in entries if e.name.lower().endswith(EXTENSIONS))
        except OSError as error:
            raise UserError(f"data.root: {folder / split / name}: {error.strerror}") from None
        if not images:
            raise UserError(f"data.root: {folder / split / name}: no images in it")
        paths += [os.fsencode(f"{split}/{name}/{image}") for image in images]
        labels += [label] * len(images)
    return Split(np.array(paths), np.array(labels, dtype=np.int64))


def read_arrays(file: Path, names: list[str]) -> dict[str, Any] | None:
    """The named arrays of a cache file; None where it is missing or damaged."""
    try:
        with np.load(file) as kept:
            return {name: kept[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return None


def write_arrays(file: Path, arrays: dict[str, Any]) -> None:
    """Write beside the name and rename; a cache that cannot be written is no loss."""
    draft = file.with_suffix(f".{os.getpid()}.tmp.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(draft, **arrays)
        draft.rename(file)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
