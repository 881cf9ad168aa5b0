"""LARS, layer-wise adaptive rate scaling: the mathematics of a step.

Where gradients come from (one device, or the sum over ranks) is the placement's affair, how a step
is computed the kernel's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvd_lars.optim.blocks import is_half
from hvd_lars.optim.device_step import DeviceStep, StepReport
from hvd_lars.optim.distributed.buckets import placed_already
from hvd_lars.optim.distributed.placement import Placement
from hvd_lars.optim.groups import check_group, check_ours
from hvd_lars.optim.kernels import KernelName
from hvd_lars.optim.kernels.fused import unfold
from hvd_lars.optim.layers import layers_of, signature
from hvd_lars.runtime import torch_internals

LrPosition = Literal["momentum", "update"]
Denominator = Literal["separate", "combined"]
ZeroNorm = Literal["unit", "skip", "coast"]


@dataclass
class _Memory:
    """What a step leaves to the next one."""

    signature: list[object]
    devices: list[DeviceStep]
    state: object  # the optimizer's, which the devices' blocks are of
    state_ids: list[int]  # of its dictionaries, which the blocks keep alive


class LARS(Optimizer):
    r"""Stochastic gradient descent with momentum and one learning rate per layer.

    A layer is one parameter tensor :math:`w` with gradient :math:`g` of the whole global batch:

    .. math::
        \lambda &= l \, \lVert w \rVert_2 \,/\,
            (\lVert g \rVert_2 + \beta \lVert w \rVert_2 + \epsilon)
            \quad\text{(1 where a norm is zero)} \\
        v &\leftarrow \mu v + \gamma \lambda (g + \beta w), \qquad w \leftarrow w - v

    A step has four phases: the placement completes the reduction of the gradients; each rank sums
    squares over its part of every layer; one all-reduce completes those sums; every layer is
    updated.  Without a placement there is no first and third.  No phase copies a value from the
    device to the host.  ``report`` has the last step's norms, and whether it was left out.

    The norms cost no pass over memory where the kernel is native: sums of squares of gradients are
    taken as their reductions complete, those of weights while the step before writes them.
    Weights that somebody else edits or replaces in between are noticed and read again; an edit
    inside ``param.data``, which torch does not count, is noticed one step late, with a warning.

    Parameters of half precision have float32 masters and momentum in the optimizer's state.  An
    edit inside their ``.data`` is not noticed, and the next step undoes it: edit them under
    ``torch.no_grad()``.

    Args:
        params: parameters, or parameter groups as :func:`parameter_groups` makes them.  Every
            argument below can be set per group; a group may also hold ``adapt``: ``"own"`` (the
            default: each tensor takes its own ratio), ``"layer"`` (the ratio of another tensor,
            whose position over all groups stands in the group's ``ratio_from``) or ``"none"``
            (plain momentum SGD with rate γ).
        lr: γ, the scheduled learning rate.
        momentum: μ.
        weight_decay: β.
        trust_coefficient: l.
        eps: ε, added to the denominator.
        nesterov: look ahead by one momentum step.
        lr_position: ``"momentum"`` puts γ inside the momentum buffer as the paper does,
            ``"update"`` multiplies the buffer by γ as timm, apex and VISSL do.
        denominator: ``"separate"`` is :math:`\lVert g\rVert + \beta\lVert w\rVert`, ``"combined"``
            is :math:`\lVert g + \beta w\rVert` (optax, SimCLR, VISSL).
        trust_clip: use min(λ/γ, 1) in place of λ, so that no layer's rate exceeds γ (LARC); not of
            the 1 at a zero norm, which timm clips to 1/γ where γ > 1.
        zero_norm: ``"unit"`` uses λ = 1 where a norm is zero (paper), ``"coast"`` λ = 0, so that
            the layer moves on by its momentum alone (apex, lightly), ``"skip"`` leaves such a
            layer and its momentum as they are.
        kernel: how a step is computed: ``"native"`` (C++ on CPU), ``"fused"`` (torch's fused SGD
            on CPU), ``"eager"`` (plain torch) or ``"auto"``, the fastest there is.  They agree
            but for rounding; ranks must not mix them.
        placement: sums gradients over ranks; None for one process, or where something else does
            (``hvd.DistributedOptimizer``, DDP).

    Raises:
        ValueError: a hyper-parameter is negative, not finite or not among its choices; a
            parameter is complex or sparse.
        RuntimeError: from ``step``: a gradient is sparse, or state, gradient or parameter have
            another shape than they had or should have.

    Example:
        >>> import torch
        >>> from hvd_lars import LARS, parameter_groups
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LARS(parameter_groups(model, weight_decay=5e-4), lr=2.0)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()

    Reference:
        You, Gitman, Ginsburg 2017, arXiv 1708.03888, algorithm 1.
    """

    # Class attributes, since a copy and Horovod's DistributedOptimizer lose an instance's own.
    placement: Placement | None = None
    slots: tuple[str, ...] = ("momentum",)
    report = StepReport()  # of the last step
    _last: _Memory | None = None

    def __init__(  # noqa: PLR0913 - hyper-parameters are arguments, as of every torch optimizer
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        nesterov: bool = False,
        lr_position: LrPosition = "momentum",
        denominator: Denominator = "separate",
        trust_clip: bool = False,
        zero_norm: ZeroNorm = "unit",
        kernel: KernelName = "auto",
        placement: Placement | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "lr_position": lr_position,
            "denominator": denominator,
            "trust_clip": trust_clip,
            "zero_norm": zero_norm,
            "kernel": kernel,
            "adapt": "own",
        }
        self.placement = placement
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, after checking its hyper-parameters and tensors."""
        torch_internals.add_param_group(self, param_group)
        count = sum(len(group["params"]) for group in self.param_groups)
        try:
            check_group(param_group, count)
            if self.placement is not None:
                for param in param_group["params"]:
                    self.placement.norm_part(param)
        except ValueError:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; under a placement its flat buffers are kept and zeroed."""
        if self.placement is None:
            torch_internals.zero_grad(self, set_to_none)
        else:
            self.placement.gradients.zero()

    @overload
    def step(self, closure: None = None, loss_scale: float | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], loss_scale: float | None = None) -> float: ...

    @torch.no_grad()
    @torch_internals.uncompiled
    def step(
        self, closure: Callable[[], float] | None = None, loss_scale: float | None = None
    ) -> float | None:
        """Take one step.

        ``param.grad`` is only read here, after the placement has summed it over the ranks.

        Args:
            closure: recomputes the loss, which is then returned.
            loss_scale: factor of the loss, by which gradients are divided.  With one, be it 1, the
                step is left out on all ranks where a gradient is not finite (``report.skipped``);
                without one, gradients are neither divided nor checked.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        placement, unscale = self.placement, 1.0 / (loss_scale or 1.0)
        if placement is not None:  # 1. Gradients are summed over the ranks.
            placement.complete_parameters()
            placement.gradients.finish()
        memory = self._begin(checked=loss_scale is not None)
        devices = memory.devices
        # 2. Each rank sums squares over its part of every layer.
        sums = [device.sums_of_squares(placement, unscale) for device in devices]
        if placement is not None:  # 3. One all-reduce completes the sums.
            sums = [placement.scalars.sum(part) for part in sums]
        # 4. Every layer's trust ratio, and the update.
        found = [device.measure(part, unscale) for device, part in zip(devices, sums, strict=True)]
        layers = [device.layers for device in devices]
        self.report = StepReport(list(zip(layers, found, strict=True)), loss_scale is not None)
        for device, measured in zip(devices, found, strict=True):
            device.update(measured.ratios, unscale, self.report.finite)
        if placement is not None:
            placement.publish_parameters()
        for device in devices:
            device.end()
        memory.state_ids = self._state_ids()
        self._last = memory
        return loss

    def _begin(self, checked: bool) -> _Memory:
        """Find out what to work on; ``checked`` also takes norms that no trust ratio needs."""
        placed, last = self.placement is not None, self._last
        now = signature(self.param_groups, placed, checked)
        if last is None or last.signature != now or last.state is not self.state:
            if not placed:
                self._check_not_placed()
            if not self.state:
                _check_not_horovods_restore()
            layers = layers_of(self.param_groups, placed, checked)
            last = _Memory(now, list(map(DeviceStep, layers)), self.state, [])
        self._last = None  # until this step is complete
        same_states = self._state_ids() == last.state_ids
        for device in last.devices:
            device.begin(self.state, self.placement, same_states)
        return last

    def _state_ids(self) -> list[int]:
        return list(map(id, self.state.values()))

    def _check_not_placed(self) -> None:
        """Raise RuntimeError where a placement sums the gradients and this is not told of it."""
        params = [param for group in self.param_groups for param in group["params"]]
        if (placed := placed_already(params)) is not None:
            shape = tuple(placed.shape)
            if hasattr(self, "skip_synchronize"):
                raise RuntimeError(
                    f"hvd.DistributedOptimizer is around a LARS whose parameters, such as one of "
                    f"shape {shape}, are in a placement: both sum the gradients, leave one out"
                )
            raise RuntimeError(
                f"a parameter of shape {shape} is in a placement that its optimizer was not given: "
                f"LARS(…, placement=placement)"
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's; momentum is v, whichever kernel wrote it."""
        self.unfold_momentum()
        state: dict[str, Any] = torch_internals.state_dict(self)
        return state

    def __getstate__(self) -> dict[str, Any]:
        """For a copy and for pickle; RuntimeError under a placement, which they would lose."""
        if self.placement is not None:
            raise RuntimeError(
                "LARS with a placement cannot be copied or pickled: make a new one with a "
                "placement of its own, and give it this one's state_dict()"
            )
        state: dict[str, Any] = super().__getstate__()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but float32 state of half parameters stays float32.

        Raises ValueError where it is another optimizer's.
        """
        loaded = []  # what torch loads: a hook may have put something else in its place

        def before(_: Optimizer, state_dict: dict[str, Any]) -> None:
            check_ours(state_dict, self.defaults)
            loaded.append(state_dict)

        def after(_: Optimizer) -> None:
            self._last = None
            self._keep_precision(loaded[-1])

        # Ours is the last of the hooks before, and the first of those after.
        ours = [
            torch_internals.before_loading(self, before),
            torch_internals.after_loading(self, after, prepend=True),
        ]
        try:
            torch_internals.load_state_dict(self, state_dict)
        finally:
            for handle in ours:
                handle.remove()

    def _keep_precision(self, state_dict: dict[str, Any]) -> None:
        """Load the state of half parameters anew, which torch has rounded to their dtype."""
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for number, param in zip(numbers, params, strict=True):
            if is_half(param):
                for name, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        self.state[param][name] = value.detach().to(param.device, copy=True)

    def momentum(self, param: Tensor) -> Tensor | None:
        """Momentum v of a parameter, in its shape; None before its first step.

        Collective under a placement; the live tensor where this rank holds the whole.
        """
        state = self.state.get(param, {})
        unfold(state)
        buffer: Tensor | None = state.get("momentum_buffer")
        if buffer is None or self.placement is None:
            return buffer
        return self.placement.whole(param, buffer)

    def set_momentum(self, param: Tensor, value: Tensor) -> None:
        """Let v of a parameter be ``value``, of its shape; kept, not copied, where it is whole.

        Raises RuntimeError where it has another shape.
        """
        if value.shape != param.shape:
            raise RuntimeError(
                f"LARS: momentum of shape {tuple(value.shape)} for a parameter of "
                f"{tuple(param.shape)}"
            )
        part = value if self.placement is None else self.placement.part(param, value)
        self.state[param] = {"momentum_buffer": part}

    def slot(self, name: str, param: Tensor) -> Tensor | None:
        """:meth:`momentum`, the only slot; see :class:`~hvd_lars.optim.protocol.Optimizer`."""
        assert name in self.slots
        return self.momentum(param)

    def set_slots(self, param: Tensor, values: Mapping[str, Tensor]) -> None:
        """:meth:`set_momentum` by name."""
        self.set_momentum(param, values["momentum"])

    def unfold_momentum(self) -> None:
        """Make every ``state[param]["momentum_buffer"]`` hold v; only the fused kernel's do not."""
        for state in self.state.values():
            if isinstance(state, dict):  # a scheduler or hook may keep something of its own there
                unfold(state)


def _check_not_horovods_restore() -> None:
    """Raise RuntimeError where Horovod steps with zero gradients, to have a state to fill."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        if caller.f_code.co_name == "broadcast_optimizer_state":
            raise RuntimeError(
                "hvd.broadcast_optimizer_state takes a step with zero gradients on ranks that have "
                "no state yet, which would move their weights: a new LARS needs no broadcast; to "
                "restore one, load its state_dict() on every rank (hvd.broadcast_object sends it)"
            )
        frame = caller
