"""A data set in whatever form is found."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Literal

from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user
from hvd_lars.runtime.terminal import warn
from hvd_lars.settings.fields import key
from hvd_lars.sources.images import PhotographSettings
from hvd_lars.sources.located import CopiedSettings

if TYPE_CHECKING:
    from hvd_lars.comm.base import Communicator
    from hvd_lars.sources.images import Stores


class AutoData(CopiedSettings):
    """Photographs in whatever form is found in root: class folders, archives, shards, …."""

    name: Literal["auto"] = key(binds="nothing", description="which data set")
    train_list: str | None = key(binds="run", default=None, description="as for imagefolder")
    val_list: str | None = key(binds="run", default=None, description="as for imagefolder")

    def stores(self, comm: Communicator) -> Stores:
        """See :meth:`ImageSettings.stores`; rank 0 looks, and says what it found."""
        from hvd_lars.comm.agree import on_root

        kind = on_root(comm, self._kind)
        return self._as(kind).stores(comm)

    def _kind(self) -> str:
        from hvd_lars.data.forms.recognise import PARQUET, recognise

        if self.train_list or self.val_list:
            return "imagefolder"
        root = expand_user(self.root, "data.root")
        kind, title = recognise(root)
        if kind == PARQUET:
            raise UserError(
                f"data.root: {root}: found {title}, which training cannot read directly; pack it "
                f"first: hvd-lars pack {root} FOLDER, then data.root=FOLDER"
            )
        warn(f"data.root: {root}: found {title} (data.name={kind})")
        return kind

    def _as(self, kind: str) -> PhotographSettings:
        """Return the settings of a form, with the keys of these."""
        file = "image_folder" if kind == "imagefolder" else kind
        (form,) = import_module(f"hvd_lars.sources.{file}").KINDS
        values = {
            name: getattr(self, name)
            for name in form.model_fields
            if name in type(self).model_fields
        }
        if self.cache_dir is not None and "cache_dir" not in form.model_fields:
            raise UserError(
                f"data.cache_dir: data of the form {kind} cannot be copied to it; remove the key, "
                f"or make shards: hvd-lars pack {self.root} FOLDER"
            )
        found = form.model_construct(**values | {"name": kind})
        assert isinstance(found, PhotographSettings)
        return found


KINDS = (AutoData,)
