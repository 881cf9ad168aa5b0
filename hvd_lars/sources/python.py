"""A data set of the user's own code."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StringConstraints

from hvd_lars.errors import UserError
from hvd_lars.runtime.imports import REFERENCE, load_callable
from hvd_lars.settings.fields import Positive, key
from hvd_lars.sources.settings import BuildContext, Shape, SourceSettings

if TYPE_CHECKING:
    from hvd_lars.data.user_dataset import UserImages


class PythonData(SourceSettings):
    """Map-style torch data sets of (image, label), made by one's own code; see docs/data.md."""

    name: Literal["python"] = key(binds="run", description="which data set")
    factory: Annotated[str, StringConstraints(pattern=REFERENCE)] = key(
        binds="run and recipe",
        description="package.module:function; returns a training and an evaluation set",
    )
    options: dict[str, Any] = key(
        binds="run and recipe", default={}, description="keyword arguments of the function"
    )
    image_shape: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] = key(
        binds="run and recipe", description="channels, height and width of every image"
    )
    num_classes: Annotated[int, Field(ge=2)] | None = key(
        binds="run and recipe",
        default=None,
        description="labels; by default the length of the training set's `classes`",
    )
    workers: Annotated[int, Field(ge=0)] = key(
        binds="nothing", default=4, description="processes per rank that make batches ahead of time"
    )

    def build(self, context: BuildContext) -> UserImages:
        """Call the function on every rank; its exceptions keep their traceback."""
        from hvd_lars.data.user_dataset import UserImages

        made = load_callable(self.factory, "data.factory")(**self.options)
        if not isinstance(made, tuple) or len(made) != 2:
            raise UserError(
                f"data.factory: {self.factory} returned {type(made).__name__}; two data sets, to "
                f"train and to evaluate on, are needed"
            )
        options = json.dumps(self.options, sort_keys=True, default=str)
        description = f"{self.factory} {options}"
        return UserImages(*made, self.num_classes, self.image_shape, context.seed, description)

    @property
    def shapes(self) -> list[Shape]:
        """Return ``image_shape``."""
        return [self.image_shape]

    @property
    def num_workers(self) -> int:
        """Return ``workers``."""
        return self.workers

    def shared_bytes(self, micro_batch: int, eval_batch: int) -> int:
        """Return the bytes of the batches that workers make ahead, as float32."""
        from hvd_lars.data.loader import shared_bytes

        return shared_bytes(4 * prod(self.image_shape) * max(micro_batch, eval_batch), self.workers)


KINDS = (PythonData,)
