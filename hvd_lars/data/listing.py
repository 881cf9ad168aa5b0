"""List the images of an ImageNet-like folder.

One rank scans it and caches the list, so that ranks do not list a million files at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from hvd_lars.data.identity import DataIdentity, SplitIdentity
from hvd_lars.data.naming import (
    count_left_out,
    describe_left_out,
    ending_of,
    image_endings,
    is_litter,
)
from hvd_lars.data.source import Indices
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user

Paths = np.ndarray[tuple[int], np.dtype[np.bytes_]]
_SPLITS = ("train", "val")
_FORMAT = "folder list 2"


@dataclass(frozen=True)
class Split:
    """Images of ``train`` or ``val``: paths below the root as bytes, and labels, both (n,)."""

    paths: Paths
    labels: Indices

    def identity(self) -> SplitIdentity:
        """Hash names and labels in their order; the files' bytes are not read."""
        digest = hashlib.sha256(b"\0".join(self.paths.tolist()))
        digest.update(self.labels.tobytes())
        return SplitIdentity(len(self.labels), digest.hexdigest())


@dataclass(frozen=True)
class Listing:
    """An ImageNet-like folder: ``root/train/CLASS/…/image`` and ``root/val/CLASS/…/image``.

    ``left_out`` counts the skipped files by kind, in one line; empty if there are none.
    """

    root: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    left_out: str = ""

    def identity(self) -> DataIdentity:
        """Return the identity that a run records of its data."""
        return DataIdentity(self.classes, self.train.identity(), self.val.identity())


def list_folder(root: str, cache: Path | None) -> Listing:
    """List both splits, or read the list from ``cache`` if no folder has changed since.

    Classes are the folders of a split, sorted by name.  Their images are all files with an
    extension that Pillow reads, in sub-folders too, as in torchvision's ImageFolder.  Hidden files
    and folders, and those that systems leave behind (``__MACOSX``), are skipped.

    Raises:
        UserError: a split or its class folders are missing, a class has no images, or the
            classes of the splits differ.
    """
    folder = expand_user(root, "data.root")
    # Another version of Pillow may read more extensions.
    key = json.dumps([_FORMAT, str(folder.resolve()), sorted(image_endings())])
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz" if cache else None
    names = ["folders", "times", "classes", "left_out"]
    names += [f"{key}_{field}" for key in _SPLITS for field in ("paths", "labels")]
    arrays = read_arrays(file, names) if file is not None else None
    if arrays is None or not _is_as_it_was(folder, arrays):
        arrays = _list(folder)
        if file is not None:
            write_arrays(file, arrays)
    train, val = (Split(arrays[f"{key}_paths"], arrays[f"{key}_labels"]) for key in _SPLITS)
    classes = tuple(os.fsdecode(name) for name in arrays["classes"].tolist())
    return Listing(str(folder), classes, train, val, str(arrays["left_out"]))


def _list(folder: Path) -> dict[str, Any]:
    """Scan into arrays; the ``times`` of ``folders`` show whether they are out of date."""
    times: dict[bytes, int] = {}
    left_out: Counter[str] = Counter()
    classes = {split: _class_folders(folder, split, times, left_out) for split in _SPLITS}
    odd = sorted(set(classes["train"]) ^ set(classes["val"]))
    if odd:
        where, other = ("train", "val") if odd[0] in classes["train"] else ("val", "train")
        raise UserError(
            f"data.root: {folder}: class {odd[0]} is in {where} but not in {other} "
            f"({len(odd)} in one split only)"
        )
    arrays: dict[str, Any] = {"classes": np.array([os.fsencode(n) for n in classes["train"]])}
    for split in _SPLITS:
        paths: list[bytes] = []
        counts: list[int] = []
        for name in classes[split]:
            found = _images(folder, f"{split}/{name}", times, left_out)
            paths += found
            counts.append(len(found))
        arrays[f"{split}_paths"] = np.array(paths)
        arrays[f"{split}_labels"] = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    arrays |= {"folders": np.array(list(times)), "times": np.array(list(times.values()))}
    return arrays | {"left_out": np.array(describe_left_out(left_out))}


def _is_as_it_was(folder: Path, arrays: dict[str, Any]) -> bool:
    """Return whether no file was added or removed since the folders were listed."""
    root = os.fsencode(folder)
    try:
        return all(
            os.stat(os.path.join(root, name)).st_mtime_ns == time
            for name, time in zip(arrays["folders"].tolist(), arrays["times"].tolist(), strict=True)
        )
    except OSError:
        return False


def _class_folders(
    folder: Path, split: str, times: dict[bytes, int], left_out: Counter[str]
) -> list[str]:
    """Return the sorted names of a split's class folders."""
    try:
        times[os.fsencode(split)] = (folder / split).stat().st_mtime_ns
        with os.scandir(folder / split) as entries:
            found = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise UserError(
            f"data.root: {folder / split}: {error.strerror}; expected a folder with one "
            f"folder of images per class"
        ) from None
    for name in (name for name, is_folder in found.items() if not is_folder):
        count_left_out(left_out, name, "beside the class folders")
    names = sorted(name for name, is_folder in found.items() if is_folder and not is_litter(name))
    if not names:
        raise UserError(f"data.root: {folder / split}: no class folders in it")
    return names


def _images(folder: Path, top: str, times: dict[bytes, int], left_out: Counter[str]) -> list[bytes]:
    """Return the paths of a class's images below ``folder``, sorted by folder and name."""
    endings = image_endings()
    paths: list[bytes] = []
    others: Counter[str] = Counter()
    for path, names in sorted(_walk(folder, top, times)):
        for name in sorted(names):
            if not is_litter(name) and ending_of(name) in endings:
                paths.append(os.fsencode(f"{path}/{name}"))
            else:
                count_left_out(others, name)
    if not paths:
        found = f", only {describe_left_out(others)}" if others else ""
        raise UserError(f"data.root: {folder / top}: no images in it{found}")
    left_out.update(others)
    return paths


def _walk(folder: Path, top: str, times: dict[bytes, int]) -> Iterator[tuple[str, list[str]]]:
    """Yield folders from ``folder / top`` down with their files' names; follows each link once."""
    seen: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:
        path = waiting.pop()
        names = []
        try:
            here = os.stat(folder / path)
            if (here.st_dev, here.st_ino) in seen:  # a link to a folder above
                continue
            seen.add((here.st_dev, here.st_ino))
            times[os.fsencode(path)] = here.st_mtime_ns
            with os.scandir(folder / path) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if not is_litter(entry.name):
                            waiting.append(f"{path}/{entry.name}")
                    # Reading a pipe would block; a broken link is reported when it is read.
                    elif entry.is_file() or not os.path.exists(entry.path):
                        names.append(entry.name)
        except OSError as error:
            raise UserError(f"data.root: {folder / path}: {error.strerror}") from None
        yield path, names


def read_arrays(file: Path, names: list[str]) -> dict[str, Any] | None:
    """Return the named arrays of a cache file; None if it is missing or damaged."""
    try:
        with np.load(file) as kept:
            return {name: kept[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return None


def write_arrays(file: Path, arrays: dict[str, Any]) -> None:
    """Write under a temporary name and rename; ignores a cache that cannot be written."""
    draft = file.with_suffix(f".{os.getpid()}.tmp.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(draft, **arrays)
        draft.rename(file)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
