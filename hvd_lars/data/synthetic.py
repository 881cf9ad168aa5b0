"""Random images that need no files."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hvd_lars.data.identity import made_identity
from hvd_lars.data.randomness import uniforms
from hvd_lars.data.source import Batch, Indices, Request, Unreadable


@final
class Synthetic:
    """Noise around a fixed brightness per class: learnable, and as costly as real tensors."""

    mixes_pairs = False

    def __init__(
        self,
        num_train: int,
        num_eval: int,
        num_classes: int,
        image_size: int,
        channels: int,
        seed: int,
    ) -> None:
        self.unreadable: list[Unreadable] = []
        self.num_train, self.num_eval, self.num_classes = num_train, num_eval, num_classes
        self._shape = (channels, image_size, image_size)
        self._seed = seed
        self.identity = made_identity(
            f"synthetic {self._shape} {seed}", num_train, num_eval, num_classes
        )

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """Return images (n, channels, image_size, image_size) and labels (n,)."""
        return self._draw(epoch + 1, indices)

    def eval_batch(self, indices: Indices) -> Batch:
        """Return images and labels from a draw that no epoch uses."""
        return self._draw(0, indices)

    def on_device(self, images: Tensor, labels: Tensor, request: Request) -> Batch:
        """Return the batch unchanged."""
        return images, labels

    def _draw(self, stream: int, indices: Indices) -> Batch:
        channels, height, width = self._shape
        labels = torch.from_numpy(indices % self.num_classes)
        noise = uniforms(self._seed, stream, indices, channels * height * width)
        images = torch.from_numpy(noise).float().view(-1, channels, height, width)
        brightness = labels.float() / (self.num_classes - 1) * 2.0 - 1.0
        return images - 0.5 + brightness.view(-1, 1, 1, 1), labels
