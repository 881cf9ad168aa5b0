"""Crop pictures to the side that a network takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hvd_lars.data.augment import Augment
from hvd_lars.data.decoding import Picture
from hvd_lars.data.region import Part

NUM_DRAWS = 41  # per image: mirroring, and ten attempts at area, aspect, top, left
_ASPECTS = (3 / 4, 4 / 3)
_PADDING = 4

Draws = Sequence[float]  # NUM_DRAWS numbers in [0, 1)


def training_crop(
    augment: Augment, side: int, eval_resize: int
) -> Callable[[Picture, Draws], Tensor]:
    """Return a function from a picture and its draws to a crop (3, side, side) uint8."""
    cut: Callable[[Picture, Draws], Tensor]
    if augment.crop == "resized":
        cut = partial(_resized_part, augment.crop_scale, side)
    elif augment.crop == "window":
        cut = partial(_window, side, eval_resize)
    else:
        cut = partial(_padded_window, side)
    return partial(_perhaps_mirrored, cut) if augment.flip else cut


def centre_crop(side: int, eval_resize: int) -> Callable[[Picture], Tensor]:
    """Return a function: resize the shorter side to ``eval_resize``, crop (3, side, side)."""
    return partial(_centre, side, eval_resize)


def random_part(draws: Draws, height: int, width: int, scale: tuple[float, float]) -> Part:
    """Draw a part with ``scale`` of the area and an aspect of 3/4 to 4/3, anywhere.

    If ten attempts do not fit, return as much of the centre as the aspects allow.

    Source:
        Szegedy et al. 2015, arXiv 1409.4842, §6; the fallback is torchvision's.
    """
    low, high = (math.log(aspect) for aspect in _ASPECTS)
    for i in range(1, NUM_DRAWS, 4):
        area = height * width * (scale[0] + draws[i] * (scale[1] - scale[0]))
        aspect = math.exp(low + draws[i + 1] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[i + 2] * (height - h + 1)), int(draws[i + 3] * (width - w + 1))
            return top, left, h, w
    least, most = _ASPECTS
    h, w = min(height, round(width / least)), min(width, round(height * most))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized_part(scale: tuple[float, float], side: int, picture: Picture, draws: Draws) -> Tensor:
    part = random_part(draws, picture.height, picture.width, scale)
    shrink = picture.shrink_for(part[2], part[3], side)
    top, left, height, width = (n // shrink for n in part)
    return _resized(picture.part(shrink, (top, left, height, width)), side, side)


def _window(side: int, eval_resize: int, picture: Picture, draws: Draws) -> Tensor:
    image = shorter_side(picture, eval_resize)
    top, left = (int(u * (n - side + 1)) for u, n in zip(draws[1:3], image.shape[1:], strict=True))
    return image[:, top : top + side, left : left + side]


def _padded_window(side: int, picture: Picture, draws: Draws) -> Tensor:
    missing = [max(0, side - n - 2 * _PADDING) for n in (picture.height, picture.width)]
    down, across = (_PADDING + n for n in missing)
    image = functional.pad(picture.pixels(), (across, across, down, down))
    top, left = (int(u * (n - side + 1)) for u, n in zip(draws[1:3], image.shape[1:], strict=True))
    return image[:, top : top + side, left : left + side]


def _centre(side: int, eval_resize: int, picture: Picture) -> Tensor:
    image = shorter_side(picture, eval_resize)
    top, left = (round((n - side) / 2) for n in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def shorter_side(picture: Picture, size: int) -> Tensor:
    """Return the whole picture with its shorter side resized to ``size``, uint8."""
    shorter = min(picture.height, picture.width)
    height, width = (int(size * n / shorter) for n in (picture.height, picture.width))
    return _resized(picture.pixels(), height, width)


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    if tuple(image.shape[1:]) == (height, width):
        return image
    size = (height, width)
    if image.is_cuda:  # torch's kernel for GPUs takes no bytes
        large = functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)
        return large[0].round_().to(torch.uint8)
    return functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _perhaps_mirrored(
    cut: Callable[[Picture, Draws], Tensor], picture: Picture, draws: Draws
) -> Tensor:
    image = cut(picture, draws)
    return image.flip(-1) if draws[0] < 0.5 else image
