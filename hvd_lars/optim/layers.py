"""The layers of a step: what is updated, and every layer's trust ratio.

Imports kernels, norms, placement and ratios.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_lars.optim.kernels import Block, Kernel
from hvd_lars.optim.norms import flat, in_layout_of, is_dense
from hvd_lars.optim.placement import Placement
from hvd_lars.optim.ratios import trust_ratios


@dataclass(slots=True)
class Layer:
    """One parameter tensor in a step."""

    param: Tensor
    group: dict[str, Any]
    source: int  # whose trust ratio applies: an index into its device's layers, -1 for none


def layers_of(
    groups: Sequence[dict[str, Any]], placement: Placement | None
) -> dict[torch.device, list[Layer]]:
    """Parameters that have a gradient and are not frozen, in the order of the groups."""
    layers: dict[torch.device, list[Layer]] = {}
    places: dict[int, tuple[torch.device, int]] = {}  # by position over all groups
    shared: list[tuple[Layer, int]] = []
    position = 0
    for group in groups:
        for i, param in enumerate(group["params"]):
            if param.requires_grad and (placement is not None or _has_gradient(param)):
                here = layers.setdefault(param.device, [])
                places[position] = (param.device, len(here))
                layer = Layer(param, group, len(here) if group["adapt"] == "own" else -1)
                if group["adapt"] == "layer":
                    shared.append((layer, group["ratio_from"][i]))
                here.append(layer)
            position += 1
    for layer, source in shared:
        # A bias whose weight is frozen or elsewhere has no ratio to share: it takes the plain rate.
        device, index = places.get(source, (None, -1))
        layer.source = index if device == layer.param.device else -1
    return layers


def _has_gradient(param: Tensor) -> bool:
    if param.grad is not None and param.grad.is_sparse:
        raise RuntimeError(
            f"LARS takes dense gradients; a parameter of shape {tuple(param.shape)} has a sparse one"
        )
    return param.grad is not None


def is_half(param: Tensor) -> bool:
    """Whether the parameter needs a float32 master."""
    return param.dtype in (torch.bfloat16, torch.float16)


def block_of(
    layer: Layer,
    states: MutableMapping[Tensor, dict[str, Any]],
    placement: Placement | None,
    untouched: bool,
) -> Block:
    """What a kernel updates of a layer; makes the state it needs.

    ``untouched``: nobody has edited the parameter since the last step.
    """
    param, group = layer.param, layer.group
    if placement is not None:
        weight, gradient = placement.block(param)
    elif is_dense(param):
        assert param.grad is not None
        weight, gradient = flat(param), flat(in_layout_of(param, param.grad))
    else:
        assert param.grad is not None
        weight, gradient = param, param.grad
    copy = buffer = None
    state = states[param] if is_half(param) or group["momentum"] != 0 else {}
    if is_half(param):
        copy = weight
        if "master_weight" not in state:
            state["master_weight"] = copy.float()
        weight = state["master_weight"]
        if not untouched and not torch.equal(weight.to(copy.dtype), copy):
            weight.copy_(copy)
    if group["momentum"] != 0:
        like = param if weight.numel() == param.numel() else weight
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(like, dtype=weight.dtype)
        elif buffer.stride() != like.stride():  # loaded from another memory format
            buffer = torch.empty_like(like, dtype=weight.dtype).copy_(buffer)
        state["momentum_buffer"] = buffer
        if weight.dim() == 1:
            buffer = flat(buffer)
    return Block(weight, gradient, buffer, copy, group, state)


def ratios_of(
    layers: Sequence[Layer],
    blocks: Sequence[Block],
    kernel: Kernel,
    placement: Placement | None,
    known: Tensor | None,
) -> Tensor:
    """λ of every layer, 1 where it has none: (layers,), float64.

    ``known`` are sums of squares of this rank's parts of all weights, where they stand already.
    """
    one = torch.ones(1, dtype=torch.float64, device=layers[0].param.device)
    sources = sorted({layer.source for layer in layers if layer.source >= 0})
    if not sources:
        return one.expand(len(layers))
    adapted = [blocks[i] for i in sources]
    params = [layers[i].param for i in sources]
    groups = [layers[i].group for i in sources]
    norms = _norms(params, adapted, kernel, placement, None if known is None else known[sources])
    own = torch.cat([trust_ratios(groups, *norms), one])
    place = {source: i for i, source in enumerate(sources)}
    return own[[place.get(layer.source, len(sources)) for layer in layers]]


def _norms(
    params: Sequence[Tensor],
    blocks: Sequence[Block],
    kernel: Kernel,
    placement: Placement | None,
    known: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """‖w‖ and the denominator's gradient norm over all ranks, (layers,) each, float64."""
    combined = any(_is_combined(block.group) for block in blocks)
    parts = [slice(None) for _ in params]
    early = None
    if placement is not None:
        parts = [slice(*placement.norm_part(param)) for param in params]
        placement.sum_early(None if combined else kernel)
        early = None if combined else placement.early_sums(params)
        if known is not None and not placement.counts_known_sums:
            known = torch.zeros_like(known)
    pairs = list(zip(blocks, parts, strict=True))
    if known is None:
        known = kernel.sums_of_squares([block.weight[part] for block, part in pairs])
    if early is None:
        early = kernel.sums_of_squares([_gradient(block, part) for block, part in pairs])
    sums = torch.cat([known, early])
    if placement is not None:
        sums = placement.complete_sums(sums)
    weight_norms, gradient_norms = sums.sqrt().chunk(2)
    return weight_norms, gradient_norms


def _is_combined(group: dict[str, Any]) -> bool:
    return group["denominator"] == "combined" and group["weight_decay"] != 0


def _gradient(block: Block, part: slice) -> Tensor:
    """What the denominator's norm is of: g, or g + βw."""
    gradient = block.gradient[part]
    if not _is_combined(block.group):
        return gradient
    decay = block.group["weight_decay"]
    return gradient.to(block.weight.dtype).add(block.weight[part], alpha=decay)
