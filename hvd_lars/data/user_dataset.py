"""A user's own map-style data sets as a source."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from hvd_lars.data.identity import made_identity
from hvd_lars.data.randomness import seed_of
from hvd_lars.data.source import Batch, Indices, Request, Unreadable
from hvd_lars.errors import UserError


class MapDataset(Protocol):
    """A map-style ``torch.utils.data.Dataset`` of (image, label)."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        """Return an image, (channels, height, width) or a PIL image, and its label."""
        ...


@final
class UserImages:
    """Two data sets, whose samples are drawn with random numbers of their own.

    Around each sample the global generators of torch, NumPy and ``random`` are seeded by (seed,
    epoch, index), so that augmentation depends on neither the ranks nor the workers.

    Args:
        train: to train on.
        val: to evaluate on.
        num_classes: labels are below it; None for the length of ``train.classes``.
        shape: of every image.
        seed: of the random numbers.
        description: identifies the data to a run that is resumed.

    Raises:
        UserError: a data set has no length or no samples, or the classes are not known.
    """

    mixes_pairs = False

    def __init__(
        self,
        train: MapDataset,
        val: MapDataset,
        num_classes: int | None,
        shape: tuple[int, int, int],
        seed: int,
        description: str,
    ) -> None:
        for name, dataset in (("first", train), ("second", val)):
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise UserError(
                    f"data.factory: the {name} it returned is {type(dataset).__name__}; a "
                    f"map-style data set with __len__ and __getitem__ is needed"
                )
            if not len(dataset):
                raise UserError(f"data.factory: the {name} data set it returned is empty")
        classes: Sequence[Any] = getattr(train, "classes", ())
        if num_classes is None and not classes:
            raise UserError(
                "data.num_classes: missing; it is needed where the training set has no `classes`"
            )
        self.unreadable: list[Unreadable] = []
        self._train, self._val, self._seed, self._shape = train, val, seed, shape
        self.num_train, self.num_eval = len(train), len(val)
        self.num_classes = num_classes or len(classes)
        sizes = self.num_train, self.num_eval, self.num_classes
        self.identity = made_identity(description, *sizes)

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """Return images (n, channels, height, width) and labels (n,)."""
        return self._batch(self._train, "training", epoch + 1, indices)

    def eval_batch(self, indices: Indices) -> Batch:
        """Return the same of the evaluation set."""
        return self._batch(self._val, "evaluation", 0, indices)

    def on_device(self, images: Tensor, labels: Tensor, request: Request) -> Batch:
        """Scale bytes to [0, 1]; other images stay as they are."""
        return images.float().div_(255.0) if images.dtype == torch.uint8 else images, labels

    def _batch(self, dataset: MapDataset, name: str, stream: int, indices: Indices) -> Batch:
        images, labels = [], []
        for index in indices.tolist():
            with _random_numbers(seed_of(self._seed, stream, index)):
                image, label = dataset[index]
            images.append(self._checked(image, f"{name} sample {index}"))
            labels.append(int(label))
            if not 0 <= labels[-1] < self.num_classes:
                raise UserError(
                    f"data.factory: {name} sample {index} has label {label}; allowed with "
                    f"{self.num_classes} classes: 0 to {self.num_classes - 1}"
                )
        return default_collate(images), torch.tensor(labels)

    def _checked(self, image: Any, name: str) -> Tensor:
        if not isinstance(image, Tensor):
            from torchvision.transforms.v2 import functional

            image = functional.to_image(image)
        if tuple(image.shape) != self._shape:
            raise UserError(
                f"data.image_shape: found {list(self._shape)}; {name} has {list(image.shape)}"
            )
        tensor: Tensor = image.as_subclass(Tensor)
        return tensor


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Seed the global generators inside, and leave them as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
