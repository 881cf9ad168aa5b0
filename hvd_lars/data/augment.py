"""Augmentation of training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Augment:
    """Augmentation options of training images.

    Attributes:
        crop: ``resized``: a random part of ``crop_scale`` of the area, aspect 3/4 to 4/3,
            resized (Szegedy et al. 2015); ``window``: the shorter side resized as in evaluation,
            then a random window (AlexNet); ``padded``: a random window after 4 pixels of padding
            on each side (CIFAR).
        crop_scale: least and greatest share of the area.
        flip: mirror half of the images.
        trivial_augment: one random operation of random strength (Müller, Hutter 2021).
        brightness, contrast, saturation, hue: greatest relative change; hue in turns.
        lighting: standard deviation of the shift along the principal components of ImageNet's
            colours (Krizhevsky et al. 2012, §4.1: 0.1).
        random_erasing: probability of erasing a rectangle (Zhong et al. 2017).
        mixup: α of Beta(α, α) (Zhang et al. 2017); 0 disables it.
        cutmix: α of Beta(α, α) (Yun et al. 2019); 0 disables it.  With mixup, each pair gets one
            of the two.
    """

    crop: Literal["resized", "window", "padded"] = "resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    trivial_augment: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    lighting: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes_pairs(self) -> bool:
        """Whether an image depends on its neighbour."""
        return self.mixup > 0 or self.cutmix > 0


def colours(augment: Augment) -> Any | None:
    """Return a map between uint8 images (3, height, width); None if no operation is set."""
    from torchvision.transforms import v2

    jitter = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    steps: list[Any] = []
    if augment.trivial_augment:
        steps.append(v2.TrivialAugmentWide())
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    return v2.Compose(steps) if steps else None
