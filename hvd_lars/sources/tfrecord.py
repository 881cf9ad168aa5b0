"""TFRecord files as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hvd_lars.settings.fields import key
from hvd_lars.sources.located import LocatedSettings

if TYPE_CHECKING:
    from hvd_lars.data.forms.scan import Form


class TFRecordData(LocatedSettings):
    """TFRecord files of ImageNet, TensorFlow's or TensorFlow Datasets', read in place."""

    name: Literal["tfrecord"] = key(binds="nothing", description="which data set")

    def form(self) -> Form:
        """Return the form."""
        from hvd_lars.data.forms.tfrecord import FORM

        return FORM


KINDS = (TFRecordData,)
