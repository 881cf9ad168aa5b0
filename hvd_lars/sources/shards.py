"""Tar shards as a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hvd_lars.settings.fields import key
from hvd_lars.sources.located import LocatedSettings

if TYPE_CHECKING:
    from hvd_lars.data.located import LocatedSet


class ShardsData(LocatedSettings):
    """Tar shards that ``hvd-lars pack`` wrote, or others in WebDataset's layout."""

    name: Literal["shards"] = key(binds="nothing", description="which data set")
    train_shards: str = key(
        binds="run",
        default="*train*.tar",
        description="pattern of the training shards' names if there is no dataset.json",
    )
    val_shards: str = key(
        binds="run", default="*val*.tar", description="pattern of the test shards' names, likewise"
    )

    def locate(self, cache: Path | None) -> LocatedSet:
        """Read the shards' index, or scan foreign shards."""
        from hvd_lars.data.shards.index import load_shards

        classes = None if self.expect is None else self.expect.classes
        patterns = self.train_shards, self.val_shards
        return load_shards(self.root, *patterns, cache, classes, self.val_fraction is None)


KINDS = (ShardsData,)
