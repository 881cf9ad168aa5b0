"""The update in plain torch operations.

On CPU, a loop over the layers with rates on the host.  Elsewhere, ``torch._foreach_*`` over all
layers of a kind with rates on the device, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from hvd_lars.optim.kernels.block import Block, Ratios, Scale, is_skipped, rates
from hvd_lars.optim.norms import sums_of_squares


@final
class EagerKernel:
    """Plain torch operations, for any device and layout.

    Args:
        on_host: read the ratios on the host; if False they stay on the layers' device.
    """

    name = "eager"

    def __init__(self, on_host: bool) -> None:
        self._on_host = on_host

    def sums_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sums of squares; see :class:`Kernel`."""
        return sums_of_squares(tensors)

    def update(
        self,
        blocks: Sequence[Block],
        ratios: Ratios,
        unscale: Scale,
        live: Tensor | None = None,
    ) -> None:
        """Update in place, without sums; see :class:`Kernel`."""
        if self._on_host:
            if live is not None and not live:
                return
            unscale = float(unscale)
            for block, ratio in zip(blocks, ratios.values.tolist(), strict=True):
                if not is_skipped(block, ratio):
                    update_on_host(block, ratio, unscale)
            return
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, block in enumerate(blocks):
            kinds.setdefault((id(block.group), block.weight.dtype), []).append(i)
        of_block = ratios.values.unbind()  # indexing by a list would wait for the device
        for members in kinds.values():
            chosen = torch.stack([of_block[i] for i in members])
            _update_together([blocks[i] for i in members], chosen, unscale, live)


def update_on_host(block: Block, ratio: float, unscale: float) -> None:
    """Apply the rule to one block on CPU, with λ on the host."""
    group, weight = block.group, block.weight
    inside, outside = rates(group)
    momentum, decay, scale = group["momentum"], group["weight_decay"], ratio * inside
    gradient = block.gradient.to(weight.dtype)
    if unscale != 1.0:
        gradient = gradient * unscale

    def add_gradient(target: Tensor) -> Tensor:
        target.add_(gradient, alpha=scale)
        return target.add_(weight, alpha=scale * decay) if decay != 0 else target

    if block.buffer is None:
        step = add_gradient(torch.zeros_like(weight))
    else:
        step = add_gradient(block.buffer.mul_(momentum))
        if group["nesterov"]:
            step = add_gradient(step * momentum)
    weight.sub_(step, alpha=outside)
    if block.copy is not None:
        block.copy.copy_(weight)


def _update_together(
    blocks: list[Block], ratios: Tensor, unscale: Scale, live: Tensor | None
) -> None:
    """Apply the rule to blocks of one group and dtype without copying a value to the host."""
    group, weights = blocks[0].group, [block.weight for block in blocks]
    inside, outside = rates(group)
    momentum, decay = group["momentum"], group["weight_decay"]
    dtype = weights[0].dtype
    moves = ratios != 0 if group["zero_norm"] == "skip" else None  # (blocks,); None: all
    if live is not None:
        moves = live.expand(len(blocks)) if moves is None else moves & live
    if moves is not None:
        ratios = torch.where(moves, ratios, 0.0)
    scales = list((ratios * inside).to(dtype).unbind())
    gradients = [block.gradient.to(dtype) for block in blocks]
    if isinstance(unscale, Tensor):
        gradients = list(torch._foreach_mul(gradients, unscale.to(dtype)))
    elif unscale != 1.0:
        gradients = list(torch._foreach_mul(gradients, unscale))
    if live is not None:  # or 0 times infinity would be NaN
        gradients = [torch.where(live, gradient, 0.0) for gradient in gradients]
    steps = list(torch._foreach_add(gradients, weights, alpha=decay))
    torch._foreach_mul_(steps, scales)
    buffers = [block.buffer for block in blocks if block.buffer is not None]
    if buffers:
        if moves is None:
            torch._foreach_mul_(buffers, momentum)
        else:
            kept = torch.where(moves, torch.full_like(ratios, momentum), 1.0).to(dtype)
            torch._foreach_mul_(buffers, list(kept.unbind()))
        torch._foreach_add_(buffers, steps)
        if group["nesterov"]:
            torch._foreach_add_(steps, buffers, alpha=momentum)
        else:
            torch._foreach_copy_(steps, buffers)
        if moves is not None:
            torch._foreach_mul_(steps, list(moves.to(dtype).unbind()))
    torch._foreach_add_(weights, steps, alpha=-outside)
    for block in blocks:
        if block.copy is not None:
            block.copy.copy_(block.weight)
