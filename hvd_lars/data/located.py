"""Images that each lie in one piece in a larger file: their locations, and access to them.

Tar shards, tar files of tar files, TFRecord, RecordIO, Arrow and stored zip files are all read
this way: an image is one ``pread`` at its offset.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from hvd_lars.data.decoding import Picture
from hvd_lars.data.identity import DataIdentity
from hvd_lars.data.source import Indices
from hvd_lars.errors import UserError

ARRAYS = ("file", "offset", "size", "labels")
_OPEN_FILES = 64  # a process may have 1,024, and torch needs some, too
RECORD_MAGIC = (0xCED7230A).to_bytes(4, "little")


@dataclass(frozen=True)
class Located:
    """Images of one split: ``file`` (a position in ``files``), ``offset``, ``size``, ``labels``.

    All four are (n,) int64; offset and size are in bytes.
    """

    files: tuple[str, ...]
    file: Indices
    offset: Indices
    size: Indices
    labels: Indices

    def take(self, chosen: Indices) -> Located:
        """Return some of the images, in the order of ``chosen``."""
        arrays = (getattr(self, array)[chosen] for array in ARRAYS)
        return Located(self.files, *arrays)


@dataclass(frozen=True)
class LocatedSet:
    """A data set of located images: ``bytes`` of every file, ``sha256`` if known.

    ``version`` changes with the files or their location; ``left_out`` counts skipped members by
    kind, in one line; ``val`` is empty if the data set has none.
    """

    root: str
    version: str
    classes: tuple[str, ...]
    train: Located
    val: Located
    bytes: dict[str, int]
    sha256: dict[str, str]
    identity: DataIdentity
    left_out: str = ""


@final
class LocatedImages:
    """One split of located images, by index.

    Args:
        root: the folder of the files, not necessarily the scanned one.
        split: the images' locations in the files.
    """

    def __init__(self, root: Path, split: Located) -> None:
        self._root, self._split = root, split
        self._open: dict[int, int] = {}
        self.labels = split.labels

    def take(self, chosen: Indices) -> LocatedImages:
        """Return a store of some of the images."""
        return LocatedImages(self._root, self._split.take(chosen))

    def read(self, index: int) -> bytes:
        """Return an image file's bytes; raises UserError, which names the file, if that fails."""
        file, path, offset, size = self._place(index)
        try:
            data = os.pread(self._descriptor(file, path), size, offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise UserError(f"{path}: truncated: the image at byte {offset} is incomplete")
        return joined(data, offset) if path.suffix == ".rec" else data

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        while self._open:
            os.close(self._open.popitem()[1])

    __del__ = close

    def open(self, index: int) -> Picture:
        """Read an image; raises UserError, which names file and member, if that fails."""
        return Picture(self.read(index), self.where(index))

    def files(self) -> list[str]:
        """Return the names of the files that hold the images."""
        return [self._split.files[i] for i in sorted(set(self._split.file.tolist()))]

    def where(self, index: int) -> str:
        """Return how messages call an image: by its name in a tar file, or by its position."""
        file, path, offset, _ = self._place(index)
        if path.suffix == ".tar":
            with suppress(OSError):
                head = os.pread(self._descriptor(file, path), 100, offset - 512)
                return f"{path}: {head.partition(bytes(1))[0].decode(errors='replace')}"
        return f"{path}: the image at byte {offset}"

    def _place(self, index: int) -> tuple[int, Path, int, int]:
        split = self._split
        file = int(split.file[index])
        path = self._root / split.files[file]
        return file, path, int(split.offset[index]), int(split.size[index])

    def _descriptor(self, file: int, path: Path) -> int:
        """Return an open file; closes the least recently used one of too many."""
        if file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[file] = os.open(path, os.O_RDONLY)
        self._open[file] = descriptor = self._open.pop(file)  # moved to the end of the dict
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        """Drop open files, which belong to one process."""
        return self.__dict__ | {"_open": {}}


def joined(data: bytes, offset: int) -> bytes:
    """Undo RecordIO's splitting of records.

    MXNet's writer cuts a record wherever its data contain the magic number at a multiple of 4
    bytes, and puts the length of the next part after it: 4 bytes that are not the image's.

    Args:
        data: bytes of an image, as they lie in the file.
        offset: of ``data`` in the file.
    """
    at = data.find(RECORD_MAGIC)
    while at >= 0:
        after = at + len(RECORD_MAGIC)
        if (offset + at) % 4 == 0:
            data, offset = data[:after] + data[after + 4 :], offset + 4
        at = data.find(RECORD_MAGIC, after)
    return data
