"""A model's buffers, restored where a step is skipped without the host knowing of it."""

from __future__ import annotations

from operator import is_
from typing import final

import torch
from torch import Tensor, nn

from hvd_lars.runtime.joined import Joined, by_kind, is_expanded


@final
class KeptBuffers:
    """Running statistics and other buffers of a model, as they were before a step.

    Args:
        model: may replace its buffers in a step.  Expanded ones, of which several elements share
            memory, are taken for constants; one whose shape changes in a step is left as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[dict[str, Tensor | None], str]] = [
            (module._buffers, name) for module in model.modules() for name in module._buffers
        ]
        self._present: list[Tensor | None] = []
        self._adopt()

    def _adopt(self) -> None:
        """Take the present buffers for those to keep."""
        self._present = self._found()
        kept: dict[int, Tensor] = {}  # a buffer may be in several modules
        for buffer in self._present:
            if buffer is not None and not is_expanded(buffer):
                kept[id(buffer)] = buffer
        buffers = list(kept.values())
        self._kinds = [[buffers[i] for i in each] for each in by_kind(buffers)]
        self._groups = list(map(Joined, self._kinds))
        self._before: list[Tensor] = []

    def _found(self) -> list[Tensor | None]:
        return [buffers.get(name) for buffers, name in self._places]

    def note(self) -> None:
        """Remember the present values."""
        if not all(map(is_, self._found(), self._present)):
            self._adopt()
        self._before = [group.read() for group in self._groups]

    def restore_unless(self, kept: Tensor) -> None:
        """Set all buffers back to the noted values, unless ``kept``, a 0-dim bool, is True."""
        if all(map(is_, self._found(), self._present)):
            for group, before in zip(self._groups, self._before, strict=True):
                group.write(torch.where(kept.to(before.device), group.read(), before))
        else:
            self._restore_replaced(kept)

    def _restore_replaced(self, kept: Tensor) -> None:
        """Do the same where the model replaced buffers since they were noted."""
        noted: dict[int, Tensor] = {}
        for buffers, before in zip(self._kinds, self._before, strict=True):
            parts = torch.split(before, [buffer.numel() for buffer in buffers])
            noted |= {id(b): part.view(b.shape) for b, part in zip(buffers, parts, strict=True)}
        done: dict[int, Tensor] = {}  # by what was there: it may be in several modules
        for (held, name), old in zip(self._places, self._present, strict=True):
            now, was = held.get(name), noted.get(id(old))
            if now is None or was is None or now.shape != was.shape:
                continue
            if id(now) not in done:
                value = torch.where(kept.to(now.device), now, was.to(now))
                done[id(now)] = now.copy_(value) if now is old else value
            held[name] = done[id(now)]
