"""scikit-learn's handwritten digits as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvd_lars.settings.fields import Positive, key
from hvd_lars.sources.settings import Shape
from hvd_lars.sources.warped import WarpedSettings

if TYPE_CHECKING:
    from hvd_lars.data.warps import WarpedImages


class DigitsData(WarpedSettings):
    """scikit-learn's handwritten digits, 8×8: 897 images to train on, 900 to test on."""

    name: Literal["digits"] = key(binds="run", description="which data set")
    copies: Positive = key(
        binds="run and recipe",
        default=12,
        description="randomly warped copies of each image per epoch",
    )

    @property
    def shapes(self) -> list[Shape]:
        """Grey, 8×8."""
        return [(1, 8, 8)]

    def load(self, seed: int) -> WarpedImages:
        """See :meth:`WarpedSettings.load`."""
        from hvd_lars.data.digits import load_digits

        return load_digits(self.copies, seed, self.val_fraction)


KINDS = (DigitsData,)
