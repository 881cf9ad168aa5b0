"""The images of an ImageNet-like folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

from hvd_lars.data.decoding import Picture
from hvd_lars.data.listing import Split
from hvd_lars.errors import UserError


@final
class FolderImages:
    """One split of a listing, read file by file."""

    def __init__(self, root: str, split: Split) -> None:
        self._root, self._paths = root, split.paths
        self.labels = split.labels

    def open(self, index: int) -> Picture:
        """Read a file; raises UserError, which names it, if that fails."""
        path = Path(self._root, os.fsdecode(self._paths[index]))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        return Picture(data, str(path))
