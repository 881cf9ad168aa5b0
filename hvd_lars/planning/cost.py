"""The time of a training step over many GPUs, from measurements on few.

A step takes ``fixed + images · per image + exposed all-reduce``.  The cost of an image and the
fixed cost come from two micro-batches; the all-reduce from a measured curve, or from the alpha-beta
model of trees between nodes and a ring's bytes.

Source:
    benchmarks/plan_check.py compares the model with 61 published points.  Trees and latencies:
    NCCL, src/graph/tuning.cc; bytes of an all-reduce: Patarasuk, Yuan 2009.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_BASE, _IN_NODE, _BETWEEN = 8.4e-6, 4.0e-6, 14.0e-6  # seconds, of NCCL's tuner (protocol Simple)


@dataclass(frozen=True)
class Links:
    """What an all-reduce runs over.

    Attributes:
        ranks_per_node: GPUs of a node.
        in_node: bus bandwidth inside a node, in bytes a second.
        per_node: bandwidth of a node to the others, in bytes a second, that is reached; 0 on one
            node.
    """

    ranks_per_node: int
    in_node: float
    per_node: float = 0.0

    def all_reduce_seconds(self, nodes: int, size: float) -> float:
        """Return the time of an all-reduce of ``size`` bytes over ``nodes`` whole nodes."""
        ranks = nodes * self.ranks_per_node
        if ranks == 1:
            return 0.0
        bandwidth = min(self.in_node, self.per_node) if nodes > 1 else self.in_node
        latency = 2 * (self.ranks_per_node - 1) * _IN_NODE + 2 * math.log2(nodes) * _BETWEEN
        return _BASE + latency + size * 2 * (ranks - 1) / ranks / bandwidth


@dataclass(frozen=True)
class Compute:
    """A step without communication takes ``fixed`` + images a GPU · ``per_image`` seconds."""

    fixed: float
    per_image: float

    def seconds(self, images: float) -> float:
        """Return the time of a step of ``images`` a GPU."""
        return self.fixed + images * self.per_image

    @classmethod
    def of_two(cls, small: tuple[float, float], large: tuple[float, float]) -> Compute:
        """Return the costs that two (images, seconds) without communication have in common.

        Raises:
            ValueError: they have the same number of images.
        """
        (few, short), (many, long) = sorted([small, large])
        if few == many:
            raise ValueError(f"two micro-batches are needed; both have {few:g} images")
        per_image = (long - short) / (many - few)
        return cls(short - few * per_image, per_image)

    @classmethod
    def of_one(cls, images: float, seconds: float, fixed: float) -> Compute:
        """Return the cost of an image from one measurement and a known ``fixed`` cost."""
        return cls(fixed, (seconds - fixed) / images)


def step_seconds(compute: Compute, images: float, all_reduce: float, overlap: float = 0.0) -> float:
    """Return the time of a step.

    Args:
        compute: costs without communication.
        images: a GPU's, in a step.
        all_reduce: seconds that the gradients' all-reduce takes alone.
        overlap: share of the backward pass, two thirds of the compute, that it can hide behind.
    """
    hidden = overlap * 2.0 / 3.0 * images * compute.per_image
    return compute.seconds(images) + max(0.0, all_reduce - hidden)
