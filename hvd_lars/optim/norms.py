"""Sums of squares of tensors, and tensors as flat memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 4096


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill memory without gaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def all_finite(norms: Tensor) -> Tensor:
    """Return whether all of (n,) float64 norms are finite, 0-dim bool; three small operations.

    Their sum overflows only where their squares have.
    """
    return norms.sum().abs() < math.inf


def flat(tensor: Tensor) -> Tensor:
    """Return a view of a dense tensor as (numel,), in memory order; a copy if it has gaps."""
    if tensor.numel() == 0:
        return tensor.reshape(-1)
    if is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def in_layout_of(param: Tensor, grad: Tensor) -> Tensor:
    """Return ``grad`` with the strides of ``param``, copied only if they differ.

    A channels_last weight may get a contiguous gradient; flat views of both must pair up the
    same elements.
    """
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param).copy_(grad)


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each flat tensor: (len(tensors),), float64, on their device.

    float64 tensors are summed in float64; others in float32 within blocks of 4096 elements and in
    float64 across blocks, so the error does not grow with the layer.
    """
    return torch.stack([_sum_of_squares(flat(tensor)) for tensor in tensors])


def _sum_of_squares(tensor: Tensor) -> Tensor:
    """Return the sum of squares of one (numel,) tensor: 0-dim float64."""
    if not tensor.numel():
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    blocks = tensor.numel() // _BLOCK
    whole = tensor[: blocks * _BLOCK].view(blocks, _BLOCK)
    norms: Tensor = torch.linalg.vector_norm(whole, dim=1, dtype=dtype).double()
    rest: Tensor = torch.linalg.vector_norm(tensor[blocks * _BLOCK :], dtype=dtype).double()
    return norms.square().sum() + rest.square()
