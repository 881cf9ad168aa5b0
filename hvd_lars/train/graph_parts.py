"""Which modules of a network can be CUDA graphs, and what they are called with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hvd_lars.train.precision import Precision, autocast

_LARGEST_PART = 0.25  # of the parameters, where a module can be divided


class NotCapturable(Exception):
    """The network cannot be a CUDA graph; the message says why."""


class Part(NamedTuple):
    """A module that becomes a graph, and an input of it: zeros."""

    module: nn.Module
    sample: Tensor


@dataclass
class _Call:
    """A module's part in a forward pass."""

    calls: int = 0
    plain: bool = True  # one tensor in, one out, in the surroundings of the network itself
    given: tuple[Any, ...] = ()  # size, strides and dtype of the input, whether it has a gradient
    place: int = 0  # in the order of calls
    around: frozenset[nn.Module] | None = None  # modules that ran around each of its calls


def find_parts(model: nn.Module, images: Tensor, precision: Precision, cut: bool) -> list[Part]:
    """Run forward once and return the parts in the order in which they ran.

    Args:
        model: in training mode; its buffers change.
        images: a micro-batch.
        precision: of forward.
        cut: several parts, so that the first gradients are there early; else all of it is one.

    Raises:
        NotCapturable: a part cannot be a graph.
    """
    calls = _calls_of(model, images, precision)
    parts = list(_cut(model, calls, numel(model))) if cut else [model]
    parts.sort(key=lambda part: calls[part].place)
    for part in parts:
        _check(part, calls)
    _check_shared(model, parts)
    samples = []
    for part in parts:
        size, strides, dtype, needs = calls[part].given
        zeros = torch.empty_strided(size, strides, dtype=dtype, device=images.device).zero_()
        samples.append(zeros.requires_grad_(needs))
    return list(map(Part, parts, samples))


def numel(module: nn.Module) -> int:
    """Count a module's parameters that are trained."""
    return sum(param.numel() for param in module.parameters() if param.requires_grad)


def _calls_of(model: nn.Module, images: Tensor, precision: Precision) -> dict[nn.Module, _Call]:
    calls = {module: _Call() for module in model.modules()}
    running: list[nn.Module] = []
    count = 0

    def surroundings() -> tuple[Any, ...]:
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind)
        return torch.is_autocast_enabled(kind), dtype, torch.is_grad_enabled()

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal count
        call, count = calls[module], count + 1
        call.calls, call.place = call.calls + 1, count
        around = frozenset(running)
        call.around = around if call.around is None else call.around & around
        running.append(module)
        given = arguments[0] if len(arguments) == 1 and not named else None
        if isinstance(given, Tensor) and surroundings() == usual:
            call.given = given.shape, given.stride(), given.dtype, given.requires_grad
        else:
            call.plain = False

    def after(module: nn.Module, _arguments: Any, found: Any) -> None:
        running.pop()
        if not isinstance(found, Tensor):
            calls[module].plain = False

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        with autocast(precision, images.device):
            usual = surroundings()
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _cut(model: nn.Module, calls: dict[nn.Module, _Call], total: int) -> Iterator[nn.Module]:
    """Yield the parts of a module: its children, where it is large and they are most of it.

    A layer alone gains nothing, and is left as it is.
    """
    inner, size = list(_inner(model, calls)), numel(model)
    if size > _LARGEST_PART * total and sum(map(numel, inner)) > 0.5 * size:
        for child in inner:
            yield from _cut(child, calls, total)
    else:
        yield model


def _inner(model: nn.Module, calls: dict[nn.Module, _Call]) -> Iterator[nn.Module]:
    for child in model.children():
        if not any(child.children()) or not numel(child):
            continue
        if calls[child].calls == 0:  # a list of modules, which the network calls one by one
            yield from _inner(child, calls)
        elif calls[child].calls == 1 and calls[child].plain:
            yield child


def _check(part: nn.Module, calls: dict[nn.Module, _Call]) -> None:
    if calls[part].calls != 1:
        raise NotCapturable("a part of the network is called several times")
    if not calls[part].plain:
        raise NotCapturable("the network takes or returns more than a tensor")
    for module in part.modules():
        name = type(module).__name__
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            raise NotCapturable(f"{name} has hooks, which a graph would leave out")
        around = calls[module].around
        if module is not part and around is not None and part not in around:
            raise NotCapturable(f"{name} is called inside of a part of the network and outside")


def _check_shared(model: nn.Module, parts: list[nn.Module]) -> None:
    """Raise NotCapturable if a part shares parameters with what is outside of it."""
    inside = {module for part in parts for module in part.modules()}
    groups = [list(part.parameters()) for part in parts]
    groups += [
        list(module.parameters(recurse=False)) for module in model.modules() if module not in inside
    ]
    seen: set[Tensor] = set()
    for group in groups:
        if not seen.isdisjoint(group):
            raise NotCapturable("parts of the network share parameters")
        seen.update(group)
