"""Forward and backward of a network's parts as CUDA graphs: one launch each, in place of hundreds.

A graph repeats what was captured once: the same kernels, on the same memory, for micro-batches of
one shape.  Others, and evaluation, run the network as it is.  All gradients of a graph arrive when
it ends, so that a network in one graph would overlap no reduction with backward; over several ranks
the network is therefore cut into parts.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hvd_lars.runtime.device import seed_generators
from hvd_lars.runtime.joined import is_expanded
from hvd_lars.train.graph_parts import NotCapturable, find_parts
from hvd_lars.train.precision import Precision, autocast

# Relative differences that are rounding, of outputs, buffers and gradients, tensor by tensor; and
# the norm below which a tensor is rounding itself, relative to the largest of its kind.
_TOLERANCE = {"fp32": 0.05, "bf16": 0.2, "fp16": 0.2}
_FLOOR = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-2}
_SEEDS = (1, 2)  # what a capture has frozen may be right for one

Take = Callable[[Sequence[nn.Parameter], Sequence[Tensor | None]], None]


class CaptureBroken(Exception):
    """A capture failed on its way, after which torch's allocator and generator are unusable."""


class _Results(NamedTuple):
    """What a network computes, on the host."""

    outputs: list[Tensor]
    buffers: list[Tensor]
    gradients: list[Tensor]


@final
class GraphedNetwork:
    """Computes a network's logits as the network does, for one shape from CUDA graphs.

    Args:
        model: on a GPU, in training mode; its parameters and buffers must stay where they are in
            memory.  All values, gradients and random state are left as they were.
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
        with _left_alone(model, images.device):
            parts = find_parts(model, images, precision, cut)
        self.parts = [part.module for part in parts]
        # Makes every output require a gradient; it never gets one itself.
        self._anchor = torch.zeros((), device=images.device, requires_grad=True)
        own = [self._results(model, images, precision, seed) for seed in _SEEDS]
        self._graphs = [_Graphs(part.module, part.sample) for part in parts]
        with _left_alone(model, images.device), _uncached(precision, images.device):
            _capture(self._graphs)
        for seed, wanted in zip(_SEEDS, own, strict=True):
            _compare(self._results(self, images, precision, seed), wanted, precision)
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
        before = [vars(part).get("forward") for part in self.parts]
        for part, graphs in zip(self.parts, self._graphs, strict=True):
            part.forward = self._replay(graphs)
        try:
            return self._model(images)  # type: ignore[no-any-return]
        finally:
            for part, own in zip(self.parts, before, strict=True):
                if own is None:
                    del part.forward  # the class's is there again
                else:
                    part.forward = own

    def _replay(self, graphs: _Graphs) -> Callable[[Tensor], Tensor]:
        return lambda images: _Replay.apply(self._anchor, images, graphs, self._take)  # type: ignore[no-untyped-call]

    def _results(
        self,
        network: Callable[[Tensor], Tensor],
        images: Tensor,
        precision: Precision,
        seed: int,
    ) -> _Results:
        """Run ``network``, the model or its graphs, on drawn inputs.

        The weights are moved while it runs: where a network begins with zeros, an error would be
        multiplied by them.

        Raises:
            NotCapturable: forward does what a graph does not repeat.
        """
        model, device = self._model, images.device
        params = [param for param in model.parameters() if param.requires_grad]
        taken: dict[Tensor, Tensor | None] = {}
        self._take = lambda given, found: taken.update(zip(given, found, strict=True))
        with _left_alone(model, device), _moved_weights(model, seed):
            seed_generators(seed, device)
            inputs = torch.randn_like(images)
            before = _beside_the_device(model, device)
            with autocast(precision, device):
                logits = network(inputs)
                labels = torch.zeros(len(images), dtype=torch.int64, device=device)
                loss = functional.cross_entropy(logits, labels)
            found = torch.autograd.grad(loss, [*params, self._anchor], allow_unused=True)
            after = _beside_the_device(model, device)
            for what, then in before.items():
                if after[what] != then:
                    raise NotCapturable(f"forward {what}")
            gradients = [taken.get(p, g) for p, g in zip(params, found, strict=False)]
            results = _Results(
                [_on_host(logits)],
                list(map(_on_host, model.buffers())),
                [torch.zeros(()) if g is None else _on_host(g) for g in gradients],
            )
        torch.cuda.empty_cache()  # a graph has memory of its own
        return results


class _Graphs:
    """A part's two graphs, and the memory through which they are used."""

    def __init__(self, part: nn.Module, sample: Tensor) -> None:
        self.part, self.input = part, sample
        self.params = [param for param in part.parameters() if param.requires_grad]
        self.copies = False  # its input, as the part writes into it
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.forget()

    def forget(self) -> None:
        """Let results go."""
        self.output = self.output_gradient = self.input
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
        for part in parts:
            part.forget()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a capture cannot take it back
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


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _compare(found: _Results, wanted: _Results, precision: Precision) -> None:
    """Raise NotCapturable if results differ by more than rounding."""
    for what in _Results._fields:
        pairs = [
            (a.double(), b.double())
            for a, b in zip(getattr(found, what), getattr(wanted, what), strict=True)
        ]
        floor = _FLOOR[precision] * max((float(own.norm()) for _, own in pairs), default=0.0)
        for mine, own in pairs:
            off = float((mine - own).norm()) / max(float(own.norm()), floor, 1e-30)
            if not off <= _TOLERANCE[precision]:
                raise NotCapturable(f"its {what} are off by {off:.0%} when they are repeated")


def _beside_the_device(model: nn.Module, device: torch.device) -> dict[str, object]:
    """Return what a forward pass must leave alone, as a graph does not repeat it."""
    tensors = [*model.parameters(), *model.buffers()]
    state = np.random.get_state(legacy=False)
    drawn = [random.getstate(), str(state)]
    if device.type == "cuda":
        drawn.append(torch.get_rng_state().tolist())
    return {
        "draws random numbers on the host": drawn,
        "replaces parameters or buffers": [(id(t), t.data_ptr()) for t in tensors],
    }


@contextmanager
def _moved_weights(model: nn.Module, seed: int) -> Iterator[None]:
    """Add noise to all parameters; put them back afterwards."""
    before = []
    with torch.no_grad():
        for param in model.parameters():
            generator = torch.Generator(param.device).manual_seed(seed)
            noise = torch.randn(
                param.shape, generator=generator, dtype=param.dtype, device=param.device
            )
            size = param.square().mean().sqrt()
            zeros = 0.1 if param.dim() < 2 else 0.01
            before.append(param.clone())
            param.add_(noise * torch.where(size > 0, 0.1 * size, zeros))
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in zip(model.parameters(), before, strict=True):
                param.copy_(value)


@contextmanager
def _left_alone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and the random state back afterwards."""
    buffers = [(b, b.clone()) for b in model.buffers() if not is_expanded(b)]
    on_gpu = device.type == "cuda"
    gpu = torch.cuda.get_rng_state(device) if on_gpu else None
    host = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(host[0])
        random.setstate(host[1])
        np.random.set_state(host[2])
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
