"""Photographs from any store: decoded, cropped, augmented, normalised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar, final

import torch
from torch import Tensor
from torch.utils.data import default_collate

from hvd_lars.data.augment import Augment, colours
from hvd_lars.data.crops import NUM_DRAWS, Draws, centre_crop, training_crop
from hvd_lars.data.decoding import Picture
from hvd_lars.data.encoded import Encoded, decode, encode
from hvd_lars.data.identity import DataIdentity
from hvd_lars.data.mixing import mix_pairs
from hvd_lars.data.randomness import seed_of, uniforms
from hvd_lars.data.source import Batch, Indices, Made, Request, Unreadable
from hvd_lars.errors import UserError
from hvd_lars.runtime.readback import send

T = TypeVar("T")

# Eigenvalues and eigenvectors (columns) of the covariance of ImageNet's colours in [0, 1].
_LIGHT_VALUES = (0.2175, 0.0188, 0.0045)
_LIGHT_VECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)

_TRIES = 32  # unreadable images in a row that end a run

_COLOURS, _ERASING, _LIGHTING, _MIXING = 1, 2, 3, 4  # separate streams of random numbers


class Sizes(NamedTuple):
    """Sides of images, in pixels.

    Attributes:
        image_size: of the crop that the network takes.
        eval_resize: shorter side before the centre crop.
        progressive: (first epoch, side) of progressive resizing, in order; before the first,
            training images have side ``image_size``.
    """

    image_size: int
    eval_resize: int
    progressive: Sequence[tuple[int, int]] = ()


class DeviceWork(NamedTuple):
    """Work on training images that is done on the device instead of in the workers.

    Attributes:
        augment: per-image operations on colours.
        decode: decoding JPEG files, and cropping.
    """

    augment: bool = False
    decode: bool = False


_NO_DEVICE_WORK = DeviceWork()


class ImageStore(Protocol):
    """The images of one split, by index, and their ``labels`` (n,)."""

    labels: Indices

    def take(self, chosen: Indices) -> ImageStore:
        """Return a store of some of the images, in the order of ``chosen``."""
        ...

    def open(self, index: int) -> Picture:
        """Read an image; raises UserError, which names its file, if that fails."""
        ...


@final
class Images:
    """Two stores of images with the transforms of the published recipes.

    Workers decode, crop and flip; batches are uint8, so that a quarter of the bytes is copied to
    the device.  There they are normalised, shifted in colour, erased and mixed.  Per-image
    operations (TrivialAugment, colour jitter) run there or in the workers, with the same random
    numbers; so does decoding of training images.

    Args:
        train, val: the stores.
        identity: of both; labels are below its number of classes.
        augment: augmentation of training images.
        sizes: sides of images, in pixels.
        seed: of all draws, with epoch and sample.
        colour_statistics: mean and standard deviation of the channels in [0, 1].
        device_work: work left to the device.
    """

    def __init__(
        self,
        train: ImageStore,
        val: ImageStore,
        identity: DataIdentity,
        augment: Augment,
        sizes: Sizes,
        seed: int,
        colour_statistics: tuple[tuple[float, ...], tuple[float, ...]],
        device_work: DeviceWork = _NO_DEVICE_WORK,
    ) -> None:
        self._train, self._val, self._augment, self._seed = train, val, augment, seed
        self.num_train, self.num_eval = len(train.labels), len(val.labels)
        self.identity, self.num_classes = identity, len(identity.classes)
        self.mixes_pairs = augment.mixes_pairs
        self._statistics, self._device_work = colour_statistics, device_work
        self._sizes = [(0, sizes.image_size), *sizes.progressive]
        self._crops = {
            size: training_crop(augment, size, sizes.eval_resize) for _, size in self._sizes
        }
        self._colours = colours(augment)
        self._centre = centre_crop(sizes.image_size, sizes.eval_resize)
        self.unreadable: list[Unreadable] = []
        self._known: set[tuple[bool, int]] = set()  # unreadable images: evaluation, index

    def image_size(self, epoch: int) -> int:
        """Return the side of an epoch's training images, in pixels."""
        return [size for first, size in self._sizes if first <= epoch][-1]

    def train_batch(self, epoch: int, indices: Indices) -> Made:
        """Return random crops (n, 3, side, side) uint8 and labels (n,); files to decode instead."""
        if self._device_work.decode:
            opened = [self._next_readable(i, lambda picture: picture) for i in indices.tolist()]
            return encode([picture for picture, _ in opened]), _labels(opened)
        crop, draws = self._crops[self.image_size(epoch)], self._draws(epoch, indices)
        made = [
            self._next_readable(i, lambda picture, row=row: crop(picture, row))  # type: ignore[misc]
            for i, row in zip(indices.tolist(), draws, strict=True)
        ]
        images = [image for image, _ in made]
        if self._colours is not None and not self._device_work.augment:
            images = self._recoloured(images, epoch, indices)
        return default_collate(images), _labels(made)

    def decoded(
        self, files: Encoded, labels: Tensor, request: Request, device: torch.device
    ) -> Batch:
        """Return crops (n, 3, side, side) uint8, made on ``device``, and labels (n,).

        A file that the device's decoder rejects is decoded on the CPU, or replaced by the next
        readable one if it is damaged.
        """
        epoch, indices = request.epoch, request.indices
        assert epoch is not None
        crop, draws = self._crops[self.image_size(epoch)], self._draws(epoch, indices)
        images, labels = [], labels.clone()
        for i, picture in enumerate(decode(files, device)):
            if picture is not None:
                images.append(crop(picture, draws[i]))
                continue
            image, label = self._next_readable(int(indices[i]), lambda p: crop(p, draws[i]))  # noqa: B023
            images.append(image.to(device))
            labels[i] = label
        return default_collate(images), labels

    def _draws(self, epoch: int, indices: Indices) -> Sequence[Draws]:
        draws: Sequence[Draws] = uniforms(self._seed, epoch, indices, NUM_DRAWS).tolist()
        return draws

    def eval_batch(self, indices: Indices) -> Batch:
        """Return centre crops (n, 3, image_size, image_size) uint8 and labels (n,).

        Unreadable images are omitted.
        """
        found = [(i, self._read(self._val, i, self._centre)) for i in indices.tolist()]
        images = [image for _, image in found if image is not None]
        labels = [int(self._val.labels[i]) for i, image in found if image is not None]
        if not images:
            side = self._sizes[0][1]
            return torch.empty(0, 3, side, side, dtype=torch.uint8), torch.empty(0).long()
        return default_collate(images), torch.tensor(labels)

    def on_device(self, images: Tensor, labels: Tensor, request: Request) -> Batch:
        """Return normalised float32 images; class shares replace labels if images are mixed."""
        epoch, indices = request.epoch, request.indices
        augment = self._augment
        if epoch is None:
            return self._normalised(images), labels
        if self._colours is not None and self._device_work.augment:
            images = torch.stack(self._recoloured(images.unbind(), epoch, indices))
        shift = None
        if augment.lighting:
            seed = seed_of(self._seed, _LIGHTING)
            normal = torch.special.ndtri(
                torch.from_numpy(uniforms(seed, epoch, indices, 3) + 2**-54)
            )
            strength = normal * torch.tensor(_LIGHT_VALUES) * augment.lighting
            shift = strength @ torch.tensor(_LIGHT_VECTORS, dtype=torch.float64).T
        pixels = self._normalised(images, shift)
        if augment.random_erasing:
            self._erase(pixels, epoch, indices)
        if not augment.mixes_pairs:
            return pixels, labels
        seed = seed_of(self._seed, _MIXING)
        return mix_pairs(
            pixels, labels, request, self.num_classes, seed, augment.mixup, augment.cutmix
        )

    def _next_readable(self, index: int, make: Callable[[Picture], T]) -> tuple[T, int]:
        """Return a training image and its label, or those of the next readable one."""
        count = len(self._train.labels)
        for i in range(index, index + min(_TRIES, count)):
            image = self._read(self._train, i % count, make)
            if image is not None:
                return image, int(self._train.labels[i % count])
        last = f"; the last: {self.unreadable[-1].line}" if self.unreadable else ""
        raise UserError(
            f"data: {min(_TRIES, count)} training images in a row cannot be read; check the disk "
            f"and data.root{last}"
        )

    def _read(self, store: ImageStore, index: int, make: Callable[[Picture], T]) -> T | None:
        """Return an image; None if it is unreadable, which is recorded the first time."""
        evaluation = store is self._val
        known = (evaluation, index) in self._known
        # A training image that is damaged in one place may be read in another epoch: whether it is
        # must not depend on what this process has read before.
        if known and evaluation:
            return None
        try:
            return make(store.open(index))
        except UserError as error:
            if not known:
                self._known.add((evaluation, index))
                self.unreadable.append(Unreadable(str(error), evaluation))
            return None

    def _recoloured(self, images: Sequence[Tensor], epoch: int, indices: Indices) -> list[Tensor]:
        """Apply the per-image operations."""
        assert self._colours is not None
        changed = []
        with torch.random.fork_rng(devices=[]):  # dropout uses the same generator
            for image, index in zip(images, indices.tolist(), strict=True):
                self._begin(epoch, index, _COLOURS)
                changed.append(self._colours(image))
        return changed

    def _begin(self, epoch: int, index: int, *stream: int) -> None:
        """Seed the CPU's global generator for a sample; dropout's on a GPU is not touched."""
        torch.default_generator.manual_seed(seed_of(self._seed, epoch, index, *stream))

    def _normalised(self, images: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return (x / 255 + shift - mean) / deviation: one multiplication, one in-place addition.

        ``shift`` is (n, 3), of each image's colours in [0, 1].
        """
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in self._statistics)
        bias = -mean[None] if shift is None else shift - mean
        factor, offset = (
            send(values.float(), images.device) for values in (1.0 / (255.0 * std), bias / std)
        )
        pixels = images * factor[:, None, None]
        return pixels.add_(offset[:, :, None, None])

    def _erase(self, pixels: Tensor, epoch: int, indices: Indices) -> None:
        """Fill random rectangles with the mean colour, 0, in place."""
        from torchvision.transforms import v2

        erase = v2.RandomErasing(self._augment.random_erasing)
        with torch.random.fork_rng(devices=[]):
            for i, index in enumerate(indices.tolist()):
                self._begin(epoch, index, _ERASING)
                # As its forward does, which would copy the colour to the device for each image.
                if torch.rand(1) < erase.p:
                    part = erase.make_params([pixels[i]])
                    if part["v"] is not None:  # a rectangle that fits was found
                        top, left = part["i"], part["j"]
                        pixels[i, :, top : top + part["h"], left : left + part["w"]] = 0.0


def _labels(made: Sequence[tuple[object, int]]) -> Tensor:
    return torch.tensor([label for _, label in made])
