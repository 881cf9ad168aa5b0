"""Drawn signs as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvd_lars.settings.fields import Positive, key
from hvd_lars.sources.settings import Shape
from hvd_lars.sources.warped import WarpedSettings

if TYPE_CHECKING:
    from hvd_lars.data.warps import WarpedImages


class GlyphsData(WarpedSettings):
    """Drawn signs of 40 classes, 16×16, generated: 2,000 images to train on, 2,000 to test on."""

    name: Literal["glyphs"] = key(binds="run", description="which data set")
    copies: Positive = key(
        binds="run and recipe",
        default=6,
        description="randomly warped copies of each image per epoch",
    )

    @property
    def shapes(self) -> list[Shape]:
        """Grey, 16×16."""
        return [(1, 16, 16)]

    def load(self, seed: int) -> WarpedImages:
        """See :meth:`WarpedSettings.load`."""
        from hvd_lars.data.glyphs import draw_glyphs

        return draw_glyphs(self.copies, seed, self.val_fraction)


KINDS = (GlyphsData,)
