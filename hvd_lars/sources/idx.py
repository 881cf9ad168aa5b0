"""MNIST and its relatives as data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user
from hvd_lars.settings.fields import Positive, key
from hvd_lars.sources.settings import (
    BuildContext,
    Expected,
    Shape,
    SourceSettings,
    Statistics,
    ValFraction,
    val_fraction_key,
)

if TYPE_CHECKING:
    from hvd_lars.data.idx import IdxImages


class IdxData(SourceSettings):
    """Grey images in MNIST's IDX files: MNIST, Fashion-MNIST, KMNIST, EMNIST; see docs/data.md."""

    name: Literal["idx"] = key(binds="run", description="which data set")
    root: str = key(binds="nothing", description="folder of the four files, or torchvision's")
    image_size: Positive = key(
        binds="run and recipe", default=28, description="side that the images have, in pixels"
    )
    shift: Annotated[int, Field(ge=0, le=16)] = key(
        binds="run and recipe",
        default=2,
        description="most pixels that a training image is moved to any side",
    )
    flip: bool = key(
        binds="run and recipe", default=False, description="mirror half of the training images"
    )
    val_fraction: ValFraction = val_fraction_key()
    expect: Expected | None = key(
        binds="nothing", default=None, description="size of the data set; others are refused"
    )

    def build(self, context: BuildContext) -> IdxImages:
        """Read the files; the first rank of every node reads first, to report what is wrong."""
        from hvd_lars.comm.agree import on_each_node

        made: list[IdxImages] = []
        on_each_node(context.comm, lambda: made.append(self._load(context.seed)))
        return made[0] if made else self._load(context.seed)

    @property
    def shapes(self) -> list[Shape]:
        """Return the grey images' shape."""
        return [(1, self.image_size, self.image_size)]

    @property
    def location(self) -> Path:
        """Return ``root``."""
        return expand_user(self.root, "data.root")

    @property
    def expected(self) -> Expected | None:
        """Return ``expect``."""
        return self.expect

    def statistics(self, seed: int) -> Statistics | None:
        """Return those of the training images; None where the files are not here."""
        try:
            found = self._load(seed)
        except UserError:
            return None
        return (found.mean,), (found.deviation,)

    def _load(self, seed: int) -> IdxImages:
        from hvd_lars.data.idx import IdxImages, find_idx

        files = find_idx(self.root)
        found = IdxImages(files, self.shift, self.flip, seed, self.val_fraction)
        if found.shape != self.shapes[0]:
            sides = "×".join(map(str, found.shape[1:]))
            raise UserError(
                f"data.image_size: found {self.image_size}; {files.train_images} has images of "
                f"{sides}"
            )
        if self.expect is not None:
            self.expect.check(found.num_train, found.num_eval, found.num_classes, self.root)
        return found


KINDS = (IdxData,)
