"""LARS in one pass of torch's fused SGD on CPU.

``torch._fused_sgd_`` computes v ← μ'v + (1 − d)(g + βw), w ← w − γ'v with one γ' per call and no
rate inside the buffer.  With v = a·n, where a is one number per layer, and s = γλ:

    a' = μa + s,   n' = (μa/a')·n + (s/a')(g + βw),   w' = w − a'·n'

which is the paper's v' = a'n' = μv + s(g + βw); with γ outside the buffer s = λ and the last term
is γa'n'.  n stays an average of gradients.  The block's buffer then holds n, and
``state["momentum_scale"]`` holds a; :func:`unfold` restores v.  A new buffer has a = 0.  A buffer
that holds v is folded by s first: with a = 1 and a small s, d would be so close to 1 that 1 − d
has few significant digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from hvd_lars.optim.kernels.block import Block, Ratios, Scale, is_skipped, rates
from hvd_lars.optim.kernels.eager import update_on_host
from hvd_lars.optim.norms import sums_of_squares
from hvd_lars.runtime import torch_internals

_SCALE = "momentum_scale"


def unfold(state: dict[str, Any]) -> None:
    """Make a parameter's momentum buffer hold v if it holds v / a."""
    scale = state.pop(_SCALE, 1.0)
    if scale != 1.0:
        state["momentum_buffer"].mul_(scale)


def unfold_all(states: Iterable[dict[str, Any]]) -> None:
    """Unfold the states that need it; costs next to nothing for the others."""
    for state in states:
        if _SCALE in state:
            unfold(state)


def _fold(momentum: Tensor, scale: float) -> float:
    """Divide a buffer that holds v by a; return a: ``scale``, 1 if that overflows, 0 if v = 0."""
    largest = float(torch.linalg.vector_norm(momentum, float("inf")))
    if largest == 0.0:
        return 0.0
    if not (scale > 0.0 and largest / scale < torch.finfo(momentum.dtype).max / 2.0):
        return 1.0
    momentum.div_(scale)
    return scale


@final
class FusedKernel:
    """For CPU without a compiler; blocks that torch's kernel would get wrong are updated eagerly.

    See :class:`Kernel` for the methods.
    """

    name = "fused"

    def sums_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sums of squares."""
        return sums_of_squares(tensors)

    def update(
        self,
        blocks: Sequence[Block],
        ratios: Ratios,
        unscale: Scale,
        live: Tensor | None = None,
    ) -> None:
        """Update in place, without sums."""
        if live is not None and not live:
            return
        unscale = float(unscale)
        for block, ratio in zip(blocks, ratios.values.tolist(), strict=True):
            if is_skipped(block, ratio) or not block.weight.numel():
                continue
            if _fits(block):
                _update(block, ratio, unscale)
            else:
                unfold(block.state)
                update_on_host(block, ratio, unscale)


def _fits(block: Block) -> bool:
    """Return whether torch's kernel can take the block.

    Nesterov cannot be folded; half gradients and differing strides give silently wrong results.
    """
    return (
        not block.group["nesterov"]
        and block.gradient.dtype == block.weight.dtype
        and block.is_flat
        and block.copy is None
    )


def _update(block: Block, ratio: float, unscale: float) -> None:
    group = block.group
    inside, outside = rates(group)
    momentum, scale = group["momentum"], ratio * inside
    first = False
    if block.buffer is None:
        momentum, dampening, lr = 0.0, 0.0, scale * outside
    else:
        old = block.state.get(_SCALE)
        if old is None:
            old = _fold(block.buffer, scale)
        new = momentum * old + scale
        if new == 0.0:
            return  # v is zero and stays zero
        block.state[_SCALE] = new
        momentum, dampening, lr = momentum * old / new, 1.0 - scale / new, new * outside
        first = momentum == 0.0  # torch takes momentum 0 for "no buffer"
    torch_internals.fused_sgd_(
        [block.weight],
        [block.gradient if unscale == 1.0 else block.gradient * unscale],
        [] if block.buffer is None else [block.buffer],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"] if first else momentum,
        lr=lr,
        dampening=dampening,
        nesterov=False,
        maximize=False,
        is_first_step=first,
    )
