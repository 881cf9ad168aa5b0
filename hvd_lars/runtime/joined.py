"""Many small tensors as one, which takes a few launches on a GPU in place of one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor


def by_kind(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of tensors that share dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(i)
    return list(kinds.values())


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Return a copy of all elements, (total,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def write(tensors: list[Tensor], joined: Tensor) -> None:
    """Copy the parts of ``joined``, (total,), one after the other into ``tensors``."""
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


@final
class Joined:
    """Tensors that are read and written as one again and again.

    Args:
        tensors: of one dtype and device; their memory must not be replaced.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sizes = [tensor.numel() for tensor in tensors]
        self._flat = all(tensor.is_contiguous() for tensor in tensors)
        self._tensors = [tensor.view(-1) if self._flat else tensor for tensor in tensors]

    def read(self) -> Tensor:
        """Return a copy of all elements, (total,)."""
        return torch.cat(self._tensors) if self._flat else join(self._tensors)

    def write(self, joined: Tensor) -> None:
        """Copy the parts of ``joined``, (total,), one after the other into the tensors."""
        if self._flat:
            torch._foreach_copy_(self._tensors, list(torch.split(joined, self._sizes)))
        else:
            write(self._tensors, joined)
