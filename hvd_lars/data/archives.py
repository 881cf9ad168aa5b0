"""ImageNet's official archives, read in place: nothing is unpacked.

``ILSVRC2012_img_train.tar`` holds a tar file for each class, ``ILSVRC2012_img_val.tar`` all test
images, whose labels are in ``ILSVRC2012_devkit_t12.tar.gz``.  A tar file in a tar file lies in one
piece, so that every image has an offset in its archive.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvd_lars.data.identity import DataIdentity, SplitIdentity
from hvd_lars.data.listing import read_arrays, write_arrays
from hvd_lars.data.shards.index import ShardSplit
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user
from hvd_lars.runtime.terminal import warn

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_FORMAT = "archives 1"
_THREADS = 8
_LARGE = 10**9  # bytes of an archive whose scan is announced
_ARRAYS = ("offset", "size", "labels")


@dataclass(frozen=True)
class Archives:
    """The images in the archives of ``root``, in the order of an unpacked folder."""

    root: str
    train: ShardSplit
    val: ShardSplit
    identity: DataIdentity


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def find_archives(root: str) -> list[Path]:
    """Return the three archives in ``root``; UserError names those that are missing."""
    folder = expand_user(root, "data.root")
    paths = [folder / name for name in (TRAIN, VAL, DEVKIT)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"data.root: {folder}: no {', no '.join(missing)} in it")
    return paths


def scan_archives(root: str, cache: Path | None) -> Archives:
    """Locate every image; the result is cached until an archive changes.

    Labels are positions in the sorted WordNet ids, as of an unpacked folder; images are sorted by
    label and name.

    Raises:
        UserError: an archive is missing, truncated, not a tar file, or not what it should be.
    """
    paths = find_archives(root)
    facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    text = json.dumps([_FORMAT, facts])
    file = cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz" if cache else None
    names = [f"{part}_{array}" for part in ("train", "val") for array in (*_ARRAYS, "sha256")]
    arrays = read_arrays(file, [*names, "classes"]) if file is not None else None
    if arrays is None:
        arrays = _scan(*paths)
        if file is not None:
            write_arrays(file, arrays)

    def split(part: str, path: Path) -> tuple[ShardSplit, SplitIdentity]:
        offset, size, labels = (arrays[f"{part}_{array}"] for array in _ARRAYS)
        identity = SplitIdentity(len(labels), str(arrays[f"{part}_sha256"]))
        return ShardSplit((path.name,), np.zeros_like(labels), offset, size, labels), identity

    classes = tuple(map(str, arrays["classes"].tolist()))
    (train, train_identity), (val, val_identity) = split("train", paths[0]), split("val", paths[1])
    identity = DataIdentity(classes, train_identity, val_identity)
    return Archives(str(paths[0].parent), train, val, identity)


def _scan(train: Path, val: Path, devkit: Path) -> dict[str, Any]:
    if train.stat().st_size > _LARGE:
        warn(f"{train}: locating its images, once")
    with train.open("rb") as file:
        number = file.fileno()
        inner = sorted(_members(number, train, 0, train.stat().st_size))
        for member in inner:
            if not member.name.endswith(".tar"):
                raise UserError(f"{train}: {member.name}: a tar file for each class is expected")
        classes = [member.name.removesuffix(".tar") for member in inner]

        def images_of(member: _Member) -> list[_Member]:
            path, end = train / member.name, member.offset + member.size
            return sorted(_members(number, path, member.offset, end))

        with ThreadPoolExecutor(_THREADS) as threads:
            found = list(threads.map(images_of, inner))
    rows = [
        (f"train/{name}/{image.name}", image.offset, image.size, label)
        for label, (name, images) in enumerate(zip(classes, found, strict=True))
        for image in images
    ]
    arrays = _table("train", train, rows) | {"classes": np.array(classes)}
    return arrays | _table("val", val, _val_rows(val, devkit, classes))


def _table(part: str, path: Path, rows: list[tuple[str, int, int, int]]) -> dict[str, Any]:
    """Return a split's arrays, and its identity as of an unpacked folder."""
    if not rows:
        raise UserError(f"{path}: no image in it")
    columns = np.array([row[1:] for row in rows], dtype=np.int64)
    digest = hashlib.sha256(b"\0".join(row[0].encode() for row in rows))
    digest.update(np.ascontiguousarray(columns[:, 2]).tobytes())
    found = {f"{part}_{array}": columns[:, i] for i, array in enumerate(_ARRAYS)}
    return found | {f"{part}_sha256": np.array(digest.hexdigest())}


def _val_rows(val: Path, devkit: Path, classes: list[str]) -> list[tuple[str, int, int, int]]:
    """Return name, offset, size and label of the test images, sorted by label and name."""
    wnids, truth = _read_devkit(devkit)
    with val.open("rb") as file:
        images = sorted(_members(file.fileno(), val, 0, val.stat().st_size))
    if len(images) != len(truth):
        raise UserError(
            f"{val}: {len(images)} images; {devkit.name} has the labels of {len(truth)}"
        )
    labels = {wnid: label for label, wnid in enumerate(classes)}
    rows = []
    for image, number in zip(images, truth, strict=True):
        wnid = wnids.get(number)
        if wnid not in labels:
            raise UserError(
                f"{devkit}: the label of {image.name} is {number}"
                f"{f' ({wnid})' if wnid else ''}, which is no class of {TRAIN}"
            )
        name = f"val/{wnid}/{image.name}"
        rows.append((name, image.offset, image.size, labels[wnid]))
    return sorted(rows, key=lambda row: (row[3], row[0]))


def _read_devkit(devkit: Path) -> tuple[dict[int, str], list[int]]:
    """Return the WordNet id of every ILSVRC id, and the test images' ILSVRC ids in order."""
    from scipy.io import loadmat

    texts: dict[str, bytes] = {}
    try:
        with tarfile.open(devkit, "r:gz") as tar:
            for member in tar:
                for wanted in (_META, _TRUTH):
                    if member.isfile() and f"/{member.name}".endswith(f"/{wanted}"):
                        data = tar.extractfile(member)
                        assert data is not None
                        texts[wanted] = data.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{devkit}: damaged, or not a gzipped tar file: {error}") from None
    for wanted in (_META, _TRUTH):
        if wanted not in texts:
            raise UserError(f"{devkit}: no {wanted} in it")
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(texts[_META]), squeeze_me=True)["synsets"])
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        truth = [int(line) for line in texts[_TRUTH].split()]
    except Exception as error:  # scipy raises anything on a damaged file
        raise UserError(f"{devkit}: damaged: {type(error).__name__}: {error}") from None
    return wnids, truth


def _members(file: int, path: Path, begin: int, end: int) -> Iterator[_Member]:
    """Yield the files of an uncompressed tar file at [begin, end) of an open one.

    Python's ``tarfile`` takes four times as long: half a minute for 1.28 million images.

    Raises:
        UserError: it is truncated or damaged.
    """
    at, name = begin, ""
    while True:
        head = os.pread(file, tarfile.BLOCKSIZE, at)
        if at + tarfile.BLOCKSIZE > end or len(head) < tarfile.BLOCKSIZE:
            raise UserError(f"{path}: truncated at byte {at}")
        if not any(head):
            return
        try:
            size = int(head[124:136].strip(b"\0 ") or b"0", 8)
            checksum = int(head[148:156].strip(b"\0 "), 8)
        except ValueError:
            checksum = -1
        if checksum != sum(head[:148]) + 256 + sum(head[156:]):
            raise UserError(f"{path}: not an uncompressed tar file, or damaged at byte {at}")
        data = at + tarfile.BLOCKSIZE
        if data + size > end:
            raise UserError(f"{path}: truncated: it ends inside the file at byte {at}")
        kind = head[156:157]
        if kind == tarfile.GNUTYPE_LONGNAME:
            name = os.pread(file, size, data).rstrip(b"\0").decode(errors="replace")
        elif kind in (tarfile.REGTYPE, tarfile.AREGTYPE):
            name = name or head[:100].partition(b"\0")[0].decode(errors="replace")
            yield _Member(name.rpartition("/")[2], data, size)
            name = ""
        elif kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            raise UserError(f"{path}: a link at byte {at}; only files are expected")
        at = data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
