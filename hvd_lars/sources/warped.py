"""The settings that small grey images in memory share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_lars.sources.settings import (
    BuildContext,
    SourceSettings,
    Statistics,
    ValFraction,
    val_fraction_key,
)

if TYPE_CHECKING:
    from hvd_lars.data.warps import WarpedImages


class WarpedSettings(SourceSettings):
    """A few images of which each epoch holds randomly warped copies."""

    val_fraction: ValFraction = val_fraction_key()

    def load(self, seed: int) -> WarpedImages:
        """Make the source without other ranks."""
        raise NotImplementedError

    def build(self, context: BuildContext) -> WarpedImages:
        """Make the source."""
        return self.load(context.seed)

    def statistics(self, seed: int) -> Statistics:
        """Return mean and deviation of the training images."""
        made = self.load(seed)
        return (made.mean,), (made.deviation,)
