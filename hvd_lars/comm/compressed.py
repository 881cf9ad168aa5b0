"""Gradients summed over ranks as float16."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from hvd_lars.comm.base import Pending, Reducer, Then

_LARGEST = 65504.0
_ROOM = 64.0  # headroom: the factor by which a value or the next sum may exceed the last sum


@final
class CompressedReducer:
    """Sums float32 tensors as float16: half the bytes on the wire, each value to 11 bits.

    Every tensor is scaled by a power of two that puts the largest value of its last sum, which all
    ranks know, a factor of 64 below float16's largest number, so that no significant value
    underflows or overflows.  If a sum overflows nevertheless, or is a thousand times smaller than
    the last, all ranks repeat it in float32; the first sum is in float32 too.  Other dtypes are
    summed unchanged.

    Args:
        ranks: the reducer; it must support float16, as Horovod does.
    """

    def __init__(self, ranks: Reducer) -> None:
        self._ranks = ranks
        self.rank, self.size = ranks.rank, ranks.size
        self._scales: dict[str, float] = {}

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Start to sum ``tensor`` over the ranks, in place."""
        if tensor.dtype != torch.float32:
            return self._ranks.start_all_reduce_sum(tensor, name)
        scale = self._scales.get(name)
        if scale is None:
            whole = self._ranks.start_all_reduce_sum(tensor, name)
            return Then(whole, lambda: self._learn(tensor, name))
        half = (tensor * scale).half()
        halved = self._ranks.start_all_reduce_sum(half, f"{name}.half")
        return Then(halved, lambda: self._unpack(tensor, half, name))

    def _learn(self, tensor: Tensor, name: str) -> None:
        """Choose the next scale from this sum, which is the same on all ranks."""
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        if 0.0 < largest < math.inf:
            self._scales[name] = 2.0 ** math.floor(math.log2(_LARGEST / (_ROOM * largest)))
        else:
            self._scales.pop(name, None)

    def _unpack(self, tensor: Tensor, half: Tensor, name: str) -> None:
        """Put the sum into ``tensor``; repeat it in float32 if it overflowed or became tiny."""
        if not 1.0 <= half.abs().max().item() < math.inf:
            self._ranks.start_all_reduce_sum(tensor, f"{name}.again").wait()
        else:
            tensor.copy_(half).div_(self._scales[name])
        self._learn(tensor, name)
