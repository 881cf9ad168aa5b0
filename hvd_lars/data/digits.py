"""scikit-learn's handwritten digits, enlarged by random warps; imports source, randomness."""

from __future__ import annotations

import math
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hvd_lars.data.randomness import Matrix, uniforms
from hvd_lars.data.source import Batch, Indices

NUM_TRAIN, NUM_EVAL = 897, 900

# Largest change to either side, each drawn uniformly.
_ROTATION = math.radians(15.0)
_SCALE = 0.10
_SHIFT = 0.25  # of half the width
_SHEAR = 0.10


@final
class Digits:
    """1,797 real 8×8 images of handwritten digits, shipped with scikit-learn.

    A fixed split: 900 test images, 897 for training.  An epoch holds ``copies`` warped copies
    of each training image, drawn anew every epoch.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """

    num_classes = 10
    num_eval = NUM_EVAL

    def __init__(self, copies: int, seed: int) -> None:
        from sklearn.datasets import load_digits  # a second to import

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))  # the split never changes
        images = torch.from_numpy(digits.images[order]).float().div_(16.0).unsqueeze(1)
        labels = torch.from_numpy(digits.target[order]).long()
        mean, std = images[:NUM_TRAIN].mean(), images[:NUM_TRAIN].std()
        self._background = float(-mean / std)
        images = (images - mean) / std
        self._train = images[:NUM_TRAIN], labels[:NUM_TRAIN]
        self._eval = images[NUM_TRAIN:], labels[NUM_TRAIN:]
        self._seed = seed
        self.num_train = NUM_TRAIN * copies

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """Warped images (n, 1, 8, 8), normalised, and labels (n,)."""
        which = torch.from_numpy(indices % NUM_TRAIN)
        theta = _affine(uniforms(self._seed, epoch, indices, 6))
        images, labels = self._train[0][which], self._train[1][which]
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
        # grid_sample fills with zeros: shift so that zero is the paper around the digit.
        warped = functional.grid_sample(images - self._background, grid, align_corners=False)
        return warped + self._background, labels

    def eval_batch(self, indices: Indices) -> Batch:
        """Test images (n, 1, 8, 8), normalised, and labels (n,)."""
        which = torch.from_numpy(indices)
        return self._eval[0][which], self._eval[1][which]

    def on_device(self, images: Tensor) -> Tensor:
        """Nothing: the images are ready."""
        return images


def _affine(draws: Matrix) -> Tensor:
    """(n, 2, 3) affine maps from (n, 6) uniform numbers: rotate · shear · scale, then shift."""
    angle, scale_x, scale_y, shift_x, shift_y, shear = (2.0 * draws - 1.0).T
    cos, sin = np.cos(_ROTATION * angle), np.sin(_ROTATION * angle)
    sx, sy, k = 1.0 + _SCALE * scale_x, 1.0 + _SCALE * scale_y, _SHEAR * shear
    rows = [
        [cos * sx, (cos * k - sin) * sy, _SHIFT * shift_x],
        [sin * sx, (sin * k + cos) * sy, _SHIFT * shift_y],
    ]
    return torch.from_numpy(np.array(rows)).permute(2, 0, 1).float().contiguous()
