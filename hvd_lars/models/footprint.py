"""Estimate the memory of a training step without a GPU.

The network runs forward on the ``meta`` device, where tensors have shapes but no bytes; autograd
reports the tensors that it keeps for backward.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Footprint:
    """Bytes of a network's parameters and buffers, and of its activations by batch size."""

    parameters: int
    buffers: int
    activations_fixed: float
    activations_per_sample: float

    def activations(self, samples: int) -> float:
        """Return the bytes kept for backward by ``samples`` images, images included."""
        return self.activations_fixed + self.activations_per_sample * samples


def footprint(model: nn.Module, shape: tuple[int, ...]) -> Footprint:
    """Measure ``model``, in float32, on images of ``shape`` (channels, height, width).

    Counts exactly every storage that autograd keeps, once, but nothing that a device adds,
    such as convolution workspaces and the allocator's rounding.
    """
    shadow = copy.deepcopy(model).to("meta").train()
    two, four = (_kept_for_backward(shadow, n, shape) for n in (2, 4))
    slope = (four - two) / 2.0
    return Footprint(
        parameters=sum(p.numel() * p.element_size() for p in model.parameters()),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        activations_fixed=two - 2.0 * slope,
        activations_per_sample=slope,
    )


def _kept_for_backward(model: nn.Module, samples: int, shape: tuple[int, ...]) -> int:
    """Return the bytes of storages that forward and loss keep, without the model's own."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # alive, so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept.setdefault(storage, tensor)
        return tensor

    images = torch.zeros(samples, *shape, device="meta")
    labels = torch.zeros(samples, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = functional.cross_entropy(model(images), labels, reduction="sum")
    keep(images)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return total
