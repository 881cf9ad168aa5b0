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


def is_expanded(tensor: Tensor) -> bool:
    """Return whether several elements share memory."""
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    return any(stride == 0 and size > 1 for stride, size in sizes)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Return a copy of all elements, (total,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def write(tensors: list[Tensor], joined: Tensor) -> None:
    """Copy the parts of ``joined``, (total,), one after the other into ``tensors``."""
    torch._foreach_copy_(tensors, _parts(tensors, joined))


def _parts(tensors: Sequence[Tensor], joined: Tensor) -> list[Tensor]:
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


@final
class Joined:
    """Tensors that are read and written as one again and again.

    Args:
        tensors: of one dtype and device; their memory must not be replaced.  A copy of them is kept
            for writing, as splitting what is to be written takes longer than copying it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._flat = all(tensor.is_contiguous() for tensor in tensors)
        self._tensors = [tensor.view(-1) if self._flat else tensor for tensor in tensors]
        self._joined = join(tensors)
        self._parts = _parts(self._tensors, self._joined)

    def read(self) -> Tensor:
        """Return a copy of all elements, (total,)."""
        return torch.cat(self._tensors) if self._flat else join(self._tensors)

    def write(self, joined: Tensor) -> None:
        """Copy the parts of ``joined``, (total,), one after the other into the tensors."""
        self._joined.copy_(joined)
        torch._foreach_copy_(self._tensors, self._parts)
