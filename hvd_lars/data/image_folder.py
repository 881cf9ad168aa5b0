"""The images of an ImageNet-like folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

from hvd_lars.data.decoding import Picture
from hvd_lars.data.listing import Split
from hvd_lars.data.source import Indices
from hvd_lars.errors import UserError


@final
class FolderImages:
    """One split of a listing, read file by file."""

    def __init__(self, root: str, split: Split) -> None:
        self._root, self._split = root, split
        self.labels = split.labels

    def take(self, chosen: Indices) -> FolderImages:
        """Return a store of some of the images."""
        return FolderImages(self._root, self._split.take(chosen))

    def read(self, index: int) -> bytes:
        """Return a file's bytes; raises UserError, which names it, if that fails."""
        path = self._path(index)
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    def open(self, index: int) -> Picture:
        """Read an image; raises UserError, which names its file, if that fails."""
        return Picture(self.read(index), self.where(index))

    def files(self) -> list[str]:
        """Return the paths of the images below the root."""
        return [os.fsdecode(path) for path in self._split.paths.tolist()]

    def close(self) -> None:
        """Do nothing: a file is open only while it is read."""

    def where(self, index: int) -> str:
        """Return how messages call an image: its path."""
        return str(self._path(index))

    def _path(self, index: int) -> Path:
        return Path(self._root, os.fsdecode(self._split.paths[index]))
