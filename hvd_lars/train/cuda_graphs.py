"""Forward and backward of a network's parts as CUDA graphs: one launch each, in place of hundreds.

A graph repeats what was captured once: the same kernels, on the same memory, for micro-batches of
one shape.  Others, and evaluation, run the network as it is.  All gradients of a graph arrive when
it ends, so that a network in one graph would overlap no reduction with backward; over several ranks
the network is therefore cut into parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hvd_lars.runtime.device import seed_generators
from hvd_lars.train.precision import Precision, autocast

_LARGEST_PART = 0.25  # of the parameters, if the network is cut
_TOLERANCE = {"fp32": 0.01, "bf16": 0.05, "fp16": 0.05}  # of outputs and gradients, relative

Take = Callable[[Sequence[nn.Parameter], Sequence[Tensor | None]], None]


class NotCapturable(Exception):
    """The network cannot be a CUDA graph; the message says why."""


class CaptureBroken(Exception):
    """A capture failed on its way, after which torch's allocator and generator are unusable."""


@final
class GraphedNetwork:
    """Computes a network's logits as the network does, for one shape from CUDA graphs.

    Args:
        model: on a GPU, in training mode; its parameters and buffers must stay where they are in
            memory.  Buffers, gradients and random state are left as they were.
        images: a micro-batch, (batch, 3, height, width), of the memory format of all others.
        precision: of forward.
        take: called in backward with a graph's parameters and their gradients, which the next
            backward overwrites, such as ``placement.gradients.take``.
        cut: make several graphs of it.

    Attributes:
        parts: the modules that are graphs.

    Raises:
        NotCapturable: it does what a graph cannot, or a graph's results differ from its own.
        CaptureBroken: this process can no longer use the GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        precision: Precision,
        take: Take,
        cut: bool = False,
    ) -> None:
        self._model, self._shape, self._strides = model, images.shape, images.stride()
        calls = _calls_of(model, images, precision)
        parts = list(_cut(model, calls, _numel(model))) if cut else [model]
        self.parts = sorted(parts, key=lambda part: calls[part].place)
        for part in self.parts:
            _check(part, calls[part])
        _check_shared(model, self.parts)
        # Makes every output require a gradient; it never gets one itself.
        self._anchor = torch.zeros((), device=images.device, requires_grad=True)
        self._graphs = [_Graphs(part, calls[part].sample) for part in self.parts]
        with _left_alone(model, images.device), _uncached(precision, images.device):
            _capture(self._graphs)
        with _left_alone(model, images.device):
            self._compare(images, precision)
        torch.cuda.empty_cache()  # what running without graphs has taken
        self._take = take

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, classes)."""
        if (
            images.shape != self._shape
            or images.stride() != self._strides
            or not self._model.training
            or not torch.is_grad_enabled()
        ):
            return self._model(images)  # type: ignore[no-any-return]
        for part, graphs in zip(self.parts, self._graphs, strict=True):
            part.forward = self._replay(graphs)  # in place of the class's
        try:
            return self._model(images)  # type: ignore[no-any-return]
        finally:
            for part in self.parts:
                del part.forward

    def _replay(self, graphs: _Graphs) -> Callable[[Tensor], Tensor]:
        return lambda images: _Replay.apply(self._anchor, images, graphs, self._take)  # type: ignore[no-untyped-call]

    def _compare(self, images: Tensor, precision: Precision) -> None:
        """Raise NotCapturable if outputs or gradients are not the network's, for new inputs."""
        params = [param for param in self._model.parameters() if param.requires_grad]
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        graphed: dict[Tensor, Tensor | None] = {}
        self._take = lambda given, found: graphed.update(zip(given, found, strict=True))
        for seed in (1, 2):  # what a capture has frozen is right for the first
            results = []
            seed_generators(seed, images.device)
            inputs = torch.randn_like(images)
            for network in (self._model, self):
                graphed.clear()
                seed_generators(seed, images.device)
                with autocast(precision, images.device):
                    logits = network(inputs)
                    loss = functional.cross_entropy(logits, labels)
                found = torch.autograd.grad(loss, [*params, self._anchor], allow_unused=True)
                gradients = [graphed.get(p, g) for p, g in zip(params, found, strict=False)]
                results.append([_copy(logits), *map(_copy, gradients)])
            own, ours = results
            for what, wanted, given in (
                ("outputs", own[:1], ours[:1]),
                ("gradients", own[1:], ours[1:]),
            ):
                off = _distance(given, wanted)
                if not off <= _TOLERANCE[precision]:
                    raise NotCapturable(f"its {what} are off by {off:.1%} when they are repeated")


@dataclass
class _Call:
    """A module's part in a forward pass."""

    calls: int = 0
    plain: bool = True  # always one tensor in, and one out
    sample: Tensor = field(default_factory=lambda: torch.empty(0))  # as its input, zeros
    place: int = 0  # in the order of calls


class _Graphs:
    """A part's two graphs, and the memory through which they are used."""

    def __init__(self, part: nn.Module, sample: Tensor) -> None:
        self.part, self.input = part, sample
        self.params = [param for param in part.parameters() if param.requires_grad]
        self.copies = False  # its input, as the part writes into it
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.output = self.output_gradient = sample
        self.input_gradient: Tensor | None = None
        self.gradients: tuple[Tensor | None, ...] = ()

    def run_forward(self) -> None:
        """Compute the output."""
        self.output = self.part(self.input.clone() if self.copies else self.input)

    def run_backward(self) -> None:
        """Compute the gradients from that of the output."""
        needs = self.input.requires_grad
        found = torch.autograd.grad(
            self.output,
            [self.input, *self.params] if needs else self.params,
            self.output_gradient,
            allow_unused=True,
        )
        self.input_gradient = found[0] if needs else None
        self.gradients = found[needs:]


class _Replay(torch.autograd.Function):
    """Replays a part's graphs as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, images: Tensor, graphs: _Graphs, take: Take) -> Tensor:
        graphs.input.copy_(images)
        graphs.forward.replay()
        ctx.graphs, ctx.take = graphs, take
        return graphs.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        graphs = ctx.graphs
        graphs.output_gradient.copy_(gradient)
        graphs.backward.replay()
        ctx.take(graphs.params, graphs.gradients)
        inner = graphs.input_gradient
        return None, None if inner is None else inner.detach(), None, None


def _capture(parts: list[_Graphs]) -> None:
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def into(graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        # Other threads may use the GPU: Horovod's, and the one that moves batches there.
        return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")

    with warnings.catch_warnings():
        # That the watch for waits is a prototype; and that gradients are computed on another
        # stream than the one on which the placement registered its hooks, as they must be.
        warnings.simplefilter("ignore")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for part in parts:
                _rehearse(part)
        torch.cuda.synchronize()
        try:  # in the order in which they will run, as they share memory
            for part in parts:
                with into(part.forward):
                    part.run_forward()
                part.output_gradient = torch.zeros_like(part.output)
            for part in reversed(parts):
                with into(part.backward):
                    part.run_backward()
                # Without what autograd knows of it, or other passes would wait for this stream.
                part.output = part.output.detach()
        except Exception as error:  # whatever the network, torch or the driver may raise
            raise CaptureBroken(_first_line(error)) from None


def _rehearse(part: _Graphs) -> None:
    """Run a part as it will be captured; what fails here does no harm yet.

    Raises:
        NotCapturable: the part waits for the GPU.
    """
    inputs = part.input.detach()
    before = inputs._version
    with torch.no_grad():
        part.part(inputs)
    part.copies = inputs._version != before
    try:
        for mode in ("default", "default", "error"):  # libraries wait when they are first used
            torch.cuda.set_sync_debug_mode(mode)
            part.run_forward()
            part.output_gradient = torch.zeros_like(part.output)
            part.run_backward()
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
    """Yield the parts of a module: its children, where it is large and they are most of it.

    A layer alone gains nothing, and is left as it is.
    """
    inner = [
        child
        for child in model.children()
        if any(child.children()) and calls[child].calls == 1 and calls[child].plain
        and _numel(child)
    ]  # fmt: skip
    size = _numel(model)
    if size > _LARGEST_PART * total and sum(map(_numel, inner)) > 0.5 * size:
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


def _check_shared(model: nn.Module, parts: list[nn.Module]) -> None:
    """Raise NotCapturable if a part shares parameters with what is outside of it."""
    owners: dict[Tensor, int] = {}
    inside = {module for part in parts for module in part.modules()}
    groups = [list(part.parameters()) for part in parts]
    groups += [
        list(module.parameters(recurse=False)) for module in model.modules() if module not in inside
    ]
    for group in groups:
        for param in group:
            owners[param] = owners.get(param, 0) + 1
    if max(owners.values(), default=1) > 1:
        raise NotCapturable("parts of the network share parameters")


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


def _numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters() if param.requires_grad)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().clone()


def _distance(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """The norm of the differences, relative to that of ``wanted``; missing ones are zero."""
    off = size = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a is not None or b is not None:
            mine, own = (0.0 if x is None else x.double() for x in (a, b))
            off += float((mine - own).square().sum())  # type: ignore[union-attr]
            size += 0.0 if b is None else float(b.double().square().sum())
    return float((off / max(size, 1e-30)) ** 0.5)
