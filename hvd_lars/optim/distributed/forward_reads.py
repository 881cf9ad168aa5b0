"""Callbacks with the parameters that a model's forward is about to read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, final

from torch import Tensor, nn


@final
class ForwardReads:
    """Calls back before each part of a model runs, with the parameters that it may read.

    Parts are the model's children, and the children of plain ``nn.Sequential``s among them.  A
    part's code may read any parameter below it without calling the module that holds it
    (``nn.MultiheadAttention`` does not call its ``out_proj``), so parts are not divided further.
    Parameters outside all parts, and those of parts not called before :meth:`learn`, count as the
    model's own, which it may read at any time.

    Args:
        model: the model.
        about_to_read: called with the parameters, once :meth:`learn` has succeeded.
    """

    def __init__(self, model: nn.Module, about_to_read: Callable[[Iterable[Tensor]], None]) -> None:
        self._model, self._about_to_read = model, about_to_read
        self._parts = list(_parts_of(model))
        self._called: set[int] = set()
        self._own: list[Tensor] | None = None
        model.register_forward_pre_hook(self._before_model)
        for i, part in enumerate(self._parts):
            part.register_forward_pre_hook(partial(self._before_part, i))

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardReads:
        """Return a twin that never calls back, since nothing gathers a copy's parameters."""
        twin = copy.copy(self)
        twin._own, twin._called = None, set()
        twin._about_to_read = lambda _: None
        return twin

    def learn(self) -> bool:
        """Record the parts that forward has called; return whether there were any."""
        if self._own is None and self._called:
            below = {
                param
                for i, part in enumerate(self._parts)
                if i in self._called
                for param in part.parameters()
            }
            self._own = [param for param in self._model.parameters() if param not in below]
        return self._own is not None

    def _before_model(self, *_: Any) -> None:
        if self._own is not None:
            self._about_to_read(self._own)

    def _before_part(self, i: int, *_: Any) -> None:
        self._called.add(i)
        if self._own is not None:
            self._about_to_read(self._parts[i].parameters())


def _parts_of(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child) is nn.Sequential:
            yield from _parts_of(child)
        else:
            yield child
