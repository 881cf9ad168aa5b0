"""Small grey images, enlarged by random warps."""

from __future__ import annotations

import dataclasses
import math
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hvd_lars.data.hold_out import choose
from hvd_lars.data.identity import made_identity
from hvd_lars.data.randomness import Matrix, uniforms
from hvd_lars.data.source import Batch, Indices, Request, Unreadable

# Largest change in either direction, each drawn uniformly.
_ROTATION = math.radians(15.0)
_SCALE = 0.10
_SHIFT = 0.25  # of half the width
_SHEAR = 0.10


@final
class WarpedImages:
    """A few images in memory; an epoch holds ``copies`` newly warped copies of each.

    Args:
        train: images (n, 1, side, side), dark background at 0, and labels (n,).
        evaluation: the same, never warped.
        num_classes: labels are below it.
        copies: warped copies of a training image in an epoch.
        seed: of the warps, with epoch and sample.
        name: of the data set.
        val_fraction: of the training images to evaluate in place of ``evaluation``.
    """

    mixes_pairs = False

    def __init__(
        self,
        train: Batch,
        evaluation: Batch,
        num_classes: int,
        copies: int,
        seed: int,
        name: str,
        val_fraction: float | None = None,
    ) -> None:
        self.identity = made_identity(name, len(train[1]) * copies, len(evaluation[1]), num_classes)
        if val_fraction is not None:
            kept, held, found = choose(len(train[1]), self.identity, val_fraction)
            whole = dataclasses.replace(found.train, images=len(kept) * copies)
            self.identity = dataclasses.replace(found, train=whole)
            evaluation = train[0][torch.from_numpy(held)], train[1][torch.from_numpy(held)]
            train = train[0][torch.from_numpy(kept)], train[1][torch.from_numpy(kept)]
        mean, std = train[0].mean(), train[0].std()
        self.unreadable: list[Unreadable] = []
        self.mean, self.deviation = mean.item(), std.item()  # of the raw pixels
        self._background = float(-mean / std)
        self._train = (train[0] - mean) / std, train[1]
        self._eval = (evaluation[0] - mean) / std, evaluation[1]
        self._seed, self._distinct = seed, len(train[1])
        self.num_train, self.num_eval = self._distinct * copies, len(evaluation[1])
        self.num_classes = num_classes

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """Return warped images (n, 1, side, side), normalised, and labels (n,)."""
        which = torch.from_numpy(indices % self._distinct)
        theta = _affine(uniforms(self._seed, epoch, indices, 6))
        images, labels = self._train[0][which], self._train[1][which]
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
        # grid_sample pads with zeros: shift so that zero is the background.
        warped = functional.grid_sample(images - self._background, grid, align_corners=False)
        return warped + self._background, labels

    def eval_batch(self, indices: Indices) -> Batch:
        """Return test images (n, 1, side, side), normalised, and labels (n,)."""
        which = torch.from_numpy(indices)
        return self._eval[0][which], self._eval[1][which]

    def on_device(self, images: Tensor, labels: Tensor, request: Request) -> Batch:
        """Return the batch unchanged."""
        return images, labels


def _affine(draws: Matrix) -> Tensor:
    """Map (n, 6) uniform numbers to affine maps (n, 2, 3): rotate · shear · scale, then shift."""
    angle, scale_x, scale_y, shift_x, shift_y, shear = (2.0 * draws - 1.0).T
    cos, sin = np.cos(_ROTATION * angle), np.sin(_ROTATION * angle)
    sx, sy, k = 1.0 + _SCALE * scale_x, 1.0 + _SCALE * scale_y, _SHEAR * shear
    rows = [
        [cos * sx, (cos * k - sin) * sy, _SHIFT * shift_x],
        [sin * sx, (sin * k + cos) * sy, _SHIFT * shift_y],
    ]
    return torch.from_numpy(np.array(rows)).permute(2, 0, 1).float().contiguous()
