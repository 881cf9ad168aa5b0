"""Blocks of memory that a kernel updates, rebuilt when the parameters' memory has changed.

Kernels work on addresses, so everything that could have moved between two steps is compared.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from operator import is_, itemgetter
from typing import Any, cast, final

import torch
from torch import Tensor

from hvd_lars.optim.distributed.placement import Placement
from hvd_lars.optim.kernels import Block
from hvd_lars.optim.kernels.block import Tabled
from hvd_lars.optim.layers import Layer
from hvd_lars.optim.norms import flat, in_layout_of, is_dense

States = MutableMapping[Tensor, dict[str, Any]]
_Place = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, shape, strides


def _places_of(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Return addresses, sizes and strides; ``.data = …`` and ``.set_()`` keep the objects."""
    accessors = (Tensor.data_ptr, Tensor.numel, Tensor.stride)
    return tuple(list(map(accessor, tensors)) for accessor in accessors)


def _place_of(tensor: Tensor) -> _Place | None:
    if tensor.layout != torch.strided:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def is_half(param: Tensor) -> bool:
    """Return whether the parameter needs a float32 master."""
    return param.dtype in (torch.bfloat16, torch.float16)


@final
class Blocks:
    """The blocks of one device's layers, rebuilt when parameters, state or gradients move.

    Parameters and state are compared as lists, in C: with 1,000 small layers Python's overhead
    dominates a step.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._params = [layer.param for layer in layers]
        self._blocks: Tabled[Block] = Tabled()
        self._param_places: tuple[list[Any], ...] = ()
        self._kept: list[_KeptState] = []
        self._gradients: list[Tensor] = []
        self._gradient_places: list[_Place | None] = []
        self._copied: set[int] = set()  # blocks whose gradient is a copy in the weight's layout

    def in_place(self) -> bool:
        """Return whether no parameter has moved since its block was made."""
        return _places_of(self._params) == self._param_places

    def current(
        self, states: States, placement: Placement | None, untouched: bool, same_states: bool
    ) -> list[Block]:
        """Return the blocks of this step; missing state is created.

        Args:
            states: the optimizer's state.
            placement: sums the gradients; None for one process.
            untouched: no parameter was edited or moved since the last step.
            same_states: no dictionary in ``states`` was replaced.

        Raises:
            RuntimeError: a state or gradient differs in shape from its parameter, or is sparse.
        """
        if (
            not self._blocks
            or not untouched
            or any(kept.has_moved() for kept in self._kept)
            or not (same_states or self._has_states(states))
        ):
            self._make(states, placement)
        elif placement is None:
            self._renew_gradients()
        return self._blocks

    def _has_states(self, states: States) -> bool:
        return all(
            not block.state or states.get(param) is block.state
            for param, block in zip(self._params, self._blocks, strict=True)
        )

    def _make(self, states: States, placement: Placement | None) -> None:
        self._blocks = Tabled()  # until all are made
        blocks = [_make_block(layer, states, placement) for layer in self._layers]
        self._param_places = _places_of(self._params)
        self._kept = [
            _KeptState("momentum_buffer", [b.state for b in blocks if b.buffer is not None]),
            _KeptState("master_weight", [b.state for b in blocks if b.copy is not None]),
        ]
        if placement is None:
            self._gradients = _gradients_of(self._params)
            self._gradient_places = list(map(_place_of, self._gradients))
            self._copied = {
                i
                for i, (block, place) in enumerate(zip(blocks, self._gradient_places, strict=True))
                if place is None or place[0] != block.gradient.data_ptr()
            }
        self._blocks = Tabled(blocks)

    def _renew_gradients(self) -> None:
        """Point the blocks at the gradients of this step."""
        gradients = _gradients_of(self._params)
        same = all(map(is_, gradients, self._gradients)) and not self._copied
        if same and list(map(_place_of, gradients)) == self._gradient_places:
            return
        for i, gradient in enumerate(gradients):
            self._renew_gradient(i, gradient)

    def _renew_gradient(self, i: int, gradient: Tensor) -> None:
        block = self._blocks[i]
        place, before = _place_of(gradient), self._gradient_places[i]
        if (
            place is not None
            and before is not None
            and place[1:] == before[1:]
            and i not in self._copied
            and block.row
            and gradient.dtype == block.gradient.dtype
        ):
            block.gradient = gradient.as_strided(block.gradient.shape, block.gradient.stride())
            block.row = (block.row[0], place[0], *block.row[2:])
        else:
            block.gradient, block.row = _dense_gradient(self._params[i], gradient), None
            if place is None or place[0] != block.gradient.data_ptr():
                self._copied.add(i)
            else:
                self._copied.discard(i)
        self._gradients[i], self._gradient_places[i] = gradient, place


@final
class _KeptState:
    """The tensors of one name in the optimizer's state, to detect that one was replaced or moved.

    ``states`` are the dictionaries that hold them.
    """

    def __init__(self, name: str, states: list[dict[str, Any]]) -> None:
        self._states, self._of = states, itemgetter(name)
        self._tensors: list[Tensor] = list(map(self._of, states))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def has_moved(self) -> bool:
        try:
            found = list(map(self._of, self._states))
        except KeyError:
            return True
        return (
            not all(map(is_, found, self._tensors))
            or list(map(Tensor.data_ptr, found)) != self._addresses
        )


def _gradients_of(params: Sequence[Tensor]) -> list[Tensor]:
    """Return ``param.grad``, which every layer has."""
    return cast("list[Tensor]", [param.grad for param in params])


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
    # Not the gradient itself: that could move while it stays the same object.
    return flat(in_layout_of(param, grad)) if is_dense(param) else grad.detach()


def _make_block(layer: Layer, states: States, placement: Placement | None) -> Block:
    param, group = layer.param, layer.group
    if placement is not None:
        weight, gradient = placement.block(param)
        norm_part = placement.norm_part(param)
    else:
        norm_part = (0, param.numel())
        [gradient] = _gradients_of([param])
        gradient = _dense_gradient(param, gradient)
        weight = flat(param) if is_dense(param) else param
    copy = buffer = None
    state = states[param] if is_half(param) or group["momentum"] != 0 else {}
    if is_half(param):
        copy = weight
        if "master_weight" not in state:
            state["master_weight"] = copy.float()
        weight = state["master_weight"]
        check_shape("LARS", "master_weight", weight, copy, param)
        if not torch.equal(weight.to(copy.dtype), copy):  # the parameter was edited
            weight.copy_(copy)
    if group["momentum"] != 0:
        like = param if weight.numel() == param.numel() else weight
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(like, dtype=weight.dtype)
        check_shape("LARS", "momentum_buffer", buffer, like, param)
        if buffer.stride() != like.stride() or buffer.dtype != weight.dtype:  # it was loaded
            buffer = torch.empty_like(like, dtype=weight.dtype).copy_(buffer)
        state["momentum_buffer"] = buffer
        if weight.dim() == 1:
            buffer = flat(buffer)
    block = Block(weight, gradient, buffer, copy, group, state, norm_part)
    block.check()
    return block


def check_shape(optimizer: str, name: str, found: Tensor, like: Tensor, param: Tensor) -> None:
    """Raise RuntimeError if a state that was loaded or set has the wrong shape."""
    if found.shape != like.shape:
        part = "" if like.shape == param.shape else f", of a parameter of {tuple(param.shape)},"
        raise RuntimeError(
            f"{optimizer}: {name} has shape {tuple(found.shape)}, but its weight{part} has "
            f"{tuple(like.shape)}: the state is of another model, of a parameter that was "
            f"replaced since, or of another world size"
        )
