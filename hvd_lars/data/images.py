"""Photographs, wherever they lie: decoded, cropped, augmented, normalised.

Imports augment, mixing, randomness, source and errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, final

import numpy as np
import torch
from torch import Tensor

from hvd_lars.data.augment import Augment, centre, colours, geometry
from hvd_lars.data.mixing import mix_pairs
from hvd_lars.data.randomness import seed_of, uniforms
from hvd_lars.data.source import Batch, Indices, Request
from hvd_lars.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# Mean and deviation of ImageNet's channels in [0, 1], as every published recipe uses them.
IMAGENET_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Eigenvalues and eigenvectors (columns) of the covariance of ImageNet's colours in [0, 1].
_LIGHT_VALUES = (0.2175, 0.0188, 0.0045)
_LIGHT_VECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)

_COLOURS, _ERASING, _LIGHTING, _MIXING = 1, 2, 3, 4  # separate streams of random numbers


class ImageStore(Protocol):
    """The images of one split: ``labels`` (n,), and image ``index`` of them as RGB."""

    labels: Indices

    def open(self, index: int) -> Image:
        """Decode an image; UserError names its file if that fails."""
        ...


def decode(data: bytes | Path, name: str) -> Image:
    """An image file, or its bytes, as RGB; UserError names it where that cannot be."""
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        with pil.open(BytesIO(data) if isinstance(data, bytes) else data) as file:
            image: Image = file.convert("RGB")
            return image
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        # Pillow names the file, or a buffer in memory, which the line does already.
        problem = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: not a readable image: {problem}") from None


@final
class Images:
    """Two stores of images with the transforms of the published recipes.

    Workers decode, crop and flip; batches are uint8, so that a quarter of the bytes crosses to
    the device.  There they are normalised, shifted in colour, erased and mixed.  The operations
    of one image at a time (TrivialAugment, colour jitter) run on a GPU where there is one and in
    the workers elsewhere, with the same random numbers.

    Args:
        train, val: the stores.
        num_classes: labels are below it.
        augment: what happens to training images.
        image_size: side of the crop, in pixels.
        eval_resize: the shorter side before the centre crop, in pixels.
        seed: of all draws, with epoch and sample.
        sizes: (first epoch, side) of progressive resizing, in order; the side is ``image_size``
            before the first.
        colour_statistics: mean and deviation of the channels in [0, 1].
        gpu: whether the device is one.
    """

    def __init__(
        self,
        train: ImageStore,
        val: ImageStore,
        num_classes: int,
        augment: Augment,
        image_size: int,
        eval_resize: int,
        seed: int,
        sizes: Sequence[tuple[int, int]] = (),
        colour_statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET_COLOURS,
        gpu: bool = False,
    ) -> None:
        self._train, self._val, self._augment, self._seed = train, val, augment, seed
        self.num_train, self.num_eval = len(train.labels), len(val.labels)
        self.num_classes, self.mixes_pairs = num_classes, augment.mixes_pairs
        self._statistics, self._gpu = colour_statistics, gpu
        self._sizes = [(0, image_size), *sizes]
        self._geometry = {size: geometry(augment, size, eval_resize) for _, size in self._sizes}
        self._colours = colours(augment)
        self._centre = centre(image_size, eval_resize)

    def image_size(self, epoch: int) -> int:
        """Side of the training images of an epoch, in pixels."""
        return [size for first, size in self._sizes if first <= epoch][-1]

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """Random crops (n, 3, side, side) uint8 and labels (n,)."""
        crop = self._geometry[self.image_size(epoch)]
        images = []
        with torch.random.fork_rng(devices=[]):  # dropout's generator is the same one
            for index in indices.tolist():
                self._begin(epoch, index)
                image = _tensor(crop(self._train.open(index)))
                if self._colours is not None and not self._gpu:
                    self._begin(epoch, index, _COLOURS)
                    image = self._colours(image)
                images.append(image)
        return torch.stack(images), torch.from_numpy(self._train.labels[indices])

    def eval_batch(self, indices: Indices) -> Batch:
        """Centre crops (n, 3, image_size, image_size) uint8 and labels (n,)."""
        images = [_tensor(self._centre(self._val.open(i))) for i in indices.tolist()]
        return torch.stack(images), torch.from_numpy(self._val.labels[indices])

    def on_device(self, images: Tensor, labels: Tensor, request: Request) -> Batch:
        """Normalised float32 images; shares of the classes in place of labels where mixed."""
        epoch, indices = request
        augment = self._augment
        if epoch is None:
            return self._normalised(images.float() / 255.0), labels
        if self._colours is not None and self._gpu:
            with torch.random.fork_rng(devices=[]):
                for i, index in enumerate(indices.tolist()):
                    self._begin(epoch, index, _COLOURS)
                    images[i] = self._colours(images[i])
        pixels = images.float() / 255.0
        if augment.lighting:
            seed = seed_of(self._seed, _LIGHTING)
            normal = torch.special.ndtri(
                torch.from_numpy(uniforms(seed, epoch, indices, 3) + 2**-54)
            )
            strength = normal * torch.tensor(_LIGHT_VALUES) * augment.lighting
            shift = strength @ torch.tensor(_LIGHT_VECTORS, dtype=torch.float64).T
            pixels += shift.float().to(pixels.device)[:, :, None, None]
        pixels = self._normalised(pixels)
        if augment.random_erasing:
            self._erase(pixels, epoch, indices)
        if not augment.mixes_pairs:
            return pixels, labels
        seed = seed_of(self._seed, _MIXING)
        return mix_pairs(
            pixels, labels, request, self.num_classes, seed, augment.mixup, augment.cutmix
        )

    def _begin(self, epoch: int, index: int, *stream: int) -> None:
        """Make the global generator that of a sample; a GPU's, which is dropout's, is left."""
        torch.default_generator.manual_seed(seed_of(self._seed, epoch, index, *stream))

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=pixels.device) for v in self._statistics)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def _erase(self, pixels: Tensor, epoch: int, indices: Indices) -> None:
        """Rectangles become the mean colour, 0, in place."""
        from torchvision.transforms import v2

        erase = v2.RandomErasing(self._augment.random_erasing)
        with torch.random.fork_rng(devices=[]):
            for i, index in enumerate(indices.tolist()):
                self._begin(epoch, index, _ERASING)
                pixels[i] = erase(pixels[i])


def _tensor(image: Image) -> Tensor:
    """(3, height, width) uint8 of a PIL image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
