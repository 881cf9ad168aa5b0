"""Random images as a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hvd_lars.settings.fields import Positive, key
from hvd_lars.sources.settings import BuildContext, Shape, SourceSettings

if TYPE_CHECKING:
    from hvd_lars.data import Source


class SyntheticData(SourceSettings):
    """Random images made on the fly, for trying a model or measuring speed."""

    name: Literal["synthetic"] = key(binds="run", description="which data set")
    num_train: Positive = key(
        binds="run and recipe", default=1024, description="images to train on"
    )
    num_eval: Positive = key(binds="run and recipe", default=256, description="images to test on")
    num_classes: Annotated[int, Field(ge=2)] = key(
        binds="run and recipe", default=10, description="labels"
    )
    image_size: Positive = key(binds="run and recipe", default=32, description="side, in pixels")
    channels: Positive = key(binds="run and recipe", default=3, description="colours")

    def build(self, context: BuildContext) -> Source:
        """Make the source."""
        from hvd_lars.data.synthetic import Synthetic

        return Synthetic(**self.model_dump(exclude={"name"}), seed=context.seed)

    @property
    def shapes(self) -> list[Shape]:
        """Square, of ``channels``."""
        return [(self.channels, self.image_size, self.image_size)]

    def made_up(self, num_train: int) -> SyntheticData:
        """The same, of another number of images."""
        return self.model_copy(update={"num_train": num_train, "num_eval": 1})


KINDS = (SyntheticData,)
