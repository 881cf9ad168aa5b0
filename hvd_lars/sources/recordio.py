"""MXNet's RecordIO files as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvd_lars.settings.fields import key
from hvd_lars.sources.located import LocatedSettings

if TYPE_CHECKING:
    from hvd_lars.data.forms.scan import Form


class RecordIOData(LocatedSettings):
    """MXNet's train.rec and val.rec, read in place."""

    name: Literal["recordio"] = key(binds="nothing", description="which data set")

    def form(self) -> Form:
        """Return the form."""
        from hvd_lars.data.forms.recordio import FORM

        return FORM


KINDS = (RecordIOData,)
