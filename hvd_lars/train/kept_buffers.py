"""A model's buffers, restored where a step is skipped without the host knowing of it."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from hvd_lars.runtime.joined import Joined, by_kind


@final
class KeptBuffers:
    """Running statistics and other buffers of a model, as they were before a step.

    Args:
        model: neither its buffers nor their memory may be replaced.  Expanded ones, of which
            several elements share memory, are taken for constants.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = [buffer for buffer in model.buffers() if not is_expanded(buffer)]
        self._groups = [Joined([buffers[i] for i in each]) for each in by_kind(buffers)]
        self._before: list[Tensor] = []

    def note(self) -> None:
        """Remember the present values."""
        self._before = [group.read() for group in self._groups]

    def restore_unless(self, kept: Tensor) -> None:
        """Set all buffers back to the noted values, unless ``kept``, a 0-dim bool, is True."""
        for group, before in zip(self._groups, self._before, strict=True):
            group.write(torch.where(kept.to(before.device), group.read(), before))


def is_expanded(tensor: Tensor) -> bool:
    """Return whether several elements share memory."""
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    return any(stride == 0 and size > 1 for stride, size in sizes)
