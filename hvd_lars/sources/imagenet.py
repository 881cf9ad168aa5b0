"""ImageNet's official archives as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvd_lars.settings.fields import key
from hvd_lars.sources.located import LocatedSettings

if TYPE_CHECKING:
    from hvd_lars.data.forms.scan import Form


class ImageNetData(LocatedSettings):
    """ImageNet's official archives, or ImageNet-21K's tar file per class, read in place."""

    name: Literal["imagenet"] = key(binds="nothing", description="which data set")

    def form(self) -> Form:
        """Return the form."""
        from hvd_lars.data.forms.archives import FORM

        return FORM


KINDS = (ImageNetData,)
