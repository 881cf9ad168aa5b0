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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from hvd_lars.data.class_folders import class_folders, images_in
from hvd_lars.data.identity import DataIdentity, SplitIdentity, hash_of
from hvd_lars.data.lists import (
    Listed,
    ListFile,
    as_number,
    flat_labels,
    labels_of,
    places,
    read_list,
)
from hvd_lars.data.naming import count_left_out, describe_left_out, ending_of, image_endings, shown
from hvd_lars.data.source import Indices
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user

Paths = np.ndarray[tuple[int], np.dtype[np.bytes_]]
_SPLITS = ("train", "val")
_VAL_NAMES = ("val", "validation")
_KAGGLE_TREES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_FORMAT = "folder list 3"


@dataclass(frozen=True)
class Split:
    """Images of ``train`` or ``val``: paths below the root as bytes, and labels, both (n,).

    ``names`` are ``train/CLASS/name``, wherever the files are; ``sha256`` is of names and labels,
    not of the files' bytes.
    """

    paths: Paths
    names: Paths
    labels: Indices
    sha256: str

    def take(self, chosen: Indices) -> Split:
        """Return some of the images, in the order of ``chosen``."""
        parts = self.paths[chosen], self.names[chosen], self.labels[chosen]
        return Split(*parts, self.sha256)

    def identity(self) -> SplitIdentity:
        """Return the split's part of the identity."""
        return SplitIdentity(len(self.labels), self.sha256)


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


class Lists(NamedTuple):
    """Files of lists, below the root: ``data.train_list`` and ``data.val_list``."""

    train: str | None = None
    val: str | None = None


_NO_LISTS = Lists()


def list_folder(
    root: str, cache: Path | None, lists: Lists = _NO_LISTS, needs_val: bool = True
) -> Listing:
    """List both splits, or read the list from ``cache`` if no folder has changed since.

    Classes are the folders of a split, sorted by name.  Their images are all files with an
    extension that Pillow reads, in sub-folders too, as in torchvision's ImageFolder.  Hidden files
    and folders, and those that systems leave behind (``__MACOSX``), are skipped.  Test images may
    lie in one folder, with their labels in Kaggle's or tiny-imagenet's file; Places365's lists
    are found as well.

    Args:
        root: the folder, or Kaggle's with ``ILSVRC/Data/CLS-LOC`` below it.
        cache: where the list is kept.
        lists: lists to read in place of a split's folders.
        needs_val: whether test images are needed; the split is empty otherwise.

    Raises:
        UserError: a split or its class folders are missing, a class has no images, or ``val`` has
            a class that ``train`` has not.
    """
    folder = expand_user(root, "data.root")
    # Another version of Pillow may read more extensions.
    facts = [_FORMAT, str(folder.resolve()), sorted(image_endings()), lists, needs_val]
    file = cache_file(cache, json.dumps(facts))
    names = ["root", "folders", "times", "classes", "left_out"]
    names += [
        f"{key}_{field}" for key in _SPLITS for field in ("paths", "names", "labels", "sha256")
    ]
    arrays = read_arrays(file, names)
    if arrays is None or not _is_as_it_was(arrays):
        arrays = _list(folder, lists, needs_val)
        write_arrays(file, arrays)
    train, val = (_split(arrays, key) for key in _SPLITS)
    classes = tuple(os.fsdecode(name) for name in arrays["classes"].tolist())
    base = os.fsdecode(arrays["root"].item())
    return Listing(base, classes, train, val, str(arrays["left_out"]))


def _split(arrays: dict[str, Any], key: str) -> Split:
    paths, names, labels = (arrays[f"{key}_{field}"] for field in ("paths", "names", "labels"))
    return Split(paths, names if len(names) else paths, labels, str(arrays[f"{key}_sha256"]))


def has_val(root: Path) -> bool:
    """Return whether an image folder has test images, in any of its layouts."""
    tree = tree_of(root)
    return any((tree / name).is_dir() for name in _VAL_NAMES) or places(root) is not None


def tree_of(root: Path) -> Path:
    """Return the folder that holds ``train``: the root, or one of Kaggle's tree in it."""
    trees = [root, *(root / tree for tree in _KAGGLE_TREES)]
    return next((tree for tree in trees if (tree / "train").is_dir()), root)


class _Part(NamedTuple):
    """Images of a split: paths below the root, names (``train/CLASS/name``), labels."""

    paths: list[bytes]
    names: list[bytes]
    labels: list[int]


@dataclass
class _Scan:
    """A scan of ``folder``: times of the folders and lists read, and the skipped files."""

    folder: Path
    times: dict[bytes, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def _list(root: Path, lists: Lists, needs_val: bool) -> dict[str, Any]:
    """Scan into arrays; the ``times`` of ``folders`` show whether they are out of date."""
    given = any(lists)
    folder = root if given else tree_of(root)
    scan = _Scan(folder)
    train_list, val_list = (ListFile(root / name, "") if name else None for name in lists)
    found = Listed(train_list, val_list)
    if not given and not (folder / "train").is_dir():
        found = places(folder) or found
    if found.train is None:
        classes = class_folders(folder, "train", scan.times, scan.left_out)
        train = _in_class_folders(scan, "train", "train", classes, classes)
    else:
        classes, train = _train_list(scan, found.train, found.classes)
    if not needs_val:
        val = _Part([], [], [])
    elif found.val is not None:
        val = _val_list(scan, found.val, classes)
    else:
        val = _val_folder(scan, classes)
    check_classes(folder, classes)
    arrays: dict[str, Any] = {"classes": np.array([os.fsencode(name) for name in classes])}
    for split, part in (("train", train), ("val", val)):
        labels: Indices = np.array(part.labels, dtype=np.int64)
        arrays[f"{split}_paths"] = np.array(part.paths, dtype=np.bytes_)
        arrays[f"{split}_names"] = np.array(
            [] if part.names == part.paths else part.names, dtype=np.bytes_
        )
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_sha256"] = np.array(hash_of(part.names, labels))
    arrays |= {"folders": np.array(list(scan.times)), "times": np.array(list(scan.times.values()))}
    arrays["root"] = np.array(os.fsencode(folder))
    return arrays | {"left_out": np.array(describe_left_out(scan.left_out))}


def check_classes(root: Path, classes: Sequence[str]) -> None:
    """Raise UserError if there is nothing to tell apart, as where all images are one level down."""
    if len(classes) < 2:
        found = f"one class, {shown(classes[0])}" if classes else "no class"
        raise UserError(f"data.root: {root}: found {found}; two or more are needed")


def _in_class_folders(
    scan: _Scan, split: str, top: str, present: list[str], classes: list[str]
) -> _Part:
    """Return the images in ``top/CLASS``; they are called ``split/CLASS/…``."""
    labels = {name: label for label, name in enumerate(classes)}
    part = _Part([], [], [])
    for name in present:
        place, needed = f"{top}/{name}", split == "train"
        found = images_in(scan.folder, place, scan.times, scan.left_out, needed)
        part.paths.extend(found)
        part.labels.extend([labels[name]] * len(found))
    prefix = len(os.fsencode(top))
    part.names.extend(os.fsencode(split) + path[prefix:] for path in part.paths)
    return part


def _train_list(
    scan: _Scan, file: ListFile, names: dict[int, str] | None
) -> tuple[list[str], _Part]:
    """Return the classes and images of a list: names of classes, or numbers from 0 on."""
    rows = read_list(file.path)
    found = {label for _, label in rows}
    if all(label.isdecimal() for label in found):
        count = max(as_number(label, file.path) for label in found) + 1
        if count > 2 * len(rows):
            raise UserError(
                f"{file.path}: found label {count - 1}; allowed in a list of {len(rows)} images: "
                f"0 to {2 * len(rows) - 1}"
            )
        classes = [(names or {}).get(label, str(label)) for label in range(count)]
        labels = [int(label) for _, label in rows]
    else:
        classes = sorted(found)
        labels = labels_of(file.path, rows, {name: i for i, name in enumerate(classes)}, 0)
    return classes, _listed(scan, "train", file, [path for path, _ in rows], labels, classes)


def _val_list(scan: _Scan, file: ListFile, classes: list[str]) -> _Part:
    rows = read_list(file.path)
    known = {name: label for label, name in enumerate(classes)}
    labels = labels_of(file.path, rows, known, len(classes))
    return _listed(scan, "val", file, [path for path, _ in rows], labels, classes)


def _listed(
    scan: _Scan,
    split: str,
    file: ListFile,
    paths: list[str],
    labels: list[int],
    classes: list[str],
) -> _Part:
    """Return listed images in the order of label and name, as in class folders."""
    _remember(scan, file.path)
    rows = sorted(
        (label, os.fsencode(f"{split}/{classes[label]}/{path.rpartition('/')[2]}"), path)
        for label, path in zip(labels, paths, strict=True)
    )
    found = [
        os.fsencode(f"{file.base}/{path.lstrip('/')}" if file.base else path) for _, _, path in rows
    ]
    return _Part(found, [name for _, name, _ in rows], [label for label, _, _ in rows])


def _val_folder(scan: _Scan, classes: list[str]) -> _Part:
    """Return the test images in class folders, or in one folder with a file of labels."""
    folder = scan.folder
    top = next((name for name in _VAL_NAMES if (folder / name).is_dir()), "val")
    flat = flat_labels(folder, top)
    if flat is None or any((folder / top / name).is_dir() for name in classes[:2]):
        present = class_folders(folder, top, scan.times, scan.left_out)
        odd = sorted(set(present) - set(classes))
        if odd:
            raise UserError(
                f"data.root: {folder}: {top} has classes that train has not: {odd[0]}"
                f"{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}"
            )
        return _in_class_folders(scan, "val", top, present, classes)
    file, base, labels = flat
    _remember(scan, file)
    _remember(scan, folder / base)
    known = {name: label for label, name in enumerate(classes)}
    names, endings = [], image_endings()
    for name in sorted(os.listdir(folder / base)):
        if ending_of(name) in endings and not name.startswith("."):
            names.append(name)
        elif name != file.name:
            count_left_out(scan.left_out, name)
    stems = [name.rpartition(".")[0] for name in names]
    unlabelled = next((n for n, s in zip(names, stems, strict=True) if s not in labels), None)
    if unlabelled is not None or not names:
        found = f"{unlabelled} has no label in {file}" if unlabelled else "no images in it"
        raise UserError(f"data.root: {folder / base}: {found}")
    rows = [(name, labels[stem]) for name, stem in zip(names, stems, strict=True)]
    numbers = labels_of(file, rows, known, 0)
    return _listed(scan, "val", ListFile(file, base), names, numbers, classes)


def _remember(scan: _Scan, path: Path) -> None:
    """Keep the time of a file or folder, to see whether the list is out of date."""
    scan.times[os.fsencode(os.path.abspath(path))] = path.stat().st_mtime_ns


def _is_as_it_was(arrays: dict[str, Any]) -> bool:
    """Return whether no file was added or removed since the folders were listed."""
    root = arrays["root"].item()
    try:
        return all(
            os.stat(os.path.join(root, name)).st_mtime_ns == time
            for name, time in zip(arrays["folders"].tolist(), arrays["times"].tolist(), strict=True)
        )
    except OSError:
        return False


def cache_file(cache: Path | None, facts: str) -> Path | None:
    """Return the file in ``cache`` for arrays that depend on ``facts``; None without a cache."""
    return cache / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.npz" if cache else None


def read_arrays(file: Path | None, names: list[str]) -> dict[str, Any] | None:
    """Return the named arrays of a cache file; None if it is missing or damaged."""
    if file is None:
        return None
    try:
        with np.load(file) as kept:
            return {name: kept[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return None


def write_arrays(file: Path | None, arrays: dict[str, Any]) -> None:
    """Write under a temporary name and rename; ignores a cache that cannot be written."""
    if file is None:
        return
    draft = file.with_suffix(f".{os.getpid()}.tmp.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(draft, **arrays)
        draft.rename(file)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
