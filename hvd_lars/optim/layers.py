"""The layers of a step: what is updated, and every layer's trust ratio."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_lars.optim.distributed.placement import Placement
from hvd_lars.optim.kernels import Block, Kernel
from hvd_lars.optim.norms import flat, in_layout_of, is_dense
from hvd_lars.optim.ratios import trust_ratios
from hvd_lars.runtime.torch_internals import versions_of

_Place = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, shape, strides


def _place_of(tensor: Tensor | None) -> _Place | None:
    """Where a tensor's elements lie: ``.data = …`` and ``.set_()`` leave the object as it is."""
    if tensor is None or tensor.layout != torch.strided:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride()


@dataclass(slots=True)
class Layer:
    """One parameter tensor in a step, and what a kernel updates of it."""

    param: Tensor
    group: dict[str, Any]
    source: int  # whose trust ratio applies: an index into its device's layers, -1 for none
    block: Block | None = None
    # As they were when the block was made: objects, and where and how their elements lay.
    place: _Place | None = None
    gradient: Tensor | None = None
    gradient_place: _Place | None = None
    copied: bool = False  # the block has a copy of the gradient, in the parameter's layout
    buffer: Tensor | None = None
    buffer_at: int = 0
    master: Tensor | None = None
    master_at: int = 0


@dataclass(slots=True)
class Layers:
    """The layers of one device in a step."""

    layers: list[Layer]
    sources: list[int]  # the layers whose norms are taken: whose trust ratio somebody uses, or all
    adapted: list[Tensor]  # their parameters
    places: Tensor  # (sources,) the same, on the device
    ratio_of: Tensor  # (layers,) where in the sources' ratios, followed by 1, each layer's stands

    def versions(self) -> list[int]:
        """How often each parameter was written, as far as torch counts."""
        return versions_of([layer.param for layer in self.layers])

    def in_place(self) -> bool:
        """Whether every parameter lies where it lay when its block was made."""
        for layer in self.layers:
            param = layer.param
            if layer.place != (param.data_ptr(), param.shape, param.stride()):
                return False
        return True

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.ratio_of.device


def signature(groups: Sequence[dict[str, Any]], placed: bool, all_norms: bool) -> list[object]:
    """Changes where :func:`layers_of` would give other layers."""
    key: list[object] = [all_norms]
    key += [(id(g), g["adapt"], g["momentum"] != 0, tuple(g.get("ratio_from", ()))) for g in groups]
    for group in groups:
        if placed:
            key += [param.requires_grad for param in group["params"]]
        else:
            key += [p.grad is not None and p.requires_grad for p in group["params"]]
        key += map(id, group["params"])
    return key


def layers_of(groups: Sequence[dict[str, Any]], placed: bool, all_norms: bool) -> list[Layers]:
    """Parameters that have a gradient and are not frozen, in the order of the groups.

    Under a placement (``placed``) every parameter has a gradient.  ``all_norms`` also takes norms
    that no trust ratio needs.
    """
    layers: dict[torch.device, list[Layer]] = {}
    places: dict[int, tuple[torch.device, int]] = {}  # by position over all groups
    shared: list[tuple[Layer, int]] = []
    position = 0
    for group in groups:
        _check_complete(group)
        for i, param in enumerate(group["params"]):
            if param.requires_grad and (placed or param.grad is not None):
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
    return [_prepared(here, device, all_norms) for device, here in layers.items()]


def _check_complete(group: dict[str, Any]) -> None:
    """Raise RuntimeError where tensors that share a ratio were taken out of their group."""
    sources = group.get("ratio_from", ())
    if group["adapt"] == "layer" and len(group["params"]) != len(sources):
        raise RuntimeError(
            f'LARS: a group with adapt="layer" has {len(group["params"])} tensors and '
            f"{len(sources)} in ratio_from: tensors were added or taken out, as "
            f'hvd.Adasum does, which steps on one at a time; there, use adapt="weights"'
        )


def _prepared(layers: list[Layer], device: torch.device, all_norms: bool) -> Layers:
    sources = sorted({layer.source for layer in layers if layer.source >= 0})
    if all_norms:
        sources = list(range(len(layers)))
    place = {source: i for i, source in enumerate(sources)}
    index = [place.get(layer.source, len(sources)) for layer in layers]
    adapted = [layers[i].param for i in sources]
    places = torch.tensor(sources, dtype=torch.int64, device=device)
    return Layers(layers, sources, adapted, places, torch.tensor(index, device=device))


def is_half(param: Tensor) -> bool:
    """Whether the parameter needs a float32 master."""
    return param.dtype in (torch.bfloat16, torch.float16)


def block_of(
    layer: Layer,
    states: MutableMapping[Tensor, dict[str, Any]],
    placement: Placement | None,
    untouched: bool,
    same_states: bool,
) -> Block:
    """What a kernel updates of a layer; makes the state it needs, and a new block where needed.

    Args:
        layer: the layer.
        states: the optimizer's state.
        placement: where the gradient is summed.
        untouched: nobody has edited or moved a parameter of its device since the last step.
        same_states: nobody has put another dictionary into ``states``.
    """
    block = layer.block
    if (
        block is None
        or not untouched
        or _has_other_state(layer, block.state)
        or (not same_states and block.state and states.get(layer.param) is not block.state)
    ):
        layer.block = block = _make_block(layer, states, placement)
        layer.place = _place_of(layer.param)
        layer.buffer = block.state.get("momentum_buffer")
        layer.buffer_at = _address(layer.buffer)
        layer.master = block.state.get("master_weight") if block.copy is not None else None
        layer.master_at = _address(layer.master)
        if placement is None:
            _note_gradient(layer, block, layer.param.grad)
    elif placement is None:
        gradient = layer.param.grad
        assert gradient is not None
        if (
            gradient is not layer.gradient
            or layer.copied  # of the values that it had then
            or (gradient.data_ptr(), gradient.shape, gradient.stride()) != layer.gradient_place
        ):
            _renew_gradient(layer, block, gradient)
    return block


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _has_other_state(layer: Layer, state: dict[str, Any]) -> bool:
    """Whether somebody has replaced or moved the layer's buffer or master."""
    buffer: Tensor | None = state.get("momentum_buffer")
    if buffer is not layer.buffer or (buffer is not None and buffer.data_ptr() != layer.buffer_at):
        return True
    if layer.master is None:
        return False
    master: Tensor | None = state.get("master_weight")
    return master is not layer.master or layer.master.data_ptr() != layer.master_at


def _renew_gradient(layer: Layer, block: Block, gradient: Tensor) -> None:
    """Let the block have the gradient of this step, which is mostly like the last one's."""
    place, before = _place_of(gradient), layer.gradient_place
    if (
        place is not None
        and before is not None
        and place[1:] == before[1:]
        and not layer.copied
        and block.row
        and gradient.dtype == block.gradient.dtype
    ):
        block.gradient = gradient.as_strided(block.gradient.shape, block.gradient.stride())
        block.row = (block.row[0], place[0], *block.row[2:])
        layer.gradient, layer.gradient_place = gradient, place
        return
    block.gradient, block.row = _dense_gradient(layer.param, gradient), None
    _note_gradient(layer, block, gradient)


def _note_gradient(layer: Layer, block: Block, gradient: Tensor | None) -> None:
    layer.gradient, layer.gradient_place = gradient, _place_of(gradient)
    place = layer.gradient_place
    layer.copied = place is None or place[0] != block.gradient.data_ptr()


def _dense_gradient(param: Tensor, grad: Tensor) -> Tensor:
    if grad.is_sparse:
        raise RuntimeError(
            f"LARS takes dense gradients; a parameter of shape {tuple(param.shape)} has a "
            f"sparse one"
        )
    if grad.shape != param.shape:  # through .data, which torch does not check
        raise RuntimeError(
            f"LARS: a gradient of {tuple(grad.shape)} for a parameter of {tuple(param.shape)}"
        )
    return flat(in_layout_of(param, grad)) if is_dense(param) else grad


def _make_block(
    layer: Layer, states: MutableMapping[Tensor, dict[str, Any]], placement: Placement | None
) -> Block:
    param, group = layer.param, layer.group
    if placement is not None:
        weight, gradient = placement.block(param)
        norm_part = placement.norm_part(param)
    else:
        assert param.grad is not None
        norm_part = (0, param.numel())
        gradient = _dense_gradient(param, param.grad)
        weight = flat(param) if is_dense(param) else param
    copy = buffer = None
    state = states[param] if is_half(param) or group["momentum"] != 0 else {}
    if is_half(param):
        copy = weight
        if "master_weight" not in state:
            state["master_weight"] = copy.float()
        weight = state["master_weight"]
        _check_shape("master_weight", weight, copy, param)
        if not torch.equal(weight.to(copy.dtype), copy):  # somebody has edited the parameter
            weight.copy_(copy)
    if group["momentum"] != 0:
        like = param if weight.numel() == param.numel() else weight
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(like, dtype=weight.dtype)
        _check_shape("momentum_buffer", buffer, like, param)
        if buffer.stride() != like.stride() or buffer.dtype != weight.dtype:  # as it was loaded
            buffer = torch.empty_like(like, dtype=weight.dtype).copy_(buffer)
        state["momentum_buffer"] = buffer
        if weight.dim() == 1:
            buffer = flat(buffer)
    block = Block(weight, gradient, buffer, copy, group, state, norm_part)
    block.check()
    return block


def _check_shape(name: str, found: Tensor, like: Tensor, param: Tensor) -> None:
    """Raise RuntimeError where a state that was loaded or set is not of its tensor's shape."""
    if found.shape != like.shape:
        part = "" if like.shape == param.shape else f", of a parameter of {tuple(param.shape)},"
        raise RuntimeError(
            f"LARS: {name} has shape {tuple(found.shape)}; the weight that it is for{part} has "
            f"{tuple(like.shape)}: it is the state of another model, of a parameter that was "
            f"replaced since, or of another number of ranks"
        )


class Measured(NamedTuple):
    """What a step found out about its layers, all float64 on their device.

    ``ratios`` is λ of every layer, (layers,), 1 where it has none; ``weights`` and ``gradients``
    are the norms of those in ``Layers.sources``.
    """

    ratios: Tensor
    weights: Tensor
    gradients: Tensor


def ratios_of(
    layers: Layers,
    blocks: Sequence[Block],
    kernel: Kernel,
    placement: Placement | None,
    known: Tensor | None,
    unscale: float,
) -> Measured:
    """Take the norms that are not known yet, and from them every layer's λ.

    ``known`` are sums of squares of this rank's parts of all weights, where they stand already.
    ``unscale`` is the factor of the gradients.
    """
    one = torch.ones(1, dtype=torch.float64, device=layers.device)
    sources = layers.sources
    if not sources:
        return Measured(one.expand(len(blocks)), one[:0], one[:0])
    adapted = [blocks[i] for i in sources]
    groups = [block.group for block in adapted]
    combined = any(map(_is_combined, groups))
    early = None
    if placement is not None and not combined:
        early = placement.gradients.early_sums(layers.adapted)
    if early is None:
        early = kernel.sums_of_squares([_gradient(block, unscale, combined) for block in adapted])
    if known is None:
        known = kernel.sums_of_squares([_norm_part(block, block.weight) for block in adapted])
    else:
        known = known[layers.places]
    sums = torch.cat([known, early])
    if placement is not None:
        placement.gradients.sum_early(None if combined else kernel)
        sums = placement.gradients.complete_sums(sums)
    weight_norms, gradient_norms = sums.sqrt().chunk(2)
    if not combined:
        gradient_norms = gradient_norms * unscale
    ratios = torch.cat([trust_ratios(groups, weight_norms, gradient_norms), one])
    return Measured(ratios[layers.ratio_of], weight_norms, gradient_norms)


def _is_combined(group: dict[str, Any]) -> bool:
    return bool(group["denominator"] == "combined" and group["weight_decay"] != 0)


def _norm_part(block: Block, tensor: Tensor) -> Tensor:
    begin, end = block.norm_part
    return tensor if end - begin == tensor.numel() else tensor[begin:end]


def _gradient(block: Block, unscale: float, combined: bool) -> Tensor:
    """What the denominator's norm is of, on this rank: g, or g + βw, with g unscaled for that."""
    gradient = _norm_part(block, block.gradient)
    if not combined:
        return gradient
    gradient = gradient.to(block.weight.dtype) * unscale
    if _is_combined(block.group):
        gradient.add_(_norm_part(block, block.weight), alpha=block.group["weight_decay"])
    return gradient
