"""Settings common to data sets whose images each lie in one piece in a larger file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvd_lars.runtime.files import cache_folder
from hvd_lars.settings.fields import key
from hvd_lars.sources.images import PhotographSettings

if TYPE_CHECKING:
    from typing_extensions import Self

    from hvd_lars.comm.base import Communicator
    from hvd_lars.data.forms.scan import Form
    from hvd_lars.data.located import LocatedSet
    from hvd_lars.sources.images import Stores


class CopiedSettings(PhotographSettings):
    """Photographs whose files may be copied to each node."""

    cache_dir: str | None = key(
        binds="nothing",
        default=None,
        description="folder on the node's own disk that the files are copied to once",
    )

    def read_only(self) -> Self:
        """Return the settings without a copy on the node."""
        return self.model_copy(update={"cache_dir": None})


class LocatedSettings(CopiedSettings):
    """Photographs in larger files: one form per kind."""

    def form(self) -> Form:
        """Return the form that locates the images."""
        raise NotImplementedError

    def locate(self, cache: Path | None) -> LocatedSet:
        """Locate the images; UserError if a file is missing or damaged."""
        from hvd_lars.data.forms.scan import locate

        return locate(self.form(), self.root, cache)

    def stores(self, comm: Communicator) -> Stores:
        """See :meth:`ImageSettings.stores`; rank 0 locates, each node fills its cache."""
        from hvd_lars.comm.agree import on_each_node, on_root
        from hvd_lars.data.located import LocatedImages
        from hvd_lars.data.shards.cache import cached_root, copy_shards

        found = on_root(comm, lambda: self.locate(cache_folder("listings")))
        root, cache_dir = Path(found.root), self.cache_dir
        if cache_dir is not None:
            on_each_node(comm, lambda: copy_shards(found, cache_dir))
            root = cached_root(found, cache_dir)
        stores = LocatedImages(root, found.train), LocatedImages(root, found.val)
        return *stores, found.identity, found.left_out
