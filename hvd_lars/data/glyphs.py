"""Generated glyphs: harder than the digits, and as small."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hvd_lars.data.source import Batch
from hvd_lars.data.warps import WarpedImages

NUM_CLASSES, PER_CLASS, SIDE = 40, 50, 16
_STROKES, _POINTS = 3, 12  # curves per glyph, points drawn per curve
_WOBBLE = 0.18  # deviation of a control point between images; the canvas is 2 wide
_PRESSURE = (0.10, 0.22)  # radius of the pen
_NOISE = 0.22  # deviation of a pixel's brightness
_SEED = 16  # fixed: the data set does not depend on a run's seed


def draw_glyphs(copies: int, seed: int, val_fraction: float | None = None) -> WarpedImages:
    """Draw 4,000 16×16 images of 40 glyphs, half for training, each seen ``copies`` times.

    A class is three random quadratic Bézier curves; images differ in control points, pen and noise.
    """
    generator = np.random.default_rng(_SEED)
    signs = generator.uniform(-0.75, 0.75, size=(NUM_CLASSES, _STROKES, 3, 2))
    train, test = _draw(signs, generator), _draw(signs, generator)
    return WarpedImages(train, test, NUM_CLASSES, copies, seed, "glyphs", val_fraction)


def _draw(
    signs: np.ndarray[tuple[int, ...], np.dtype[np.float64]], generator: np.random.Generator
) -> Batch:
    """Return images (NUM_CLASSES · PER_CLASS, 1, SIDE, SIDE) in [0, 1] and labels."""
    labels = np.repeat(np.arange(NUM_CLASSES), PER_CLASS)
    hands = signs[labels] + generator.normal(scale=_WOBBLE, size=(len(labels), *signs.shape[1:]))
    t = np.linspace(0.0, 1.0, _POINTS)
    basis = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])  # (3, points)
    points = np.einsum("nscd,cp->nspd", hands, basis).reshape(len(labels), -1, 2)
    radius = generator.uniform(*_PRESSURE, size=(len(labels), 1, 1))
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2.0 - 1.0
    images = np.zeros((len(labels), SIDE, SIDE))
    for k in range(points.shape[1]):
        dx = axis[None, None, :] - points[:, k, 0, None, None]
        dy = axis[None, :, None] - points[:, k, 1, None, None]
        images = np.maximum(images, np.exp(-(dx**2 + dy**2) / (2.0 * radius**2)))
    images += generator.normal(scale=_NOISE, size=images.shape)
    drawn: Tensor = torch.from_numpy(images.clip(0.0, 1.0)).float().unsqueeze(1)
    return drawn, torch.from_numpy(labels)
