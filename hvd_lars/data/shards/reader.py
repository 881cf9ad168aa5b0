"""Random access to images in tar shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, final

from hvd_lars.data.decoding import Picture
from hvd_lars.data.shards.index import ShardSplit
from hvd_lars.errors import UserError

_OPEN_FILES = 64  # a process may have 1,024, and torch needs some, too


@final
class ShardImages:
    """One split of a sharded data set; an image is one read at its offset in its shard.

    Args:
        root: the folder of the shards, not necessarily the indexed one.
        split: locations of the images in the shards.
    """

    def __init__(self, root: Path, split: ShardSplit) -> None:
        self._root, self._split = root, split
        self._files: dict[int, int] = {}
        self.labels = split.labels

    def open(self, index: int) -> Picture:
        """Read an image; raises UserError, which names shard and member, if that fails."""
        split = self._split
        shard, offset = int(split.shard[index]), int(split.offset[index])
        path, size = self._root / split.names[shard], int(split.size[index])
        try:
            file = self._descriptor(shard, path)
            data = os.pread(file, size, offset)
            name = os.pread(file, 100, offset - 512).partition(b"\0")[0].decode(errors="replace")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise UserError(f"{path}: truncated: the image at byte {offset} is incomplete")
        return Picture(data, f"{path}: {name}")

    def _descriptor(self, shard: int, path: Path) -> int:
        """Return an open file of a shard; closes the least recently used one of too many."""
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(path, os.O_RDONLY)
        self._files[shard] = descriptor = self._files.pop(shard)  # moved to the end of the dict
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        """Drop open files, which belong to one process."""
        return self.__dict__ | {"_files": {}}
