"""TFRecord files of ``tf.train.Example``, in both spellings of ImageNet.

TensorFlow's own script writes ``train-00000-of-01024`` and ``validation-00000-of-00128`` with
``image/encoded``, ``image/class/label`` from 1 to 1000, ``image/class/synset`` and
``image/filename``; TensorFlow Datasets write ``imagenet2012-train.tfrecord-00000-of-01024`` with
``image``, ``label`` from 0 and ``file_name``, and class names in ``label.labels.txt``.

Source:
    tensorflow/core/example/{example,feature}.proto; the record: length (u64), masked CRC-32C of
    the length, data, masked CRC-32C of the data (tensorflow/core/lib/io/record_writer.h).
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hvd_lars.data.forms.scan import (
    Each,
    Files,
    Found,
    Scan,
    as_label,
    check_numbered,
    numbered_classes,
)
from hvd_lars.data.naming import is_litter, shown
from hvd_lars.errors import UserError

NAME = re.compile(r"(?:^|[-_])(train|validation|val|test)[^/]*?-(\d{5})-of-(\d{5})$")
_LENGTH = struct.Struct("<QI")
_FIELD_1, _FIELD_2, _FIELD_3, _NUMBER_1 = 10, 18, 26, 8  # tags: bytes, and a number
_FOOT = 4  # bytes of the checksum of the data
_IMAGE = (b"image/encoded", b"image")
_LABEL, _LABEL_FROM_1 = b"label", b"image/class/label"
_FILE_NAME = (b"image/filename", b"file_name")
_SYNSET = b"image/class/synset"
_NAMES_OF_CLASSES = "label.labels.txt"


class TFRecord:
    """See the module."""

    name = "tfrecord"

    def find(self, root: Path) -> Files:
        """Return the files; UserError names one that is missing of the ``NNNNN`` in a name."""
        parts: dict[str, list[Path]] = {"train": [], "val": []}
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            match = NAME.search(path.name)
            if match is None or is_litter(path.name) or not path.is_file():
                continue
            parts.setdefault(match.group(1), []).append(path)
        parts["val"] = parts["val"] + parts.get("validation", []) or parts.get("test", [])
        if not parts["train"]:
            raise UserError(f"data.root: {root}: no train-NNNNN-of-NNNNN in it")
        check_numbered(root, [*parts["train"], *parts["val"]])
        names = root / _NAMES_OF_CLASSES
        return Files(root, parts["train"], parts["val"], [names] if names.is_file() else [])

    def scan(self, files: Files, each: Each) -> Scan:
        """See :class:`Form`; classes are called by their synsets, or by ``label.labels.txt``."""
        read = {}
        for part, paths in (("train", files.train), ("val", files.val)):
            tables = each(_scan, paths)
            read[part] = [(n, row) for n, rows in enumerate(tables) for row in rows]
        synsets = {row.label: row.synset for _, row in read["train"] if row.synset}
        train, val = (
            [Found(row.label, row.name, number, row.offset, row.size) for number, row in read[part]]
            for part in ("train", "val")
        )
        numbers = numbered_classes(train)
        if files.others:
            text = files.others[0].read_text(encoding="utf-8", errors="replace")
            classes = [line.strip() for line in text.splitlines() if line.strip()]
        else:
            classes = [synsets.get(label, name) for label, name in enumerate(numbers)]
        return Scan(classes, train, val)


FORM = TFRecord()


class _Example(NamedTuple):
    label: int
    name: str
    synset: str
    offset: int
    size: int


def _scan(path: Path) -> list[_Example]:
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise UserError(f"{path}: empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return list(_examples(path, data))


def _examples(path: Path, data: mmap.mmap) -> Iterator[_Example]:
    at, end = 0, len(data)
    while at < end:
        if at + _LENGTH.size > end:
            raise UserError(f"{path}: truncated at byte {at}")
        length, checksum = _LENGTH.unpack_from(data, at)
        if checksum != masked_crc32c(data[at : at + 8]):
            raise UserError(f"{path}: not a TFRecord file, or damaged at byte {at}")
        begin = at + _LENGTH.size
        if begin + length + _FOOT > end:
            raise UserError(f"{path}: truncated: it ends inside the record at byte {at}")
        try:
            features = _features(data, begin, begin + length)
        except (ValueError, IndexError) as error:
            raise UserError(f"{path}: the record at byte {at} is no Example: {error}") from None
        yield _example(path, at, data, features)
        at = begin + length + _FOOT


def _example(
    path: Path, at: int, data: mmap.mmap, features: dict[bytes, tuple[int, int] | int]
) -> _Example:
    """Choose the image, its label and its name from the features of the record at byte ``at``."""

    def text(*keys: bytes) -> str:
        span = next((features[key] for key in keys if key in features), None)
        if not isinstance(span, tuple):
            return ""
        return data[span[0] : span[1]].decode(errors="replace").rpartition("/")[2]

    image = next((features[key] for key in _IMAGE if key in features), None)
    label = features.get(_LABEL_FROM_1, features.get(_LABEL))
    if not isinstance(image, tuple) or not isinstance(label, int):
        found = (
            ", ".join(sorted(shown(key.decode(errors="replace")) for key in features)) or "nothing"
        )
        raise UserError(
            f"{path}: the record at byte {at} has {found}; needed: image/encoded and "
            f"image/class/label, or image and label"
        )
    if _LABEL_FROM_1 in features:
        if label < 1:
            raise UserError(f"{path}: the record at byte {at} has label {label}; they count from 1")
        label -= 1
    number = as_label(label, path, at)
    return _Example(number, text(*_FILE_NAME), text(_SYNSET), image[0], image[1] - image[0])


def _features(data: mmap.mmap, begin: int, end: int) -> dict[bytes, tuple[int, int] | int]:
    """Return the features of an Example: the place of a byte string, or a number.

    Example{1: Features{1: repeated {1: name, 2: Feature}}}; Feature{1: BytesList{1: bytes},
    3: Int64List{1: number}}.
    """
    quick = _usual_features(data, begin, end)
    if quick is not None:
        return quick
    found: dict[bytes, tuple[int, int] | int] = {}
    for number, first, last in _fields(data, begin, end):
        if number != 1:
            continue
        for _, a, b in _fields(data, first, last):
            name, feature = b"", None
            for field, c, d in _fields(data, a, b):
                if field == 1:
                    name = data[c:d]
                elif field == 2:
                    feature = _value(data, c, d)
            if feature is not None:
                found[name] = feature
    return found


def _usual_features(
    data: mmap.mmap, begin: int, end: int
) -> dict[bytes, tuple[int, int] | int] | None:
    """Return the features of an Example in the order in which protobuf's writers put its fields.

    None if anything is in another place; this is a third of the time of a million images.
    """
    found: dict[bytes, tuple[int, int] | int] = {}
    size, at = _length(data, begin + 1)
    if data[begin] != _FIELD_1 or at + size != end:
        return None
    while at < end:
        size, first = _length(data, at + 1)
        stop = first + size
        if data[at] != _FIELD_1 or data[first] != _FIELD_1 or stop > end:
            return None
        size, at = _length(data, first + 1)
        name = data[at : at + size]
        at += size
        size, first = _length(data, at + 1)
        if at >= stop or data[at] != _FIELD_2 or first + size != stop or not size:
            return None
        kind = data[first]
        size, at = _length(data, first + 1)
        if at + size != stop or not size:
            return None
        if kind != _FIELD_2:  # floats are not used
            tag = data[at]
            size, first = _length(data, at + 1)
            if kind == _FIELD_1 and tag == _FIELD_1 and first + size <= stop:
                found[name] = first, first + size
            elif kind == _FIELD_3 and tag in (_FIELD_1, _NUMBER_1):
                found[name] = _signed(_varint(data, first if tag == _FIELD_1 else at + 1, stop)[0])
            else:
                return None
        at = stop
    return found


def _length(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return a length and where it ends; IndexError at the end of the file."""
    value = data[at]
    if value < 128:
        return value, at + 1
    return _varint(data, at, len(data))


def _value(data: mmap.mmap, begin: int, end: int) -> tuple[int, int] | int | None:
    """Return the first value of a Feature; None for floats and empty lists."""
    for kind, a, b in _fields(data, begin, end):
        for _, first, last in _fields(data, a, b) if kind in (1, 3) else ():
            if kind == 1:
                return first, last
            return _signed(_varint(data, first, last)[0])
    return None


def _fields(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, begin and end of the fields of a message; raises ValueError on damage."""
    at = begin
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        if wire == 2:
            length, first = _varint(data, at, end)
            last = first + length
        else:
            first = at
            if wire == 0:
                last = _varint(data, at, end)[1]
            elif wire in (1, 5):
                last = at + (8 if wire == 1 else 4)
            else:
                raise ValueError(f"wire type {wire} at byte {at}")
        if last > end:
            raise ValueError(f"a field ends beyond its message at byte {at}")
        yield tag >> 3, first, last
        at = last


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """Return a number and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"no number at byte {at}")


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


@cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def masked_crc32c(data: bytes) -> int:
    """Return TensorFlow's checksum: CRC-32C (RFC 3720, B.4), rotated, plus a constant."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
