"""Tar shards as a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvd_lars.runtime.files import listing_cache
from hvd_lars.settings.fields import key
from hvd_lars.sources.images import PhotographSettings

if TYPE_CHECKING:
    from hvd_lars.comm.base import Communicator
    from hvd_lars.sources.images import Stores


class ShardsData(PhotographSettings):
    """Tar shards that ``hvd-lars pack`` wrote, or others in WebDataset's layout."""

    name: Literal["shards"] = key(binds="run", description="which data set")
    train_shards: str = key(
        binds="run",
        default="*train*.tar",
        description="pattern of the training shards' names if there is no dataset.json",
    )
    val_shards: str = key(
        binds="run", default="*val*.tar", description="pattern of the test shards' names, likewise"
    )
    cache_dir: str | None = key(
        binds="nothing",
        default=None,
        description="folder on the node's own disk that shards are copied to once",
    )

    def stores(self, comm: Communicator) -> Stores:
        """See :meth:`ImageSettings.stores`; rank 0 reads the index, each node fills its cache."""
        from hvd_lars.comm.agree import on_each_node, on_root
        from hvd_lars.data import ShardImages, cached_root, copy_shards, load_shards

        classes = None if self.expect is None else self.expect.classes
        patterns = self.train_shards, self.val_shards
        shards = on_root(comm, lambda: load_shards(self.root, *patterns, listing_cache(), classes))
        root, cache_dir = Path(shards.root), self.cache_dir
        if cache_dir is not None:
            on_each_node(comm, lambda: copy_shards(shards, cache_dir))
            root = cached_root(shards, cache_dir)
        stores = ShardImages(root, shards.train), ShardImages(root, shards.val)
        return *stores, shards.identity(), shards.left_out

    def read_only(self) -> ShardsData:
        """Return the settings without a copy on the node."""
        return self.model_copy(update={"cache_dir": None})


KINDS = (ShardsData,)
