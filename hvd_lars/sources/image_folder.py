"""A folder of images as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvd_lars.runtime.files import cache_folder
from hvd_lars.settings.fields import key
from hvd_lars.sources.images import PhotographSettings

if TYPE_CHECKING:
    from hvd_lars.comm.base import Communicator
    from hvd_lars.sources.images import Stores


class ImageFolderData(PhotographSettings):
    """A folder in ImageNet's layout: root/train/CLASS/…/image and root/val/CLASS/…/image."""

    name: Literal["imagefolder"] = key(binds="nothing", description="which data set")
    train_list: str | None = key(
        binds="run",
        default=None,
        description="file below root of training images: CSV, or lines of a path and a label",
    )
    val_list: str | None = key(
        binds="run", default=None, description="the same of test images; paths are below root"
    )

    def stores(self, comm: Communicator) -> Stores:
        """See :meth:`ImageSettings.stores`; rank 0 lists the folder."""
        from hvd_lars.comm.agree import on_root
        from hvd_lars.data.image_folder import FolderImages
        from hvd_lars.data.listing import Lists, list_folder

        lists, needs_val = Lists(self.train_list, self.val_list), self.val_fraction is None
        listing = on_root(
            comm, lambda: list_folder(self.root, cache_folder("listings"), lists, needs_val)
        )
        train, val = (FolderImages(listing.root, split) for split in (listing.train, listing.val))
        return train, val, listing.identity(), listing.left_out


KINDS = (ImageFolderData,)
