"""The images of an ImageNet-like folder; imports images, listing and source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, final

from hvd_lars.data.images import decode
from hvd_lars.data.listing import Split

if TYPE_CHECKING:
    from PIL.Image import Image


@final
class FolderImages:
    """One split of a listing, read file by file."""

    def __init__(self, root: str, split: Split) -> None:
        self._root, self._paths = root, split.paths
        self.labels = split.labels

    def open(self, index: int) -> Image:
        """Decode a file; UserError names it if that fails."""
        path = Path(self._root, os.fsdecode(self._paths[index]))
        return decode(path, str(path))
