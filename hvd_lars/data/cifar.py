"""CIFAR-10 and CIFAR-100 from torchvision's files on disk."""

from __future__ import annotations

from typing import Any, final

import numpy as np

from hvd_lars.data.decoding import Picture
from hvd_lars.data.source import Indices
from hvd_lars.errors import UserError


@final
class ArrayImages:
    """Images held in memory: ``pixels`` (n, height, width, 3) uint8 and ``labels`` (n,)."""

    def __init__(self, pixels: Any, labels: Any) -> None:
        self._pixels = np.asarray(pixels, dtype=np.uint8)
        self.labels = np.asarray(labels, dtype=np.int64)

    def take(self, chosen: Indices) -> ArrayImages:
        """Return a store of some of the images."""
        return ArrayImages(self._pixels[chosen], self.labels[chosen])

    def open(self, index: int) -> Picture:
        """Return an image; never fails."""
        return Picture(self._pixels[index], f"image {index}")


def load_cifar(
    name: str, root: str, download: bool
) -> tuple[ArrayImages, ArrayImages, tuple[str, ...]]:
    """Load training and test images of ``cifar10`` or ``cifar100``, and the class names.

    torchvision checks every MD5.

    Args:
        name: ``cifar10`` or ``cifar100``.
        root: the folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        download: fetch missing files from the authors' site.

    Raises:
        UserError: files are missing or damaged, or the download failed.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = (kind(root, train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError) as error:
        if download:
            reason = getattr(error, "reason", None) or str(error).splitlines()[0]
            raise UserError(
                f"data.root: {root}: {name} could not be downloaded: {reason}"
            ) from None
        raise UserError(
            f"data.root: {root}: no {name} in it, or damaged ({kind.base_folder} is expected); "
            f"data.download=true fetches it"
        ) from None
    images = ArrayImages(train.data, train.targets), ArrayImages(test.data, test.targets)
    return *images, tuple(train.classes)
