"""Mixup and cutmix within pairs of neighbours.

torchvision's MixUp and CutMix roll a batch and draw once for all of it, so an image would depend
on the rest of its micro-batch.  Here samples 2k and 2k+1 of the global batch are mixed with each
other, using random numbers of (seed, epoch, sample 2k): any split over ranks and micro-batches
that keeps pairs together gives the same images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hvd_lars.data.randomness import uniforms
from hvd_lars.data.source import Batch, Request
from hvd_lars.runtime.readback import send


def mix_pairs(
    images: Tensor,
    labels: Tensor,
    request: Request,
    num_classes: int,
    seed: int,
    mixup: float,
    cutmix: float,
) -> Batch:
    """Mix each image with its neighbour; an odd last image is returned unmixed.

    Args:
        images: (n, channels, height, width), floating point.
        labels: (n,) int64.
        request: the samples in the batch.
        num_classes: width of the class shares.
        seed: of the random draws.
        mixup: α of λ ~ Beta(α, α) in λ·own + (1 − λ)·other; 0 disables it.
        cutmix: α of λ ~ Beta(α, α); 1 − λ of the area is exchanged; 0 disables it.

    Returns:
        Images of the same shape, and class shares (n, num_classes), rows summing to 1.
    """
    from scipy.special import betaincinv  # 0.2 s that runs without mixing need not wait

    assert request.epoch is not None
    count, _, height, width = images.shape
    pairs = count // 2
    draws = uniforms(seed, request.epoch, request.indices[0 : 2 * pairs : 2], 4)
    cuts = draws[:, 1] < 0.5 if mixup and cutmix else np.full(pairs, cutmix > 0)
    # Of each image: the weight of its own pixels, and the box that is the other's.
    base, boxes = np.ones(count, dtype=np.float32), np.zeros((4, count), dtype=np.int64)
    for k in range(pairs):
        alpha = cutmix if cuts[k] else mixup
        share = float(betaincinv(alpha, alpha, draws[k, 0]))
        both = slice(2 * k, 2 * k + 2)
        if not cuts[k]:
            base[both] = share
            continue
        half_height, half_width = 0.5 * np.sqrt(1.0 - share) * np.array([height, width])
        y, x = draws[k, 2] * height, draws[k, 3] * width
        top, bottom = max(round(y - half_height), 0), min(round(y + half_height), height)
        left, right = max(round(x - half_width), 0), min(round(x + half_width), width)
        boxes[:, both] = np.array([top, bottom, left, right])[:, None]
    partner = np.arange(count)
    partner[: 2 * pairs] ^= 1
    others, own, box = (
        send(torch.from_numpy(array), images.device) for array in (partner, base, boxes)
    )
    weight = _outside(box, height, width) * own[:, None, None]
    mixed = torch.lerp(images[others], images, weight[:, None].to(images.dtype))
    exact = functional.one_hot(labels, num_classes).to(images.dtype)
    share_own = weight.mean(dim=(1, 2))[:, None].to(images.dtype)
    return mixed, torch.lerp(exact[others], exact, share_own)


def _outside(box: Tensor, height: int, width: int) -> Tensor:
    """Return 0 inside boxes and 1 outside, (n, height, width) float32.

    ``box`` is (4, n) int64: first row, row after the last, and the same of columns.
    """
    top, bottom, left, right = box[:, :, None]
    rows = torch.arange(height, device=box.device)
    columns = torch.arange(width, device=box.device)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside: Tensor = in_rows[:, :, None] & in_columns[:, None, :]
    return 1.0 - inside.float()
