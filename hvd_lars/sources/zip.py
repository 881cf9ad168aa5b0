"""Zip files as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvd_lars.settings.fields import key
from hvd_lars.sources.located import LocatedSettings

if TYPE_CHECKING:
    from hvd_lars.data.forms.scan import Form


class ZipData(LocatedSettings):
    """Zip files of stored images, train/CLASS/image and val/CLASS/image, read in place."""

    name: Literal["zip"] = key(binds="nothing", description="which data set")

    def form(self) -> Form:
        """Return the form."""
        from hvd_lars.data.forms.zipped import FORM

        return FORM


KINDS = (ZipData,)
