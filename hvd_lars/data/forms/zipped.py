"""Zip files whose images are stored, not compressed: ``train/CLASS/…/image``, ``val/…``.

All may be in one file, with any folders above ``train`` and ``val``, or in ``train.zip`` and
``val.zip``: there with or without such folders, if all images are.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections import Counter
from pathlib import Path

from hvd_lars.data.forms.scan import Each, Files, Found, Scan
from hvd_lars.data.naming import (
    count_left_out,
    describe_left_out,
    ending_of,
    image_endings,
    is_litter,
    shown,
)
from hvd_lars.errors import UserError

_LOCAL = struct.Struct("<4s22xHH")  # of a member: signature, lengths of its name and extra field
_SPLITS = {"train": "train", "val": "val", "validation": "val"}
_BOTH = ("train", "val")


class Zipped:
    """See the module."""

    name = "zip"

    def find(self, root: Path) -> Files:
        """Return ``train.zip`` and ``val.zip``, or one zip file, which may be ``root`` itself."""
        if root.is_file():
            return Files(root.parent, [root], [root], [])
        found = sorted(p for p in root.glob("*.zip") if p.is_file() and not is_litter(p.name))
        named = {_SPLITS[p.stem]: p for p in found if p.stem in _SPLITS}
        if "train" in named:
            return Files(root, [named["train"]], [named["val"]] if "val" in named else [], [])
        if len(found) != 1:
            raise UserError(
                f"data.root: {root}: {len(found)} zip files in it; needed: one, or train.zip and "
                f"val.zip"
            )
        return Files(root, found, found, [])

    def scan(self, files: Files, each: Each) -> Scan:
        """See :class:`Form`."""
        paths = list(dict.fromkeys([*files.train, *files.val]))
        scanned = each(_scan, paths)
        rows = {path: found for path, (found, _) in zip(paths, scanned, strict=True)}
        left_out: Counter[str] = Counter()
        for _, others in scanned:
            left_out.update(others)
        parts = {
            part: [row for path in chosen for row in rows[path] if row[0] == part]
            for part, chosen in (("train", files.train), ("val", files.val))
        }
        classes = sorted({name for _, name, *_ in parts["train"]})
        labels = {name: label for label, name in enumerate(classes)}
        odd = next((row for row in parts["val"] if row[1] not in labels), None)
        if odd is not None:
            raise UserError(
                f"data.root: {files.val[0]}: class {shown(odd[1])} is in val but not in train"
            )
        found = {
            part: [Found(labels[c], name, 0, at, size) for _, c, name, at, size in parts[part]]
            for part in parts
        }
        return Scan(classes, found["train"], found["val"], describe_left_out(left_out))


FORM = Zipped()
_UTF8 = 0x800  # flag: the name is in UTF-8
_UNICODE_PATH = 0x7075


def _scan(path: Path) -> tuple[list[tuple[str, str, str, int, int]], Counter[str]]:
    """Return split, class, name, offset and size of every image, and the skipped files."""
    endings = image_endings()
    own = _SPLITS.get(path.stem)
    rows = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            images = []
            for info in archive.infolist():
                parts = _unicode_name(info).split("/")
                hidden = next((part for part in parts if is_litter(part)), None)
                if not info.is_dir() and (hidden or ending_of(parts[-1]) not in endings):
                    count_left_out(left_out, hidden or parts[-1])
                elif not info.is_dir():
                    images.append((info, parts))
            places = [_place_of_split(parts, own) for _, parts in images]
            in_folders = [at for (_, parts), at in zip(images, places, strict=True) if parts[1:]]
            if own and None in in_folders:  # train.zip, in which a class may be called train
                places = [-1] * len(images)
            for (info, parts), at in zip(images, places, strict=True):
                below = parts[-1:] if at is None else parts[at + 1 :]
                if len(below) < 2:
                    count_left_out(left_out, parts[-1])
                    continue
                assert at is not None
                split = own or _SPLITS[parts[at]]
                if info.filename in seen:
                    raise UserError(f"{path}: {shown(info.filename)}: is in it twice")
                seen.add(info.filename)
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise UserError(
                        f"{path}: {shown(info.filename)}: compressed or encrypted; images must be "
                        f"stored (zip -0), or unpack it"
                    )
                begin = _data_of(path, file.fileno(), info)
                rows.append((split, below[0], "/".join(below[1:]), begin, info.file_size))
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a zip file, or damaged: {error}") from None
    return rows, left_out


def _unicode_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name, which Info-ZIP's ``zip`` does not mark as UTF-8 where it is.

    Source:
        PKWARE's APPNOTE 4.6.9: an extra field 0x7075 of version, CRC and the name in UTF-8.
    """
    if info.flag_bits & _UTF8:
        return info.filename
    extra = info.extra
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == _UNICODE_PATH and size > 5:
            return extra[9 : 4 + size].decode()
        extra = extra[4 + size :]
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:  # they are no bytes of UTF-8
        return info.filename


def _place_of_split(parts: list[str], own: str | None) -> int | None:
    """Return the position of a split's folder; in ``own``'s file of its own, above a class."""
    wanted, folders = ((own,), parts[: max(1, len(parts) - 2)]) if own else (_BOTH, parts)
    return next((i for i, part in enumerate(folders) if _SPLITS.get(part) in wanted), None)


def _data_of(path: Path, file: int, info: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin: after its own header, of a size of its own."""
    head = os.pread(file, _LOCAL.size, info.header_offset)
    if len(head) < _LOCAL.size or not head.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: damaged: no member at byte {info.header_offset}")
    _, name, extra = _LOCAL.unpack(head)
    begin: int = info.header_offset + 30 + name + extra
    if begin + info.file_size > path.stat().st_size:
        raise UserError(f"{path}: truncated: it ends inside {shown(info.filename)}")
    return begin
