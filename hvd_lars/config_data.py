"""The config's data section, a variant for each kind of data set; imports config_fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hvd_lars.config_fields import Positive, Rate, Section

Probability = Annotated[float, Field(ge=0, le=1)]


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
    num_train: Positive = 1024
    num_eval: Positive = 256
    num_classes: Annotated[int, Field(ge=2)] = 10
    image_size: Positive = 32
    channels: Positive = 3


class AugmentSettings(Section):
    """What happens to training images; see the docstring of hvd_lars.data.Augment."""

    crop: Literal["resized", "window", "padded"] = "resized"
    crop_scale: Annotated[tuple[Probability, Probability], Field(strict=False)] = (0.08, 1.0)
    flip: bool = True
    trivial_augment: bool = False
    brightness: Rate = 0.0
    contrast: Rate = 0.0
    saturation: Rate = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    lighting: Rate = 0.0
    random_erasing: Probability = 0.0
    mixup: Rate = 0.0
    cutmix: Rate = 0.0

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> AugmentSettings:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"crop_scale is [{low}, {high}]; needs 0 < least ≤ greatest ≤ 1")
        return self


class Expected(Section):
    """How large the data set must be: others are refused, and ``check`` plans without it."""

    train: Positive
    eval: Positive
    classes: Annotated[int, Field(ge=2)]


class Resize(Section):
    """From this epoch on, training images have this side."""

    epoch: Annotated[int, Field(ge=0)]
    image_size: Positive


class Images(Section):
    """What all data sets of photographs share."""

    image_size: Positive = Field(default=224, description="side of the crop, in pixels")
    eval_resize: Positive = Field(default=256, description="shorter side before the centre crop")
    workers: Annotated[int, Field(ge=0)] = Field(
        default=4, description="processes a rank that decode images ahead of time"
    )
    augment: AugmentSettings = AugmentSettings()
    progressive: Annotated[tuple[Resize, ...], Field(strict=False)] = Field(
        default=(), description="progressive resizing: sides of the training images by epoch"
    )
    expect: Expected | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.001,
        description="of all images, that may be unreadable; another takes the place of each",
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
    """A folder in ImageNet's layout: root/train/CLASS/image and root/val/CLASS/image."""

    name: Literal["imagefolder"]
    root: str


class ShardsData(Images):
    """Tar shards that ``hvd-lars pack`` wrote, or others in WebDataset's layout."""

    name: Literal["shards"]
    root: str
    train_shards: str = Field(
        default="*train*.tar", description="names of the shards, where there is no dataset.json"
    )
    val_shards: str = "*val*.tar"
    cache_dir: str | None = Field(
        default=None, description="folder on the node's own disk; shards are copied there once"
    )


class CifarAugmentSettings(AugmentSettings):
    """The same with CIFAR's crop."""

    crop: Literal["resized", "window", "padded"] = "padded"


class _Cifar(Images):
    root: str
    download: bool = Field(default=False, description="fetch the files where they are missing")
    image_size: Positive = 32
    eval_resize: Positive = 32
    augment: CifarAugmentSettings = CifarAugmentSettings()


class Cifar10Data(_Cifar):
    """CIFAR-10: 50,000 and 10,000 images, 32×32, of 10 classes; torchvision's files."""

    name: Literal["cifar10"]
    expect: Expected | None = Expected(train=50_000, eval=10_000, classes=10)


class Cifar100Data(_Cifar):
    """CIFAR-100: 50,000 and 10,000 images, 32×32, of 100 classes; torchvision's files."""

    name: Literal["cifar100"]
    expect: Expected | None = Expected(train=50_000, eval=10_000, classes=100)
