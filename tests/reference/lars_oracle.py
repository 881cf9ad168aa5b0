"""LARS in NumPy float64, one layer at a time, straight from the papers.

Options that are off follow You, Gitman, Ginsburg 2017, algorithm 1; the others follow the
implementations that the project's algorithm page names.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Options:
    momentum: float = 0.9
    weight_decay: float = 5e-4
    trust_coefficient: float = 0.001
    eps: float = 0.0
    nesterov: bool = False
    lr_position: str = "momentum"
    denominator: str = "separate"
    trust_clip: bool = False
    zero_norm: str = "unit"


def norm(x):
    return math.sqrt(math.fsum(float(e) * float(e) for e in x.ravel()))


def trust_ratio(w, g, lr, o):
    """λ, or None where the layer is not updated in this step."""
    w_norm = norm(w)
    if o.denominator == "separate":
        g_norm = norm(g)
        denominator = g_norm + o.weight_decay * w_norm + o.eps
    else:
        g_norm = norm(g + o.weight_decay * w)
        denominator = g_norm + o.eps
    if w_norm == 0 or g_norm == 0:
        return None if o.zero_norm == "skip" else 1.0
    ratio = o.trust_coefficient * w_norm / denominator
    if o.trust_clip:
        ratio = min(ratio / lr, 1.0) if lr > 0 else 1.0
    return ratio


def step(w, g, v, lr, o, ratio=1.0):
    """One step of one layer; returns the new weight and buffer.  ``ratio`` None: no update."""
    if ratio is None:
        return w, v
    direction = ratio * (g + o.weight_decay * w)
    if o.lr_position == "momentum":
        v = o.momentum * v + lr * direction
        move = o.momentum * v + lr * direction if o.nesterov else v
        return w - move, v
    v = o.momentum * v + direction
    move = o.momentum * v + direction if o.nesterov else v
    return w - lr * move, v


def run(weights, gradients, rates, o):
    """Train adapted layers: ``gradients[t][i]`` is layer i's gradient at step t."""
    weights = [w.astype(np.float64) for w in weights]
    buffers = [np.zeros_like(w) for w in weights]
    for grads, lr in zip(gradients, rates, strict=True):
        for i, g in enumerate(grads):
            g = g.astype(np.float64)
            ratio = trust_ratio(weights[i], g, lr, o)
            weights[i], buffers[i] = step(weights[i], g, buffers[i], lr, o, ratio)
    return weights, buffers
