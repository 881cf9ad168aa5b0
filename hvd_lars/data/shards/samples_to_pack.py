"""The images that ``hvd-lars pack`` writes, from any form of a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from hvd_lars.data.forms import archives, arrow, recordio, tfrecord, zipped
from hvd_lars.data.forms.recognise import PARQUET, recognise
from hvd_lars.data.forms.scan import Form, locate_with_names
from hvd_lars.data.identity import SplitIdentity
from hvd_lars.data.image_folder import FolderImages
from hvd_lars.data.listing import Paths, has_val, list_folder
from hvd_lars.data.located import LocatedImages
from hvd_lars.data.shards.shrink import Shrink
from hvd_lars.data.source import Indices
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user

_FORMS: dict[str, Form] = {
    "imagenet": archives.FORM,
    "tfrecord": tfrecord.FORM,
    "recordio": recordio.FORM,
    "arrow": arrow.FORM,
    "zip": zipped.FORM,
    PARQUET: arrow.PARQUET,
}


class FileStore(Protocol):
    """Image files of one split, by index, and their ``labels`` (n,)."""

    labels: Indices

    def take(self, chosen: Indices) -> FileStore:
        """Return a store of some of the images, in the order of ``chosen``."""
        ...

    def read(self, index: int) -> bytes:
        """Return an image file's bytes; raises UserError, which names the file, if that fails."""
        ...

    def where(self, index: int) -> str:
        """Return how messages call an image."""
        ...

    def close(self) -> None:
        """Close files and free memory; they are opened again when they are needed."""
        ...

    def files(self) -> Sequence[str]:
        """Return the paths below the root of the files that hold the images."""
        ...


@dataclass(frozen=True)
class Samples:
    """Images of a split, or of one shard, in order: ``names`` are ``SPLIT/CLASS/name``."""

    root: str
    store: FileStore
    names: Paths
    shrink: Shrink | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    @property
    def labels(self) -> list[int]:
        """The label of every image."""
        return [int(label) for label in self.store.labels]

    def take(self, chosen: Indices) -> Samples:
        """Return some of the images, in the order of ``chosen``."""
        return Samples(self.root, self.store.take(chosen), self.names[chosen], self.shrink)

    def facts(self) -> list[tuple[str, int]]:
        """Return name and label of every image."""
        return list(zip(map(os.fsdecode, self.names.tolist()), self.labels, strict=True))

    def where(self, index: int) -> str:
        """Return how messages call an image."""
        return self.store.where(index)

    def read(self, index: int) -> bytes:
        """Return the bytes to pack; raises UserError, which names the file, if that fails."""
        data = self.store.read(index)
        return data if self.shrink is None else self.shrink(data)


@dataclass(frozen=True)
class Collection:
    """The images of a data set; ``shuffle`` says whether they can be read in any order.

    ``left_out`` counts the skipped files by kind.
    """

    root: str
    classes: tuple[str, ...]
    train: Samples
    val: Samples
    images: dict[str, str]
    shuffle: bool = True
    left_out: str = ""


def collect(source: str, shrink: Shrink | None = None) -> Collection:
    """Find the images of ``source``, in whatever form they are kept.

    Raises:
        UserError: no data set is there, or it is damaged; or it is packed already.
    """
    root = expand_user(source, "SRC")
    kind, title = recognise(root)
    if kind == "imagefolder":
        listing = list_folder(source, None, needs_val=has_val(root))
        base, classes, left_out = listing.root, listing.classes, listing.left_out
        stores: list[FileStore] = [FolderImages(base, s) for s in (listing.train, listing.val)]
        names = [listing.train.names, listing.val.names]
        splits = listing.train.identity(), listing.val.identity()
    elif kind in _FORMS:
        found, by_split = locate_with_names(_FORMS[kind], source)
        base, classes, left_out = found.root, found.classes, found.left_out
        made = arrow.ParquetImages if kind == PARQUET else LocatedImages
        stores = [made(Path(base), split) for split in (found.train, found.val)]
        names = [by_split["train"], by_split["val"]]
        splits = found.identity.train, found.identity.val
    else:
        raise UserError(f"data.root: {root}: found {title}, which need no packing")
    train, val = (Samples(base, s, n, shrink) for s, n in zip(stores, names, strict=True))
    images = {"train": _identity(splits[0], shrink), "val": _identity(splits[1], shrink)}
    return Collection(base, classes, train, val, images, kind != PARQUET, left_out)


def stored_order(samples: Samples) -> Indices:
    """Return the order in which Parquet is quick to read: that of its files and rows."""
    store = samples.store
    assert isinstance(store, arrow.ParquetImages)
    split = store.split
    return np.lexsort((split.offset, split.file))


def _identity(split: SplitIdentity, shrink: Shrink | None) -> str:
    return split.sha256 if shrink is None else shrink.identity(split.sha256)
