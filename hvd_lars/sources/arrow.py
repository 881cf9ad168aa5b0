"""Hugging Face's Arrow files as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvd_lars.settings.fields import key
from hvd_lars.sources.located import LocatedSettings

if TYPE_CHECKING:
    from hvd_lars.data.forms.scan import Form


class ArrowData(LocatedSettings):
    """A DatasetDict that ``save_to_disk`` of Hugging Face's datasets wrote, read in place."""

    name: Literal["arrow"] = key(binds="nothing", description="which data set")

    def form(self) -> Form:
        """Return the form."""
        from hvd_lars.data.forms.arrow import FORM

        return FORM


KINDS = (ArrowData,)
