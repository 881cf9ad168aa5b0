"""Scan the files of a form once, and keep the images' locations until a file changes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from hvd_lars.data.identity import DataIdentity, SplitIdentity, hash_of
from hvd_lars.data.listing import Paths, cache_file, check_classes, read_arrays, write_arrays
from hvd_lars.data.located import ARRAYS, Located, LocatedSet
from hvd_lars.data.naming import image_endings
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user
from hvd_lars.runtime.terminal import progress_bar

_FORMAT = "scan 3"
_LARGE = 10**9  # bytes in files whose scan shows its progress
_MOST_CLASSES = 2**20  # a larger label is damage
_THREADS = 8  # mostly waiting for the file system
_SPLITS = ("train", "val")
# Perhaps with a hash, and an extension.
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?(?:\.[a-z]+)?$")
T = TypeVar("T")
R = TypeVar("R")


class Found(NamedTuple):
    """An image: its class, its own name if it has one, file, offset and size in bytes."""

    label: int
    name: str
    file: int
    offset: int
    size: int


class Files(NamedTuple):
    """The files of a data set, below ``root``; ``others`` have labels or names of classes."""

    root: Path
    train: list[Path]
    val: list[Path]
    others: list[Path]


@dataclass(frozen=True)
class Scan:
    """What the files hold: class names by label, and the images of both splits.

    ``left_out`` counts the skipped files by kind, in one line.
    """

    classes: Sequence[str]
    train: list[Found]
    val: list[Found]
    left_out: str = ""


class Form(Protocol):
    """A form in which a data set is kept."""

    name: str

    def find(self, root: Path) -> Files:
        """Return the files, without reading them; raises UserError if some are missing."""
        ...

    def scan(self, files: Files, each: Each) -> Scan:
        """Locate every image; raises UserError if a file is damaged.

        ``each(scan_one, files)`` calls ``scan_one`` for every file, several at once, and returns
        the results in order.
        """
        ...


class Each(Protocol):
    """Apply a function to items, several at once, with progress."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return the results in the order of the items."""
        ...


def as_label(value: float, path: Path, at: int, unit: str = "the record at byte") -> int:
    """Return a stored label as a number of a class; UserError names the file and the place."""
    if not (0 <= value < _MOST_CLASSES and float(value).is_integer()):
        raise UserError(f"{path}: {unit} {at} has label {value}; allowed: 0 to {_MOST_CLASSES - 1}")
    return int(value)


def without_test(val: list[Path]) -> list[Path]:
    """Return the files to evaluate on: none of ``test…`` where there are files of ``val…``."""
    if not any(path.name.lower().startswith("val") for path in val):
        return val
    return [path for path in val if not path.name.lower().startswith("test")]


def check_numbered(root: Path, paths: Sequence[Path]) -> None:
    """Raise UserError if one of the files ``…-NNNNN-of-NNNNN`` is missing, or there twice."""
    seen: dict[str, dict[int, dict[int, Path]]] = {}  # what precedes, their count, their number
    for path in paths:
        if match := _NUMBERED.search(path.name):
            stem, number, count = path.name[: match.start(1)], int(match[1]), int(match[2])
            other = seen.setdefault(stem, {}).setdefault(count, {}).setdefault(number, path)
            if other is not path:
                raise UserError(
                    f"data.root: {root}: {other.name} and {path.name} are the same part of two "
                    f"data sets; keep one set"
                )
    for stem, counts in seen.items():
        if len(counts) > 1:
            found = " and ".join(f"{stem}NNNNN-of-{count:05d}" for count in sorted(counts))
            raise UserError(f"data.root: {root}: {found} in it: two data sets; keep one")
        for count, numbers in counts.items():
            missing = next((number for number in range(count) if number not in numbers), None)
            if missing is not None:
                name = f"{stem}{missing:05d}-of-{count:05d}"
                raise UserError(f"data.root: {root}: no {name} in it")


def numbered_classes(train: Sequence[Found]) -> list[str]:
    """Return numbers as the names of classes that have none."""
    return [str(label) for label in range(max((row.label for row in train), default=-1) + 1)]


def locate(form: Form, root: str, cache: Path | None) -> LocatedSet:
    """Locate the images of a data set; the result is cached until a file changes.

    Labels are those of the form, which are positions in the sorted class names for ImageNet, and
    images are in the order of label and name, as in an image folder, so that a run does not depend
    on the form of its data.

    Raises:
        UserError: a file is missing or damaged, or a label is no class.
    """
    files = form.find(expand_user(root, "data.root"))
    key = _key(form, files)
    path = cache_file(cache, key)
    names = [f"{split}_{array}" for split in _SPLITS for array in (*ARRAYS, "sha256")]
    arrays = read_arrays(path, [*names, "classes", "left_out"])
    if arrays is None:
        arrays, _ = _scanned(form, files)
        write_arrays(path, arrays)
    return _located_set(files, key, arrays)


def locate_with_names(form: Form, root: str) -> tuple[LocatedSet, dict[str, Paths]]:
    """Locate the images, and return their names, ``SPLIT/CLASS/name``, by split."""
    files = form.find(expand_user(root, "data.root"))
    arrays, names = _scanned(form, files)
    return _located_set(files, _key(form, files), arrays), names


def _key(form: Form, files: Files) -> str:
    everything = [*files.train, *files.val, *files.others]
    facts = [(str(p.resolve()), (s := p.stat()).st_size, s.st_mtime_ns) for p in everything]
    endings = sorted(image_endings())  # another version of Pillow may read more
    text = json.dumps([_FORMAT, form.name, len(files.train), len(files.val), facts, endings])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _located_set(files: Files, key: str, arrays: dict[str, Any]) -> LocatedSet:
    def split(part: str, paths: list[Path]) -> tuple[Located, SplitIdentity]:
        found = Located(
            tuple(str(path.relative_to(files.root)) for path in paths),
            *(arrays[f"{part}_{array}"] for array in ARRAYS),
        )
        return found, SplitIdentity(len(found.labels), str(arrays[f"{part}_sha256"]))

    classes = tuple(map(str, arrays["classes"].tolist()))
    (train, train_identity), (val, val_identity) = (
        split("train", files.train),
        split("val", files.val),
    )
    sizes = {str(p.relative_to(files.root)): p.stat().st_size for p in (*files.train, *files.val)}
    identity = DataIdentity(classes, train_identity, val_identity)
    left_out = str(arrays["left_out"])
    return LocatedSet(str(files.root), key, classes, train, val, sizes, {}, identity, left_out)


def _scanned(form: Form, files: Files) -> tuple[dict[str, Any], dict[str, Paths]]:
    total = sum(path.stat().st_size for path in (*files.train, *files.val))
    title = f"locating the images of {files.root}, once"
    with progress_bar(title, "files", shown=total > _LARGE) as progress:
        scan = form.scan(files, _in_threads(progress))
    arrays: dict[str, Any] = {"classes": np.array(list(scan.classes))}
    arrays["left_out"] = np.array(scan.left_out)
    names = {}
    if not scan.train:
        raise UserError(f"data.root: {files.train[0]}: no image in it")
    check_classes(files.root, scan.classes)
    for part, paths in (("train", files.train), ("val", files.val)):
        found, names[part] = _table(part, getattr(scan, part), scan.classes, paths)
        arrays |= found
    return arrays, names


def _in_threads(progress: Callable[[int, int], None]) -> Each:
    def each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        with ThreadPoolExecutor(_THREADS) as threads:
            running = [threads.submit(function, item) for item in items]
            try:
                for done, future in enumerate(as_completed(running), start=1):
                    future.result()
                    progress(done, len(running))
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in running]

    return each


def _table(
    part: str, rows: list[Found], classes: Sequence[str], paths: list[Path]
) -> tuple[dict[str, Any], Paths]:
    """Return a split's arrays in the order of an image folder, and its names."""
    for row in rows:
        if not 0 <= row.label < len(classes):
            raise UserError(
                f"data.root: {paths[row.file]}: the image at byte {row.offset} has label "
                f"{row.label}; allowed with {len(classes)} classes: 0 to {len(classes) - 1}"
            )
    if all(row.name for row in rows):
        # As in class folders: by folder, then by name.
        rows = sorted(rows, key=lambda row: (row.label, *row.name.rpartition("/")[::2], row))
    columns = np.array([(r.file, r.offset, r.size, r.label) for r in rows], dtype=np.int64)
    columns = columns.reshape(-1, len(ARRAYS))
    names = np.array(
        [f"{part}/{classes[row.label]}/{row.name or i}".encode() for i, row in enumerate(rows)],
        dtype=np.bytes_,
    )
    found = {f"{part}_{a}": np.ascontiguousarray(columns[:, i]) for i, a in enumerate(ARRAYS)}
    sha256 = hash_of(names.tolist(), found[f"{part}_labels"])
    return found | {f"{part}_sha256": np.array(sha256)}, names
