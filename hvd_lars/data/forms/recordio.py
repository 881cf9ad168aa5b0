"""MXNet's RecordIO: ``train.rec`` and ``val.rec``, as ``im2rec`` writes them.

A record is a magic number, a word of length and part, and the data, padded to 4 bytes; the data
are a header (flag, label as float32, two ids; ``flag`` further labels if it is not 0) and the
image.

Source:
    dmlc-core, recordio.h; MXNet's python/mxnet/recordio.py (IRHeader, "IfQQ").
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from hvd_lars.data.forms.scan import (
    Each,
    Files,
    Found,
    Scan,
    as_label,
    numbered_classes,
    without_test,
)
from hvd_lars.data.located import RECORD_MAGIC
from hvd_lars.errors import UserError

_MAGIC = int.from_bytes(RECORD_MAGIC, "little")
_HEAD = struct.Struct("<II")
_LABEL = struct.Struct("<IfQQ")
_LENGTH = 2**29 - 1
_WHOLE, _BEGIN, _MIDDLE, _END = range(4)  # parts of a record
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}


class RecordIO:
    """See the module."""

    name = "recordio"

    def find(self, root: Path) -> Files:
        """Return the ``.rec`` files, by ``train`` or ``val`` at the beginning of their names."""
        found = {
            part: sorted(p for p in root.glob("*.rec") if p.name.lower().startswith(names))
            for part, names in _SPLITS.items()
        }
        found["val"] = without_test(found["val"])
        for part, paths in found.items():
            if len(paths) > 1 and any(path.stem == part for path in paths):
                names = ", ".join(path.name for path in paths)
                raise UserError(
                    f"data.root: {root}: {names}: one file of all images and others of them; "
                    f"keep one set"
                )
        if not found["train"]:
            raise UserError(f"data.root: {root}: no train*.rec in it")
        return Files(root, found["train"], found["val"], [])

    def scan(self, files: Files, each: Each) -> Scan:
        """See :class:`Form`; classes have no names here."""
        train, val = (
            [row for rows in each(_scan, list(enumerate(paths))) for row in rows]
            for paths in (files.train, files.val)
        )
        return Scan(numbered_classes(train), train, val)


FORM = RecordIO()


def _scan(item: tuple[int, Path]) -> list[Found]:
    number, path = item
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise UserError(f"{path}: empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _rows(number, path, data)


def _rows(number: int, path: Path, data: mmap.mmap) -> list[Found]:
    rows, at = [], 0
    while at < len(data):
        begin = at
        part, length, at = _head(path, data, at)
        if part not in (_WHOLE, _BEGIN) or length < _LABEL.size:
            raise UserError(f"{path}: damaged at byte {begin}: no record begins here")
        flag, label, _, _ = _LABEL.unpack_from(data, at)
        first, last = at + _LABEL.size, at + length
        if flag:  # several labels: an image has the first as its class
            if first + 4 * flag > last:
                raise UserError(f"{path}: damaged at byte {begin}: {flag} labels in {length} bytes")
            (label,) = struct.unpack_from("<f", data, first)
            first += 4 * flag
        while part not in (_WHOLE, _END):
            part, length, at = _head(path, data, _padded(last))
            if part not in (_MIDDLE, _END):
                raise UserError(f"{path}: damaged at byte {at}: a record has no end")
            last = at + length
        rows.append(Found(as_label(label, path, begin), "", number, first, last - first))
        at = _padded(last)
    return rows


def _padded(position: int) -> int:
    return -(-position // 4) * 4


def _head(path: Path, data: mmap.mmap, at: int) -> tuple[int, int, int]:
    """Return the part, its length in bytes, and where its data begin."""
    if at + _HEAD.size > len(data):
        raise UserError(f"{path}: truncated at byte {at}")
    magic, word = _HEAD.unpack_from(data, at)
    if magic != _MAGIC:
        raise UserError(f"{path}: not MXNet's RecordIO, or damaged at byte {at}")
    part, length, begin = word >> 29, word & _LENGTH, at + _HEAD.size
    if begin + length > len(data):
        raise UserError(f"{path}: truncated: it ends inside the record at byte {at}")
    return part, length, begin
