"""A folder of images as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvd_lars.runtime.files import listing_cache
from hvd_lars.settings.fields import key
from hvd_lars.sources.images import PhotographSettings

if TYPE_CHECKING:
    from hvd_lars.comm.base import Communicator
    from hvd_lars.sources.images import Stores


class ImageFolderData(PhotographSettings):
    """A folder in ImageNet's layout: root/train/CLASS/…/image and root/val/CLASS/…/image."""

    name: Literal["imagefolder"] = key(binds="run", description="which data set")

    def stores(self, comm: Communicator) -> Stores:
        """See :meth:`ImageSettings.stores`; rank 0 lists the folder."""
        from hvd_lars.comm.agree import on_root
        from hvd_lars.data import FolderImages, list_folder

        listing = on_root(comm, lambda: list_folder(self.root, listing_cache()))
        train, val = (FolderImages(listing.root, split) for split in (listing.train, listing.val))
        return train, val, listing.identity(), listing.left_out


KINDS = (ImageFolderData,)
