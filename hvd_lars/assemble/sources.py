"""From the config's data section to a source of images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from hvd_lars.comm.agree import on_each_node, on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.config.data import (
    AugmentSettings,
    Cifar10Data,
    Cifar100Data,
    DigitsData,
    GlyphsData,
    ImageFolderData,
    ShardsData,
    SyntheticData,
)
from hvd_lars.config.data import (
    Images as ImagesSection,
)
from hvd_lars.config.schema import Config, Data
from hvd_lars.data import (
    CIFAR_COLOURS,
    CIFAR_FOLDERS,
    Augment,
    FolderImages,
    Images,
    ShardImages,
    Source,
    Synthetic,
    cached_root,
    copy_shards,
    draw_glyphs,
    list_folder,
    load_cifar,
    load_digits,
    load_shards,
)
from hvd_lars.data.identity import DataIdentity, made_identity
from hvd_lars.data.images import IMAGENET_COLOURS, ImageStore
from hvd_lars.data.loader import shared_bytes
from hvd_lars.data.warps import WarpedImages
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user
from hvd_lars.runtime.terminal import warn


def build_source(config: Config, comm: Communicator, gpu: bool = False) -> Source:
    """The data set that the config names; collective, only rank 0 lists files.

    Args:
        config: its data and run sections are used.
        comm: the ranks.
        gpu: whether this rank's images end up on one, which then augments them.

    Raises:
        UserError: on every rank alike, where the data is not laid out as it should be.
    """
    data, seed = config.data, config.run.seed
    if isinstance(data, DigitsData | GlyphsData):
        return _warped(data, seed)
    if isinstance(data, SyntheticData):
        return Synthetic(**data.model_dump(exclude={"name"}), seed=seed)
    train, val, identity, left_out = _stores(data, comm)
    if left_out and comm.rank == 0:
        warn(f"data.root: {data.root}: left out, as they are no images of a class: {left_out}")
    found = {"train": len(train.labels), "eval": len(val.labels), "classes": len(identity.classes)}
    if data.expect is not None and found != data.expect.model_dump():
        raise UserError(
            f"data.expect: {data.root} has {_counts(found)}; {_counts(data.expect.model_dump())} "
            f"are expected; data.expect=null takes any"
        )
    statistics = normalisation_of(config)
    assert statistics is not None
    return Images(
        train,
        val,
        identity,
        augment_of(data.augment),
        data.image_size,
        data.eval_resize,
        seed,
        sizes=[(entry.epoch, entry.image_size) for entry in data.progressive],
        colour_statistics=statistics,
        gpu=gpu,
    )


def augment_of(settings: AugmentSettings) -> Augment:
    """The section as the data package takes it."""
    return Augment(**settings.model_dump())


def place_of(data: Data) -> Path | None:
    """What must be on this machine for the data to be read; None where nothing must."""
    if isinstance(data, ImageFolderData | ShardsData):
        return expand_user(data.root, "data.root")
    if isinstance(data, Cifar10Data | Cifar100Data):
        return expand_user(data.root, "data.root") / CIFAR_FOLDERS[data.name]
    return None


def mixes_pairs(config: Config) -> bool:
    """Whether images are mixed with their neighbours."""
    data = config.data
    return isinstance(data, ImagesSection) and augment_of(data.augment).mixes_pairs


def _counts(sizes: dict[str, int]) -> str:
    return f"{sizes['train']:,} + {sizes['eval']:,} images of {sizes['classes']:,} classes"


def _stores(
    data: ImageFolderData | ShardsData | Cifar10Data | Cifar100Data, comm: Communicator
) -> tuple[ImageStore, ImageStore, DataIdentity, str]:
    """Training and evaluation images, which they are, and what was left out; collective."""
    if isinstance(data, ImageFolderData):
        listing = on_root(comm, lambda: list_folder(data.root, _listing_cache()))
        train, val = (FolderImages(listing.root, split) for split in (listing.train, listing.val))
        return train, val, listing.identity(), listing.left_out
    if isinstance(data, ShardsData):
        shards = on_root(
            comm,
            lambda: load_shards(
                data.root,
                data.train_shards,
                data.val_shards,
                _listing_cache(),
                None if data.expect is None else data.expect.classes,
            ),
        )
        root, cache_dir = Path(shards.root), data.cache_dir
        if cache_dir is not None:
            on_each_node(comm, lambda: copy_shards(shards, cache_dir))
            root = cached_root(shards, cache_dir)
        stores = ShardImages(root, shards.train), ShardImages(root, shards.val)
        return *stores, shards.identity(), shards.left_out
    if data.download:
        # Rank 0 first: the folder is often shared.  Then nodes that have one of their own.
        on_root(comm, lambda: len(load_cifar(data.name, data.root, download=True)))
    on_each_node(comm, lambda: load_cifar(data.name, data.root, data.download))
    small = load_cifar(data.name, data.root, download=False)
    counts = len(small[0].labels), len(small[1].labels)
    identity = made_identity(data.name, *counts, len(small[2]))
    return small[0], small[1], replace(identity, classes=small[2]), ""


def _listing_cache() -> Path | None:
    """Where lists of images are kept; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "hvd_lars/listings" if not base.startswith("~") else None


def workers_of(config: Config) -> int:
    """Processes a rank that make batches; images made from memory need none."""
    return config.data.workers if isinstance(config.data, ImagesSection) else 0


def normalisation_of(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of the channels in [0, 1]; None where images are made as they are."""
    data = config.data
    if isinstance(data, DigitsData | GlyphsData):
        made = _warped(data, config.run.seed)
        return (made.mean,), (made.deviation,)
    if isinstance(data, Cifar10Data | Cifar100Data):
        return CIFAR_COLOURS
    return IMAGENET_COLOURS if isinstance(data, ImagesSection) else None


def _warped(data: DigitsData | GlyphsData, seed: int) -> WarpedImages:
    make = load_digits if isinstance(data, DigitsData) else draw_glyphs
    return make(data.copies, seed)


def shared_bytes_of(config: Config) -> int:
    """Bytes of shared memory (/dev/shm) that a rank needs for its batches."""
    data, train = config.data, config.train
    if not isinstance(data, ImagesSection):
        return 0
    sides = [data.image_size, *(entry.image_size for entry in data.progressive)]
    batches = (train.micro_batch * max(sides) ** 2, train.eval_batch * data.image_size**2)
    return shared_bytes(3 * max(batches), data.workers)


def shape_of(data: Data) -> tuple[int, int, int]:
    """(channels, height, width) of the images that the network is shown in evaluation."""
    if isinstance(data, DigitsData):
        return 1, 8, 8
    if isinstance(data, GlyphsData):
        return 1, 16, 16
    channels = data.channels if isinstance(data, SyntheticData) else 3
    return channels, data.image_size, data.image_size
