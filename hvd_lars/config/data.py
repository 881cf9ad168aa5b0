"""The config's data section, a variant for each kind of data set."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hvd_lars.settings.fields import Positive, Rate, Section

Probability = Annotated[float, Field(ge=0, le=1)]
_EXPECT = "how large the data set must be; others are refused"


class DigitsData(Section):
    """scikit-learn's handwritten digits, 8×8: 897 images to train on, 900 to test on."""

    name: Literal["digits"]
    copies: Positive = Field(
        default=12, description="randomly warped copies of an image in an epoch"
    )


class GlyphsData(Section):
    """Drawn signs of 40 classes, 16×16, generated: 2,000 images to train on, 2,000 to test on."""

    name: Literal["glyphs"]
    copies: Positive = Field(
        default=6, description="randomly warped copies of an image in an epoch"
    )


class SyntheticData(Section):
    """Random images made on the fly, for trying a model or measuring speed."""

    name: Literal["synthetic"]
    num_train: Positive = Field(default=1024, description="images to train on")
    num_eval: Positive = Field(default=256, description="images to test on")
    num_classes: Annotated[int, Field(ge=2)] = Field(default=10, description="labels")
    image_size: Positive = Field(default=32, description="side, in pixels")
    channels: Positive = Field(default=3, description="colours")


class AugmentSettings(Section):
    """What happens to training images; see the docstring of hvd_lars.data.Augment."""

    crop: Literal["resized", "window", "padded"] = Field(
        default="resized",
        description="a random part, resized; a window of the resized image; of the padded one",
    )
    crop_scale: Annotated[tuple[Probability, Probability], Field(strict=False)] = Field(
        default=(0.08, 1.0), description="resized: least and greatest share of the area"
    )
    flip: bool = Field(default=True, description="mirror half of the images")
    trivial_augment: bool = Field(default=False, description="one random operation an image")
    brightness: Rate = Field(default=0.0, description="greatest relative change")
    contrast: Rate = Field(default=0.0, description="greatest relative change")
    saturation: Rate = Field(default=0.0, description="greatest relative change")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="greatest change, in turns"
    )
    lighting: Rate = Field(default=0.0, description="deviation along ImageNet's colours")
    random_erasing: Probability = Field(default=0.0, description="share of images")
    mixup: Rate = Field(default=0.0, description="α of Beta(α, α); 0: off")
    cutmix: Rate = Field(default=0.0, description="α of Beta(α, α); 0: off")

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> AugmentSettings:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"crop_scale is [{low}, {high}]; needs 0 < least ≤ greatest ≤ 1")
        return self


class Expected(Section):
    """How large the data set must be: others are refused, and ``check`` plans without it."""

    train: Positive = Field(description="images to train on")
    eval: Positive = Field(description="images to test on")
    classes: Annotated[int, Field(ge=2)] = Field(description="labels")


class Resize(Section):
    """From this epoch on, training images have this side."""

    epoch: Annotated[int, Field(ge=0)] = Field(description="counted from 0")
    image_size: Positive = Field(description="side, in pixels")


class Images(Section):
    """What all data sets of photographs share."""

    image_size: Positive = Field(default=224, description="side of the crop, in pixels")
    eval_resize: Positive = Field(default=256, description="shorter side before the centre crop")
    workers: Annotated[int, Field(ge=0)] = Field(
        default=4, description="processes a rank that decode images ahead of time"
    )
    augment: AugmentSettings = Field(
        default=AugmentSettings(), description="what happens to training images"
    )
    progressive: Annotated[tuple[Resize, ...], Field(strict=False)] = Field(
        default=(), description="progressive resizing: sides of the training images by epoch"
    )
    expect: Expected | None = Field(default=None, description=_EXPECT)
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.001,
        description="of the training, and of the test images, that may be unreadable",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Images:
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


class ImageFolderData(Images):
    """A folder in ImageNet's layout: root/train/CLASS/…/image and root/val/CLASS/…/image."""

    name: Literal["imagefolder"]
    root: str = Field(description="folder")


class ShardsData(Images):
    """Tar shards that ``hvd-lars pack`` wrote, or others in WebDataset's layout."""

    name: Literal["shards"]
    root: str = Field(description="folder")
    train_shards: str = Field(
        default="*train*.tar", description="names of the shards, where there is no dataset.json"
    )
    val_shards: str = Field(default="*val*.tar", description="the same for the test set")
    cache_dir: str | None = Field(
        default=None, description="folder on the node's own disk; shards are copied there once"
    )


class CifarAugmentSettings(AugmentSettings):
    """The same with CIFAR's crop."""

    crop: Literal["resized", "window", "padded"] = Field(
        default="padded", description="as of other images"
    )


class _Cifar(Images):
    root: str = Field(description="folder")
    download: bool = Field(default=False, description="fetch the files where they are missing")
    image_size: Positive = Field(default=32, description="side of the crop, in pixels")
    eval_resize: Positive = Field(default=32, description="shorter side before the centre crop")
    augment: CifarAugmentSettings = Field(
        default=CifarAugmentSettings(), description="what happens to training images"
    )


class Cifar10Data(_Cifar):
    """CIFAR-10: 50,000 and 10,000 images, 32×32, of 10 classes; torchvision's files."""

    name: Literal["cifar10"]
    expect: Expected | None = Field(
        default=Expected(train=50_000, eval=10_000, classes=10), description=_EXPECT
    )


class Cifar100Data(_Cifar):
    """CIFAR-100: 50,000 and 10,000 images, 32×32, of 100 classes; torchvision's files."""

    name: Literal["cifar100"]
    expect: Expected | None = Field(
        default=Expected(train=50_000, eval=10_000, classes=100), description=_EXPECT
    )
