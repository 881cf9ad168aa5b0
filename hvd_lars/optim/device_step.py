"""The phases of a LARS step on the layers of one device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import is_
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from hvd_lars.optim.blocks import Blocks, States
from hvd_lars.optim.distributed.placement import Placement
from hvd_lars.optim.kernels import Block, Kernel, RatioInputs, Scale, choose_kernel
from hvd_lars.optim.kernels.block import Tabled
from hvd_lars.optim.kernels.fused import unfold_all
from hvd_lars.optim.layers import DeviceLayers
from hvd_lars.optim.norms import all_finite
from hvd_lars.optim.ratios import KeptConstants, LayerConstants, trust_ratios
from hvd_lars.runtime.readback import Constant
from hvd_lars.runtime.torch_internals import versions_of


class Measured(NamedTuple):
    """Norms and trust ratios of a step, all float64 on their device.

    Attributes:
        ratios: λ of every layer, (layers,); 1 for a layer without a ratio.
        weights: ‖w‖ of the layers in ``DeviceLayers.sources``, (sources,).
        gradients: ‖g‖ of the same layers, or ‖g + βw‖.
    """

    ratios: Tensor
    weights: Tensor
    gradients: Tensor


@final
class Norms:
    """The norms of a step on one device, and λ from them, computed when they are read.

    Triton's kernel computes λ itself: then nothing here runs before somebody asks.

    Args:
        layers: the layers.
        sums: (2 × sources,) float64, sums of squares of the weights, then of the gradients.
        factor: of the gradients' norms; 1.0 if the sums include it.
        constants: of the sources.
        one: (1,) float64, 1.
    """

    def __init__(
        self,
        layers: DeviceLayers,
        sums: Tensor,
        factor: Scale,
        constants: LayerConstants,
        one: Tensor,
    ) -> None:
        self._layers, self._sums, self._one = layers, sums, one
        self._factor, self._constants = factor, constants
        self._is_scaled = not (isinstance(factor, float) and factor == 1.0)
        self.inputs: RatioInputs | None = None
        if any(group["trust_clip"] for group in layers.groups):
            _ = self.measured  # now, of this step's γ
        else:
            self.inputs = RatioInputs(sums, constants.rows, layers.source_of, self._is_scaled)

    @property
    def values(self) -> Tensor:
        """λ of every layer, (layers,) float64."""
        return self.measured.ratios

    @property
    def reported(self) -> tuple[DeviceLayers, Callable[[], Measured]]:
        """What :class:`StepReport` takes."""
        return self._layers, lambda: self.measured

    @property
    def finite(self) -> Tensor:
        """Whether all gradients' norms are finite, a 0-dim bool on the device."""
        squares = self._sums[len(self._layers.sources) :]
        return all_finite(squares * self._factor if self._is_scaled else squares)

    @cached_property
    def measured(self) -> Measured:
        """The values."""
        layers, one = self._layers, self._one
        if not layers.sources:
            return Measured(one.expand(len(layers.layers)), one[:0], one[:0])
        weights, gradients = self._sums.sqrt().chunk(2)
        if self._is_scaled:
            gradients = gradients * self._factor
        own = trust_ratios(layers.groups, layers.group_of, weights, gradients, self._constants)
        if layers.own is not None:
            return Measured(torch.where(layers.own, own, one), weights, gradients)
        return Measured(torch.cat([own, one])[layers.ratio_of], weights, gradients)


def all_live(devices: Sequence[Norms]) -> Tensor:
    """Return whether the gradients' norms of all devices are finite, a 0-dim bool."""
    first, *others = (norms.finite for norms in devices)
    for each in others:
        first = first.to(each.device) & each
    return first


@final
class DeviceStep:
    """The step on one device; keeps the weights' sums of squares from step to step.

    Call ``begin``, ``sums_of_squares``, ``norms``, ``update`` and ``end`` in that order.
    """

    def __init__(self, layers: DeviceLayers) -> None:
        self.layers = layers
        self._params = [layer.param for layer in layers.layers]
        self._blocks = Blocks(layers.layers)
        self._current: Sequence[Block] = []
        self._kernel: Kernel | None = None  # of the last step
        self._one, self._constants = Constant(), KeptConstants()
        self._gradients: Tabled[Tensor] = Tabled()
        # Sums of squares of this rank's parts, (layers,) float64; None if unknown.
        self.weight_sums: Tensor | None = None
        self._known: Tensor | None = None  # the same, if still valid in this step
        self._versions: list[int] = []

    def begin(self, states: States, placement: Placement | None, same_states: bool) -> None:
        """Choose the kernel and collect the memory that it works on.

        Args:
            states: the optimizer's state; missing state is created.
            placement: sums the gradients; None for one process.
            same_states: no dictionary in ``states`` was replaced since the last step.

        Raises:
            ValueError: the kernel does not run on this device.
            RuntimeError: a state or gradient differs in shape from its parameter, or is sparse.
        """
        untouched = versions_of(self._params) == self._versions and self._blocks.in_place()
        self._known = self.weight_sums if untouched else None
        before = self._kernel, self._current
        kernel = choose_kernel(self.layers.layers[0].group["kernel"], self.layers.device.type)
        self._current = self._blocks.current(states, placement, untouched, same_states)
        new = before[0] is not kernel or before[1] is not self._current
        if new and kernel.name != "fused":  # their momentum may still be folded
            unfold_all(block.state for block in self._current)
        self._kernel = kernel

    def sums_of_squares(self, placement: Placement | None, unscale: Scale) -> Tensor:
        """Return sums of squares over this rank's parts: (2 × sources,) float64.

        The sources' weights come first, then their gradients.  ``unscale`` is the factor of the
        gradients; only the sums for combined denominators include it.
        """
        if not self.layers.sources:
            return torch.zeros(0, dtype=torch.float64, device=self.layers.device)
        sources = [self._current[i] for i in self.layers.sources]
        combined, gradients, used = self._is_combined(), None, self._kernel
        assert used is not None
        if placement is not None and placement.early is not None:
            kernel = None if combined else used
            gradients = placement.early.take(self.layers.adapted, placement.gradients, kernel)
        if gradients is None:
            if placement is None and not combined:  # whole: saves a call per layer
                gradients = used.sums_of_squares(self._whole_gradients(sources))
            else:
                parts = [_gradient(block, unscale, combined) for block in sources]
                gradients = used.sums_of_squares(parts)
        if self._known is None:
            weights = used.sums_of_squares([_norm_part(block, block.weight) for block in sources])
        else:
            places = self.layers.places
            weights = self._known if places is None else self._known[places]
        return torch.cat([weights, gradients])

    def _whole_gradients(self, sources: Sequence[Block]) -> Tabled[Tensor]:
        """Return the gradients, in the list of the last step if none has moved.

        The kernel's tables go with it, so that a captured CUDA graph keeps them.
        """
        now = [block.gradient for block in sources]
        if len(now) != len(self._gradients) or not all(map(is_, now, self._gradients)):
            self._gradients = Tabled(now)
        return self._gradients

    def norms(self, sums: Tensor, unscale: Scale) -> Norms:
        """Return norms and every layer's λ from the sums over all ranks."""
        layers, factor = self.layers, 1.0 if self._is_combined() else unscale
        constants = self._constants.of(layers.groups, layers.group_of)
        return Norms(layers, sums, factor, constants, self._one.of((1.0,), layers.device))

    def update(self, norms: Norms, unscale: Scale, live: Tensor | None) -> None:
        """Update every layer in place, or none if ``live``, a 0-dim bool, is False."""
        assert self._kernel is not None
        sums = self._kernel.update(self._current, norms, unscale, live)
        self.weight_sums = _kept_sums(self.weight_sums, sums, self._known)

    def end(self) -> None:
        """Record the parameters' versions; call after the placement has published them."""
        self._versions = versions_of(self._params)

    def _is_combined(self) -> bool:
        """Return whether any denominator is ‖g + βw‖, whose sums need unscaled gradients."""
        return any(map(_is_combined, self.layers.groups))


def _is_combined(group: dict[str, Any]) -> bool:
    return bool(group["denominator"] == "combined" and group["weight_decay"] != 0)


def _norm_part(block: Block, tensor: Tensor) -> Tensor:
    begin, end = block.norm_part
    return tensor if end - begin == tensor.numel() else tensor[begin:end]


def _gradient(block: Block, unscale: Scale, combined: bool) -> Tensor:
    """Return this rank's part of g, or of g + βw with g unscaled, for the denominator."""
    gradient = _norm_part(block, block.gradient)
    if not combined:
        return gradient
    gradient = gradient.to(block.weight.dtype) * unscale
    if _is_combined(block.group):
        gradient.add_(_norm_part(block, block.weight), alpha=block.group["weight_decay"])
    return gradient


def _kept_sums(
    memory: Tensor | None, sums: tuple[Tensor | None, Tensor] | None, known: Tensor | None
) -> Tensor | None:
    """Return the weights' sums after an update, written into ``memory`` if there is any.

    The memory must stay the same: each replay of a CUDA graph reads the previous replay's sums.
    """
    if sums is None:
        return None
    before, after = sums
    if (
        before is not None
        and known is not None
        and not torch.allclose(before, known, rtol=0.0, atol=0.0, equal_nan=True)
    ):
        warnings.warn(
            "weights were edited through .data between two steps: this step computed its trust "
            "ratios from the norms before the edit",
            RuntimeWarning,
            stacklevel=5,
        )
    return after if memory is None else memory.copy_(after)


class LayerNorms(NamedTuple):
    """A layer's ‖w‖ before the step, ‖g‖ (‖g + βw‖ if the denominator is combined), λ and γλ."""

    param: Tensor
    weight: float
    gradient: float
    ratio: float
    rate: float


@final
class StepReport:
    """A step's norms and whether it was skipped; stays on the device until read.

    Args:
        found: layers and what computes their norms, by device.
        finite: 0-dim bool, False if the step was skipped; None if it was not checked.
    """

    def __init__(
        self,
        found: Sequence[tuple[DeviceLayers, Callable[[], Measured]]] = (),
        finite: Tensor | None = None,
    ) -> None:
        self._found, self.finite = found, finite

    @property
    def skipped(self) -> bool:
        """Whether the step was skipped; waits for the device."""
        return self.finite is not None and not bool(self.finite)

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the layers whose norms were computed."""
        return [group for layers, _ in self._found for group in layers.groups]

    def first_nonfinite(self) -> Tensor | None:
        """Return the first parameter with a non-finite gradient norm; waits for the device."""
        for layers, measure in self._found:
            bad = measure().gradients.isfinite().logical_not().nonzero()
            if len(bad):
                return layers.adapted[int(bad[0])]
        return None

    def norms(self) -> list[LayerNorms]:
        """Return the computed norms and trust ratios; waits for the device.

        They cover the layers with a trust ratio, or all layers if the step had a ``loss_scale``,
        and cost no pass over memory.
        """
        rows = []
        for layers, measure in self._found:
            ratios, weights, gradients = (each.tolist() for each in measure())
            for i, source in enumerate(layers.sources):
                layer, ratio = layers.layers[source], ratios[source]
                rate = ratio * float(layer.group["lr"])
                rows.append(LayerNorms(layer.param, weights[i], gradients[i], ratio, rate))
        return rows
