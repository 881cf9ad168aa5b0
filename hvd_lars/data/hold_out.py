"""Test images held out of the training images, and classes without any."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from hvd_lars.data.identity import DataIdentity, SplitIdentity
from hvd_lars.data.images import ImageStore
from hvd_lars.data.source import Indices

_SHOWN = 5  # class names in a line


def hold_out(
    train: ImageStore, identity: DataIdentity, fraction: float
) -> tuple[ImageStore, ImageStore, DataIdentity]:
    """Hold ``fraction`` of the training images out, as :func:`choose` does.

    Returns:
        The other training images and the held-out ones, both in their order, and their identity.
    """
    kept, held, identity = choose(len(train.labels), identity, fraction)
    return train.take(kept), train.take(held), identity


def choose(
    count: int, identity: DataIdentity, fraction: float
) -> tuple[Indices, Indices, DataIdentity]:
    """Choose training images to evaluate in place of the test images, the same in every run.

    Args:
        count: number of training images.
        identity: of the data set; its test images are not used.
        fraction: between 0 and 1; at least one image is held out and one is kept.

    Returns:
        Indices of the other training images and of the held-out ones, rising, and their identity.
    """
    size = min(max(round(fraction * count), 1), count - 1)
    order = np.random.default_rng(0).permutation(count)
    held, kept = np.sort(order[:size]), np.sort(order[size:])

    def split(name: str, chosen: Indices) -> SplitIdentity:
        text = f"{identity.train.sha256} {name} {size}"
        return SplitIdentity(len(chosen), hashlib.sha256(text.encode()).hexdigest())

    found = dataclasses.replace(identity, train=split("train", kept), val=split("val", held))
    return kept, held, found


def classes_without_images(labels: Indices, classes: Sequence[str]) -> str:
    """Name the classes that no label is of, some of them if they are many; empty without any."""
    absent = np.setdiff1d(np.arange(len(classes)), labels)
    if not len(absent):
        return ""
    names = ", ".join(classes[i] for i in absent[:_SHOWN])
    more = f" and {len(absent) - _SHOWN:,} more" if len(absent) > _SHOWN else ""
    return f"{len(absent):,} of {len(classes):,} classes: {names}{more}"
