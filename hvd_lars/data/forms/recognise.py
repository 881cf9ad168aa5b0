"""Recognise the form in which a data set is kept, from the names in its folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hvd_lars.data.forms import archives, arrow, tfrecord
from hvd_lars.data.listing import tree_of
from hvd_lars.data.lists import places
from hvd_lars.data.naming import describe_left_out, ending_of, is_litter
from hvd_lars.errors import UserError

PARQUET = "parquet"  # can be packed, and is no kind of data
_SEEN = 6  # names in a message
_ELSEWHERE = {  # forms with settings of their own
    "data.name=idx": ("*-ubyte", "*-ubyte.gz", "raw/*-ubyte*", "*/raw/*-ubyte*"),
    "data.name=cifar10": ("cifar-10-batches-py",),
    "data.name=cifar100": ("cifar-100-python",),
}


class Recognised(NamedTuple):
    """``kind`` is a ``data.name``, or PARQUET; ``title`` is for people."""

    kind: str
    title: str


def recognise(root: Path) -> Recognised:
    """Return the form of the data set in ``root``, by names of files and by ``dataset.json``.

    Raises:
        UserError: nothing known is there; the message says what was seen, and which forms exist.
    """
    if root.is_file() and root.suffix == ".zip":
        return Recognised("zip", _TITLES["zip"])
    if not root.is_dir():
        raise UserError(f"data.root: {root}: no such folder")
    for kind, is_there in _SIGNS:
        if is_there(root):
            return Recognised(kind, _TITLES[kind])
    for name, patterns in _ELSEWHERE.items():
        if any(next(root.glob(pattern), None) for pattern in patterns):
            raise UserError(f"data.root: {root}: found files that need a name; set {name}")
    raise UserError(
        f"data.root: {root}: no known form of a data set: found {_seen(root)}; known are "
        f"{', '.join(_TITLES.values())}"
    )


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda root: any(
        not is_litter(path.name) for pattern in patterns for path in root.glob(pattern)
    )


def _is_archives(root: Path) -> bool:
    names = archives.TRAIN, archives.VAL, archives.DEVKIT
    return any((root / name).is_file() for name in names) or bool(archives.class_tars(root))


def _is_packed(root: Path) -> bool:
    """Return whether ``dataset.json`` is ours, perhaps damaged: others have such files, too."""
    try:
        found = json.loads((root / "dataset.json").read_bytes())
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True
    return isinstance(found, dict) and "format" in found


def _is_tfrecord(root: Path) -> bool:
    names = (path.name for path in root.iterdir())
    return any(tfrecord.NAME.search(name) and not is_litter(name) for name in names)


def _is_folder(root: Path) -> bool:
    return (tree_of(root) / "train").is_dir() or places(root) is not None


_SIGNS: tuple[tuple[str, Callable[[Path], bool]], ...] = (
    ("shards", _is_packed),
    ("arrow", _has(arrow.DICT)),
    ("imagefolder", _is_folder),  # perhaps beside the archives that it was unpacked from
    ("imagenet", _is_archives),
    (PARQUET, _has("train*.parquet", "data/train*.parquet")),
    ("recordio", _has("train*.rec")),
    ("tfrecord", _is_tfrecord),
    ("zip", _has("*.zip")),
    ("shards", _has("*train*.tar")),
)
_TITLES = {
    "imagefolder": "class folders (train/CLASS/image)",
    "imagenet": "ImageNet's archives",
    "shards": "tar shards",
    "tfrecord": "TFRecord files",
    "arrow": "Arrow files of save_to_disk",
    PARQUET: "Parquet files",
    "recordio": "MXNet's RecordIO files",
    "zip": "zip files",
}


def _seen(root: Path) -> str:
    """Describe a folder: some of its folders, and its files by extension."""
    try:
        with os.scandir(root) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as error:
        raise UserError(f"data.root: {root}: {error.strerror}") from None
    folders = sorted(name for name, is_folder in found if is_folder and not is_litter(name))
    files = Counter(ending_of(name) or "without an extension" for name, is_f in found if not is_f)
    more = f" and {len(folders) - _SEEN:,} more" if len(folders) > _SEEN else ""
    parts = [f"folders {', '.join(folders[:_SEEN])}{more}"] if folders else []
    parts += [f"files: {describe_left_out(files)}"] if files else []
    return "; ".join(parts) or "nothing"
