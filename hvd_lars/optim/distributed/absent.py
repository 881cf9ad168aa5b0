"""A stand-in for gradients that no rank holds whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, final

from torch import Tensor


@final
class AbsentGradient(Tensor):
    """The value of ``param.grad`` between backward and step under ``Sharded``.

    With None, clipping would find a norm of zero and ``GradScaler`` no infinity.  Any operation on
    this raises RuntimeError instead.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> NoReturn:
        """Raise RuntimeError with the remedy."""
        raise RuntimeError(
            "param.grad under Sharded: each rank holds only a part of the summed gradients, so "
            "they cannot be read or changed between backward and step (clipping, GradScaler): "
            "use Replicated for that"
        )
