"""Settings common to data sets of photographs: crops, augmentation, tolerance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user
from hvd_lars.runtime.terminal import warn
from hvd_lars.settings.fields import Positive, Rate, Section, key
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
    from hvd_lars.comm.base import Communicator
    from hvd_lars.data.identity import DataIdentity
    from hvd_lars.data.images import DeviceWork, ImageStore
    from hvd_lars.data.source import Source

    Stores = tuple[ImageStore, ImageStore, DataIdentity, str]

Probability = Annotated[float, Field(ge=0, le=1)]
EXPECT = "required size of the data set; any other is refused"
# Mean and deviation of ImageNet's channels in [0, 1], as every published recipe uses them.
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class AugmentSettings(Section):
    """Augmentation of training images; see hvd_lars.data.augment.Augment."""

    crop: Literal["resized", "window", "padded"] = key(
        binds="run and recipe",
        default="resized",
        description="a random part, resized; or a window of the resized, or of the padded image",
    )
    crop_scale: Annotated[tuple[Probability, Probability], Field(strict=False)] = key(
        binds="run and recipe",
        default=(0.08, 1.0),
        description="resized: smallest and largest share of the area",
    )
    flip: bool = key(binds="run and recipe", default=True, description="mirror half of the images")
    trivial_augment: bool = key(
        binds="run and recipe", default=False, description="one random operation per image"
    )
    brightness: Rate = key(
        binds="run and recipe", default=0.0, description="largest relative change"
    )
    contrast: Rate = key(binds="run and recipe", default=0.0, description="largest relative change")
    saturation: Rate = key(
        binds="run and recipe", default=0.0, description="largest relative change"
    )
    hue: Annotated[float, Field(ge=0, le=0.5)] = key(
        binds="run and recipe", default=0.0, description="largest change, in turns"
    )
    lighting: Rate = key(
        binds="run and recipe", default=0.0, description="deviation of the PCA colour shift"
    )
    random_erasing: Probability = key(
        binds="run and recipe", default=0.0, description="share of images with an erased part"
    )
    mixup: Rate = key(binds="run and recipe", default=0.0, description="α of Beta(α, α); 0: off")
    cutmix: Rate = key(binds="run and recipe", default=0.0, description="α of Beta(α, α); 0: off")

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> AugmentSettings:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"crop_scale is [{low}, {high}]; needs 0 < least ≤ greatest ≤ 1")
        return self


class Resize(Section):
    """From this epoch on, training images have this side."""

    epoch: Annotated[int, Field(ge=0)] = key(binds="run and recipe", description="counted from 0")
    image_size: Positive = key(binds="run and recipe", description="side, in pixels")


class ImageSettings(SourceSettings):
    """Settings common to data sets of photographs."""

    image_size: Positive = key(
        binds="run and recipe", default=224, description="side of the crop, in pixels"
    )
    eval_resize: Positive = key(
        binds="run and recipe", default=256, description="shorter side before the centre crop"
    )
    workers: Annotated[int, Field(ge=0)] = key(
        binds="nothing",
        default=4,
        description="processes per rank that decode images ahead of time",
    )
    augment: AugmentSettings = key(
        binds="run and recipe",
        default=AugmentSettings(),
        description="augmentation of training images",
    )
    progressive: Annotated[tuple[Resize, ...], Field(strict=False)] = key(
        binds="run and recipe",
        default=(),
        description="progressive resizing: side of the training images by epoch",
    )
    expect: Expected | None = key(binds="nothing", default=None, description=EXPECT)
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = key(
        binds="recipe",
        default=0.001,
        description="share of the training, and of the test images, that may be unreadable",
    )
    val_fraction: ValFraction = val_fraction_key()

    @model_validator(mode="after")
    def _sizes_fit(self) -> ImageSettings:
        if self.eval_resize < self.image_size:
            raise ValueError(
                f"eval_resize is {self.eval_resize}; at least image_size {self.image_size}"
            )
        largest = max([self.image_size, *(entry.image_size for entry in self.progressive)])
        if self.augment.crop == "window" and self.eval_resize < largest:
            raise ValueError(
                f"eval_resize is {self.eval_resize}; at least {largest}, the largest side, where "
                f"augment.crop is window"
            )
        epochs = [entry.epoch for entry in self.progressive]
        if epochs != sorted(set(epochs)):
            raise ValueError(f"progressive has epochs {epochs}; each must be above the one before")
        return self

    COLOURS: ClassVar[Statistics] = IMAGENET_STATISTICS

    @abstractmethod
    def stores(self, comm: Communicator) -> Stores:
        """Return training and test images, their identity and the skipped files; collective.

        With ``val_fraction`` set, test images are not used and may be missing.
        """

    def build(self, context: BuildContext) -> Source:
        """See :meth:`SourceSettings.build`; warns of skipped files and checks ``expect``."""
        from hvd_lars.data.augment import Augment
        from hvd_lars.data.hold_out import classes_without_images, hold_out
        from hvd_lars.data.images import Images, Sizes

        train, val, identity, left_out = self.stores(context.comm)
        where = getattr(self, "root", self.name)
        if self.val_fraction is not None:
            train, val, identity = hold_out(train, identity, self.val_fraction)
        elif not len(val.labels):
            raise UserError(
                f"data.root: {where}: no test images; data.val_fraction=0.02 holds some of the "
                f"training images out"
            )
        if context.comm.rank == 0:
            if left_out:
                warn(f"data.root: {where}: skipped, not images of a class: {left_out}")
            if absent := classes_without_images(train.labels, identity.classes):
                warn(f"data.root: {where}: no training images of {absent}; labels count from 0")
            if absent := classes_without_images(val.labels, identity.classes):
                warn(f"data.root: {where}: no test images of {absent}")
        if self.expect is not None:
            sizes = len(train.labels), len(val.labels), len(identity.classes)
            self.expect.check(*sizes, where)
        progressive = [(entry.epoch, entry.image_size) for entry in self.progressive]
        return Images(
            train,
            val,
            identity,
            Augment(**self.augment.model_dump()),
            Sizes(self.image_size, self.eval_resize, progressive),
            context.seed,
            self.COLOURS,
            self._device_work(context.gpu),
        )

    def _device_work(self, gpu: bool) -> DeviceWork:
        from hvd_lars.data.images import DeviceWork

        # Most of TrivialAugment's operations in torchvision wait for the device.
        return DeviceWork(augment=gpu and not self.augment.trivial_augment)

    @property
    def shapes(self) -> list[Shape]:
        """Square shapes: the evaluation side first, then those of progressive resizing."""
        return [(3, side, side) for side in self._sides()]

    @property
    def expected(self) -> Expected | None:
        """``expect``."""
        return self.expect

    @property
    def mixes_pairs(self) -> bool:
        """True with mixup or cutmix."""
        return self.augment.mixup > 0 or self.augment.cutmix > 0

    @property
    def num_workers(self) -> int:
        """``workers``."""
        return self.workers

    @property
    def tolerated_bad_fraction(self) -> float:
        """``max_bad_fraction``."""
        return self.max_bad_fraction

    def statistics(self, seed: int) -> Statistics:
        """Return the values of published recipes."""
        return self.COLOURS

    def shared_bytes(self, micro_batch: int, eval_batch: int) -> int:
        """Return the bytes of the batches that workers prefetch."""
        from hvd_lars.data.loader import shared_bytes

        sides = self._sides()
        pixels = max(micro_batch * max(sides) ** 2, eval_batch * self.image_size**2)
        return shared_bytes(3 * pixels, self.workers)

    def facts(self) -> dict[str, int]:
        """Return the sizes of the centre crop."""
        return {"image_size": self.image_size, "eval_resize": self.eval_resize}

    def made_up(self, num_train: int) -> SourceSettings:
        """Return settings for random images of the crop's size."""
        from hvd_lars.sources.synthetic import SyntheticData

        return SyntheticData(
            name="synthetic",
            num_train=num_train,
            num_eval=1,
            num_classes=1000 if self.expect is None else self.expect.classes,
            image_size=self.image_size,
            channels=3,
        )

    def _sides(self) -> Sequence[int]:
        return [self.image_size, *(entry.image_size for entry in self.progressive)]


class PhotographSettings(ImageSettings):
    """Photographs below a root, in one of several forms of the same data.

    ``name``, the form, binds nothing: a run compares the names and labels of its images.
    """

    FAMILY: ClassVar[str] = "photographs"

    root: str = key(binds="nothing", description="folder of the data set")
    decode: Literal["cpu", "gpu"] = key(
        binds="run",
        default="cpu",
        description="where JPEG training images are decoded; gpu: for nodes with few cores per GPU",
    )

    @property
    def location(self) -> Path:
        """``root``."""
        return expand_user(self.root, "data.root")

    def _device_work(self, gpu: bool) -> DeviceWork:
        import torch

        from hvd_lars.data.encoded import why_not_on
        from hvd_lars.data.images import DeviceWork

        if self.decode == "cpu":
            return super()._device_work(gpu)
        problem = why_not_on(torch.device("cuda")) if gpu else "this rank computes on the CPU"
        if problem:
            raise UserError(f"data.decode: gpu: {problem}; data.decode=cpu works everywhere")
        return DeviceWork(augment=True, decode=True)
