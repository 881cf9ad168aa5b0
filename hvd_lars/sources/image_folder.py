"""A folder of images as a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from hvd_lars.runtime.files import expand_user, listing_cache
from hvd_lars.settings.fields import key
from hvd_lars.sources.images import ImageSettings

if TYPE_CHECKING:
    from hvd_lars.comm.base import Communicator
    from hvd_lars.sources.images import Stores


class ImageFolderData(ImageSettings):
    """A folder in ImageNet's layout: root/train/CLASS/…/image and root/val/CLASS/…/image."""

    FAMILY: ClassVar[str] = "photographs"

    name: Literal["imagefolder"] = key(binds="run", description="which data set")
    root: str = key(binds="nothing", description="folder of the data set")

    @property
    def location(self) -> Path:
        """``root``."""
        return expand_user(self.root, "data.root")

    def stores(self, comm: Communicator) -> Stores:
        """See :meth:`ImageSettings.stores`; rank 0 lists the folder."""
        from hvd_lars.comm.agree import on_root
        from hvd_lars.data import FolderImages, list_folder

        listing = on_root(comm, lambda: list_folder(self.root, listing_cache()))
        train, val = (FolderImages(listing.root, split) for split in (listing.train, listing.val))
        return train, val, listing.identity(), listing.left_out


KINDS = (ImageFolderData,)
