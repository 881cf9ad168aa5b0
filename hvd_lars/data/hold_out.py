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
    """Hold ``fraction`` of the training images out, the same ones in every run.

    Args:
        train: all training images.
        identity: of the data set; its test images are not used.
        fraction: between 0 and 1; at least one image is held out and one is kept.

    Returns:
        The other training images and the held-out ones, both in their order, and their identity.
    """
    count = len(train.labels)
    held = min(max(round(fraction * count), 1), count - 1)
    order = np.random.default_rng(0).permutation(count)
    parts: dict[str, Indices] = {"val": np.sort(order[:held]), "train": np.sort(order[held:])}
    splits = {
        name: SplitIdentity(
            len(chosen),
            hashlib.sha256(f"{identity.train.sha256} {name} {held}".encode()).hexdigest(),
        )
        for name, chosen in parts.items()
    }
    found = dataclasses.replace(identity, train=splits["train"], val=splits["val"])
    return train.take(parts["train"]), train.take(parts["val"]), found


def classes_without_images(labels: Indices, classes: Sequence[str]) -> str:
    """Name the classes that no label is of, some of them if they are many; empty without any."""
    absent = np.setdiff1d(np.arange(len(classes)), labels)
    if not len(absent):
        return ""
    names = ", ".join(classes[i] for i in absent[:_SHOWN])
    more = f" and {len(absent) - _SHOWN:,} more" if len(absent) > _SHOWN else ""
    return f"{len(absent):,} of {len(classes):,} classes: {names}{more}"
