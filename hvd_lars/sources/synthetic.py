"""Random images as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hvd_lars.settings.fields import Positive, key
from hvd_lars.sources.settings import BuildContext, Shape, SourceSettings

if TYPE_CHECKING:
    from hvd_lars.data.source import Source


class SyntheticData(SourceSettings):
    """Random images made on the fly, for trying a model or measuring speed."""

    name: Literal["synthetic"] = key(binds="run", description="which data set")
    num_train: Positive = key(binds="run and recipe", default=1024, description="training images")
    num_eval: Positive = key(binds="run and recipe", default=256, description="test images")
    num_classes: Annotated[int, Field(ge=2)] = key(
        binds="run and recipe", default=10, description="number of classes"
    )
    image_size: Positive = key(binds="run and recipe", default=32, description="side, in pixels")
    channels: Positive = key(binds="run and recipe", default=3, description="number of channels")

    def build(self, context: BuildContext) -> Source:
        """Make the source."""
        from hvd_lars.data.synthetic import Synthetic

        return Synthetic(**self.model_dump(exclude={"name"}), seed=context.seed)

    @property
    def shapes(self) -> list[Shape]:
        """One square shape with ``channels`` channels."""
        return [(self.channels, self.image_size, self.image_size)]

    def made_up(self, num_train: int) -> SyntheticData:
        """Return settings for another number of training images and one test image."""
        return self.model_copy(update={"num_train": num_train, "num_eval": 1})


KINDS = (SyntheticData,)
