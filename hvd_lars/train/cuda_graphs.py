"""Forward and backward of a network's parts as CUDA graphs: one launch each, in place of hundreds.

A graph repeats what was captured once: the same kernels, on the same memory, for micro-batches of
one shape.  Others, and evaluation, run the network as it is.  All gradients of a graph arrive when
it ends, so that a network in one graph would overlap no reduction with backward; over several ranks
the network is therefore cut into parts.

Source:
    ``torch.cuda.make_graphed_callables``, which captures and replays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvd_lars.runtime.device import seed_generators
from hvd_lars.train.precision import Precision, autocast

_LARGEST_PART = 0.25  # of the parameters, if the network is cut
_TOLERANCE = {"fp32": 0.01, "bf16": 0.05, "fp16": 0.05}  # of outputs and gradients, relative


class NotCapturable(Exception):
    """The network cannot be a CUDA graph; the message says why."""


class CaptureBroken(Exception):
    """A capture failed on its way, after which torch's allocator and generator are unusable."""


@dataclass
class _Call:
    """A module's part in a forward pass."""

    calls: int = 0
    plain: bool = True  # always one tensor in, and one out
    sample: Tensor = field(default_factory=lambda: torch.empty(0))  # as its input, zeros
    place: int = 0  # in the order of calls


@final
class GraphedNetwork:
    """Computes a network's logits as the network does, for one shape from CUDA graphs.

    Args:
        model: on a GPU, in training mode; its parameters and buffers must stay where they are in
            memory.  Buffers, gradients and random state are left as they were.
        images: a micro-batch, (batch, 3, height, width), of the memory format of all others.
        precision: of forward.
        cut: make several graphs of it.

    Attributes:
        parts: the modules that are graphs.

    Raises:
        NotCapturable: it does what a graph cannot, or a graph's results differ from its own.
        CaptureBroken: this process can no longer use the GPU.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, precision: Precision, cut: bool = False
    ) -> None:
        self._model, self._shape, self._strides = model, images.shape, images.stride()
        calls = _calls_of(model, images, precision)
        self.parts = list(_cut(model, calls, _parameters(model))) if cut else [model]
        self.parts.sort(key=lambda part: calls[part].place)
        for part in self.parts:
            _check(part, calls[part])
        samples = [calls[part].sample for part in self.parts]
        with _left_alone(model, images.device), _uncached(precision, images.device):
            self._graphs = _captured(list(map(_Wrapped, self.parts)), samples)
        with _left_alone(model, images.device):
            self._compare(images, precision)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, classes)."""
        if (
            images.shape != self._shape
            or images.stride() != self._strides
            or not self._model.training
            or not torch.is_grad_enabled()
        ):
            return self._model(images)  # type: ignore[no-any-return]
        for part, graph in zip(self.parts, self._graphs, strict=True):
            part.forward = graph  # in place of the class's
        try:
            return self._model(images)  # type: ignore[no-any-return]
        finally:
            for part in self.parts:
                del part.forward

    def _compare(self, images: Tensor, precision: Precision) -> None:
        """Raise NotCapturable if outputs or gradients are not the network's, for new inputs."""
        params = [param for param in self._model.parameters() if param.requires_grad]
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        for seed in (1, 2):  # what a capture has frozen is right for the first
            found: list[list[Tensor]] = []
            inputs = None
            for network in (self._model, self):
                seed_generators(seed, images.device)
                inputs = torch.randn_like(images) if inputs is None else inputs
                seed_generators(seed, images.device)
                with autocast(precision, images.device):
                    logits = network(inputs)
                    loss = functional.cross_entropy(logits, labels)
                gradients = torch.autograd.grad(loss, params, allow_unused=True)
                found.append([logits, *(g for g in gradients if g is not None)])
                found[-1] = [tensor.detach().float().clone() for tensor in found[-1]]
            wanted, graphed = found
            if list(map(Tensor.numel, wanted)) != list(map(Tensor.numel, graphed)):
                raise NotCapturable("some parameters get no gradient from the graph")
            for what, mine, own in (
                ("outputs", graphed[:1], wanted[:1]),
                ("gradients", graphed[1:], wanted[1:]),
            ):
                off = _distance(mine, own)
                if not off <= _TOLERANCE[precision]:
                    raise NotCapturable(f"its {what} are off by {off:.1%} when they are repeated")


class _Wrapped(nn.Module):
    """A part as a module of its own, which ``make_graphed_callables`` changes in its place."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.copies = False  # its input, as it writes into it

    def forward(self, images: Tensor) -> Tensor:
        return self.part(images.clone() if self.copies else images)  # type: ignore[no-any-return]


def _captured(wrapped: list[_Wrapped], samples: list[Tensor]) -> list[Callable[[Tensor], Tensor]]:
    with warnings.catch_warnings():
        # That the GPU's watch is a prototype; and that gradients are computed on another stream
        # than the one on which the placement's hooks were registered, as they must be.
        warnings.simplefilter("ignore")
        for part, sample in zip(wrapped, samples, strict=True):
            _rehearse(part, sample)
        inputs = tuple((sample,) for sample in samples)
        try:
            torch.cuda.make_graphed_callables(tuple(wrapped), inputs, allow_unused_input=True)
        except Exception as error:  # whatever the network, torch or the driver may raise
            raise CaptureBroken(_first_line(error)) from None
    return [part.forward for part in wrapped]


def _rehearse(part: _Wrapped, sample: Tensor) -> None:
    """Run a part as it will be captured; what fails here does no harm yet.

    Raises:
        NotCapturable: the part waits for the GPU.
    """
    inputs = sample.detach()
    before = inputs._version
    with torch.no_grad():
        part(inputs)
    part.copies = inputs._version != before
    params = [param for param in part.parameters() if param.requires_grad]
    try:
        for mode in ("default", "error"):  # libraries wait when they are first used
            torch.cuda.set_sync_debug_mode(mode)
            found = part(sample)
            torch.autograd.grad(found, params, torch.zeros_like(found), allow_unused=True)
    except RuntimeError as error:
        why = _first_line(error)
        raise NotCapturable(
            "it waits for the GPU" if "synchronizing CUDA operation" in why else why
        ) from None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _check(part: nn.Module, call: _Call) -> None:
    if call.calls != 1 or not call.plain:
        raise NotCapturable(
            "the network takes or returns more than a tensor"
            if call.calls == 1
            else "a part of the network is called several times"
        )
    for module in part.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise NotCapturable(f"{type(module).__name__} has hooks, which a graph would leave out")


def _cut(model: nn.Module, calls: dict[nn.Module, _Call], total: int) -> Iterator[nn.Module]:
    """Yield the parts of a module: its children, where it is large and they can be parts.

    A layer alone gains nothing, and is left as it is.
    """
    inner = [
        child
        for child in model.children()
        if any(child.children()) and calls[child].calls == 1 and calls[child].plain
        and _parameters(child)
    ]  # fmt: skip
    if inner and _parameters(model) > _LARGEST_PART * total:
        for child in inner:
            yield from _cut(child, calls, total)
    else:
        yield model


def _calls_of(model: nn.Module, images: Tensor, precision: Precision) -> dict[nn.Module, _Call]:
    """Run forward once and return how each module was called."""
    calls = {module: _Call() for module in model.modules()}
    count = 0

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal count
        call, count = calls[module], count + 1
        call.calls, call.place = call.calls + 1, count
        if named or len(arguments) != 1 or not isinstance(arguments[0], Tensor):
            call.plain = False
        else:
            (given,) = arguments
            call.sample = torch.zeros_like(given).requires_grad_(given.requires_grad)

    def after(module: nn.Module, _arguments: Any, found: Any) -> None:
        if not isinstance(found, Tensor):
            calls[module].plain = False

    handles = []
    for module in model.modules():
        if any(module.children()) or module is model:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        with _left_alone(model, images.device), autocast(precision, images.device):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _left_alone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and the random state back afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    on_gpu = device.type == "cuda"
    host, gpu = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def _uncached(precision: Precision, device: torch.device) -> Iterator[None]:
    """As :func:`autocast`; a weight's cast is captured in every graph that uses it."""
    enabled = torch.is_autocast_cache_enabled()
    with autocast(precision, device):
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(enabled)


def _parameters(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters() if param.requires_grad)


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of the differences, relative to that of ``wanted``."""
    off = torch.stack([(a - b).square().sum() for a, b in zip(found, wanted, strict=True)])
    size = torch.stack([tensor.square().sum() for tensor in wanted])
    return float((off.sum() / size.sum().clamp_min(1e-30)).sqrt())
