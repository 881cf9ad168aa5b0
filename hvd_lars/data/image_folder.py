"""ImageNet-like folders of images, decoded and cropped; imports listing, randomness, source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from hvd_lars.data.listing import Listing, Split
from hvd_lars.data.randomness import seed_of
from hvd_lars.data.source import Batch, Indices
from hvd_lars.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# Mean and deviation of ImageNet's channels in [0, 1], as every published recipe uses them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@final
class ImageFolder:
    """Images of a listing, with the transforms of the published recipes.

    Training: a random crop of 8 to 100 % of the area and an aspect of 3/4 to 4/3, resized, and
    a flip; evaluation: the shorter side resized, then the centre.  Batches are uint8, so that a
    quarter of the bytes crosses to the GPU, which normalises them in ``on_device``.

    Args:
        listing: the images.
        image_size: side of the crop, in pixels.
        eval_resize: the shorter side before the centre crop, in pixels.
        seed: of the crops, with epoch and sample.
    """

    def __init__(self, listing: Listing, image_size: int, eval_resize: int, seed: int) -> None:
        from torchvision.transforms import v2

        self._listing, self._seed = listing, seed
        self.num_train, self.num_eval = len(listing.train.paths), len(listing.val.paths)
        self.num_classes = len(listing.classes)
        self._train = v2.Compose(
            [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
        )
        self._eval = v2.Compose([v2.Resize(eval_resize, antialias=True), v2.CenterCrop(image_size)])

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """Random crops (n, 3, image_size, image_size) uint8 and labels (n,)."""
        with torch.random.fork_rng(devices=[]):  # dropout's generator is the same one
            images = []
            for index in indices.tolist():
                torch.manual_seed(seed_of(self._seed, epoch, index))
                images.append(self._load(self._listing.train, index, self._train))
        return torch.stack(images), torch.from_numpy(self._listing.train.labels[indices])

    def eval_batch(self, indices: Indices) -> Batch:
        """Centre crops (n, 3, image_size, image_size) uint8 and labels (n,)."""
        images = [self._load(self._listing.val, i, self._eval) for i in indices.tolist()]
        return torch.stack(images), torch.from_numpy(self._listing.val.labels[indices])

    def on_device(self, images: Tensor) -> Tensor:
        """Normalised float32 of uint8 images, on their device."""
        mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1) * 255.0
        std = torch.tensor(STD, device=images.device).view(3, 1, 1) * 255.0
        return (images.float() - mean) / std

    def _load(self, split: Split, index: int, transform: Any) -> Tensor:
        path = Path(self._listing.root, split.paths[index].decode())
        image = _decode(path)
        # A PIL image and its tensor have the same bytes: (height, width, 3).
        array = np.array(transform(image))
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _decode(path: Path) -> Image:
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        with pil.open(path) as file:
            image: Image = file.convert("RGB")
            return image
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable image: {error}") from None
