"""The gradient that no rank holds whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, final

from torch import Tensor


@final
class AbsentGradient(Tensor):
    """Stands in ``param.grad`` between backward and step under ``Sharded``.

    Gradients of None would let clipping find a norm of zero and ``GradScaler`` find no infinity.
    Whatever reads this raises RuntimeError instead.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> NoReturn:
        """Raise RuntimeError that says what can be done."""
        raise RuntimeError(
            "param.grad under Sharded: each rank holds the sums of a part of the gradients, so "
            "they cannot be read or changed between backward and step (clipping, GradScaler): "
            "use Replicated for that"
        )
