"""ImageNet's official archives as a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvd_lars.runtime.files import listing_cache
from hvd_lars.settings.fields import key
from hvd_lars.sources.images import PhotographSettings

if TYPE_CHECKING:
    from hvd_lars.comm.base import Communicator
    from hvd_lars.sources.images import Stores


class ImageNetData(PhotographSettings):
    """The archives ILSVRC2012_img_train.tar, _img_val.tar and _devkit_t12.tar.gz, read in place."""

    name: Literal["imagenet"] = key(binds="run", description="which data set")

    def stores(self, comm: Communicator) -> Stores:
        """See :meth:`ImageSettings.stores`; rank 0 scans the archives."""
        from hvd_lars.comm.agree import on_root
        from hvd_lars.data import ShardImages
        from hvd_lars.data.archives import scan_archives

        found = on_root(comm, lambda: scan_archives(self.root, listing_cache()))
        root = Path(found.root)
        train, val = ShardImages(root, found.train), ShardImages(root, found.val)
        return train, val, found.identity, ""


KINDS = (ImageNetData,)
