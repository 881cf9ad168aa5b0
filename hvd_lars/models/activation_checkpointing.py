"""Activation checkpointing of residual blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from hvd_lars.errors import UserError
from hvd_lars.runtime.torch_internals import replace_forward, statistics_in_copies


def checkpoint_activations(model: nn.Module) -> int:
    """Keep only the inputs of residual blocks for backward; returns the number of blocks.

    Blocks are direct children of an ``nn.Sequential`` or ``nn.ModuleList`` with at least two
    weighted layers, as in torchvision's and timm's ResNets and transformers.  BatchNorm's running
    statistics count a batch once, in forward.

    Raises:
        UserError: the network has no such block.

    Source:
        Chen et al. 2016, arXiv 1604.06174.
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise UserError(
            "model.checkpoint_blocks: the network has no blocks that activation checkpointing can "
            "use; set it to false"
        )
    for block in blocks:
        replace_forward(block, _forward)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost blocks."""
    for child in module.children():
        listed = isinstance(module, (nn.Sequential, nn.ModuleList))
        plain = isinstance(child, (nn.Sequential, nn.ModuleList))
        weighted = sum("weight" in dict(m.named_parameters(recurse=False)) for m in child.modules())
        if listed and not plain and weighted > 1:
            yield child
        else:
            yield from _blocks(child)


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block's own forward pass, checkpointed while it trains."""
    forward = type(block).forward
    if not block.training:
        return forward(block, *args, **kwargs)
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), statistics_in_copies(norms)

    return checkpoint(forward, block, *args, use_reentrant=False, context_fn=contexts, **kwargs)
