"""LARS, layer-wise adaptive rate scaling: the mathematics of a step.

The placement supplies the gradients (of one device, or summed over ranks); the kernel computes the
update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvd_lars.optim.blocks import is_half
from hvd_lars.optim.device_step import DeviceStep, StepReport, all_live
from hvd_lars.optim.distributed.placement import Placement
from hvd_lars.optim.groups import check_group, check_ours
from hvd_lars.optim.kernels import KernelName, Scale
from hvd_lars.optim.kernels.fused import unfold
from hvd_lars.optim.layers import layers_of, signature
from hvd_lars.optim.placed import PlacedOptimizer
from hvd_lars.runtime import torch_internals

LrPosition = Literal["momentum", "update"]
Denominator = Literal["separate", "combined"]
ZeroNorm = Literal["unit", "skip", "coast"]


@dataclass
class _Memory:
    """Data kept from one step to the next."""

    signature: list[object]
    devices: list[DeviceStep]
    state: object  # the optimizer state that the devices' blocks refer to
    state_ids: list[int]  # ids of its dictionaries, which the blocks keep alive


class LARS(PlacedOptimizer):
    r"""Stochastic gradient descent with momentum and one learning rate per layer.

    A layer is one parameter tensor :math:`w` with gradient :math:`g` of the whole global batch:

    .. math::
        \lambda &= l \, \lVert w \rVert_2 \,/\,
            (\lVert g \rVert_2 + \beta \lVert w \rVert_2 + \epsilon)
            \quad\text{(1 where a norm is zero)} \\
        v &\leftarrow \mu v + \gamma \lambda (g + \beta w), \qquad w \leftarrow w - v

    A step has four phases: the placement completes the reduction of the gradients; each rank sums
    squares over its part of every layer; one all-reduce completes those sums; every layer is
    updated.  Without a placement the first and third phases are absent.  No phase copies a value
    from the device to the host.  ``report`` holds the norms of the last step and whether it was
    skipped.

    With the native kernel the norms need no extra pass over memory: the squares of gradients are
    summed as their reductions complete, those of weights while the previous step writes them.
    Weights edited or replaced between steps are detected and read again; an edit through
    ``param.data``, which torch does not count, is detected one step late, with a warning.

    Half-precision parameters have float32 masters and momentum in the optimizer's state.  An edit
    through their ``.data`` is not detected, and the next step undoes it: edit them under
    ``torch.no_grad()``.

    Args:
        params: parameters, or parameter groups from :func:`parameter_groups`.  Every argument
            below but ``kernel`` and ``placement`` can be set per group; a group may also hold
            ``adapt``: ``"own"`` (default: each tensor has its own ratio), ``"layer"`` (the ratio of
            another tensor, whose position over all groups is in the group's ``ratio_from``) or
            ``"none"`` (plain momentum SGD with rate γ).
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
        trust_clip: use min(λ/γ, 1) in place of λ, so that no layer's rate exceeds γ (LARC).  The 1
            at a zero norm is not clipped; timm clips it to 1/γ if γ > 1.
        zero_norm: at a zero norm, ``"unit"`` uses λ = 1 (timm), ``"coast"`` 1 where ‖w‖ = 0 but
            0 where ‖g‖ = 0, so that the layer moves by its momentum alone (apex, lightly), and
            ``"skip"`` leaves the layer and its momentum unchanged.  The paper does not say.
        kernel: implementation of the step: ``"native"`` (C++ on CPU), ``"fused"`` (torch's fused
            SGD on CPU), ``"eager"`` (plain torch) or ``"auto"``, the fastest available.  They
            agree up to rounding; all ranks must use the same one.
        placement: sums gradients over ranks; None for one process, or if something else sums them
            (``hvd.DistributedOptimizer``, DDP).

    Raises:
        ValueError: a hyper-parameter is negative, not finite or not among its choices; a
            parameter is complex or sparse.
        RuntimeError: from ``step``: a gradient is sparse, or a state, gradient or parameter has
            the wrong shape.

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

    # Class attributes: copies and Horovod's DistributedOptimizer lose instance attributes.
    slots: tuple[str, ...] = ("momentum",)
    report = StepReport()  # of the last step
    _last: _Memory | None = None

    def __init__(  # noqa: PLR0913 - hyper-parameters are arguments, as in every torch optimizer
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

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group, sum(len(each["params"]) for each in self.param_groups))

    @overload
    def step(self, closure: None = None, loss_scale: Scale | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], loss_scale: Scale | None = None) -> float: ...

    @torch.no_grad()
    @torch_internals.uncompiled
    def step(
        self, closure: Callable[[], float] | None = None, loss_scale: Scale | None = None
    ) -> float | None:
        """Take one step.

        ``param.grad`` is only read here, after the placement has summed it over the ranks.

        Args:
            closure: recomputes the loss, which is then returned.
            loss_scale: factor of the loss, or a 0-dim float64 tensor of it on the device; gradients
                are divided by it.  If given, even as 1, all ranks skip the step if a gradient is
                not finite (``report.skipped``); if None, gradients are neither divided nor checked.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        placement = self.placement
        unscale: Scale = 1.0 if loss_scale is None else 1.0 / loss_scale
        if placement is not None:  # 1. Complete the gradients' reduction.
            placement.complete_parameters()
            placement.gradients.finish()
        memory = self._begin(checked=loss_scale is not None)
        devices = memory.devices
        # 2. Sum squares over this rank's part of every layer.
        sums = [device.sums_of_squares(placement, unscale) for device in devices]
        if placement is not None:  # 3. Complete the sums in one all-reduce.
            sums = [placement.scalars.sum(part) if len(part) else part for part in sums]
        # 4. Compute trust ratios and update every layer.
        found = [device.norms(part, unscale) for device, part in zip(devices, sums, strict=True)]
        live = None if loss_scale is None or not found else all_live(found)
        self.report = StepReport([norms.reported for norms in found], live)
        for device, norms in zip(devices, found, strict=True):
            device.update(norms, unscale, live)
        if placement is not None:
            placement.publish_parameters()
        for device in devices:
            device.end()
        self._last = memory
        return loss

    def _begin(self, checked: bool) -> _Memory:
        """Prepare the layers of this step; ``checked`` adds norms that no trust ratio needs."""
        placed, last = self.placement is not None, self._last
        now = signature(self.param_groups, placed, checked)
        if last is None or last.signature != now or last.state is not self.state:
            if not placed:
                self._check_not_placed()
            self._check_not_horovods_restore()
            layers = layers_of(self.param_groups, placed, checked)
            last = _Memory(now, list(map(DeviceStep, layers)), self.state, [])
        self._last = None  # until this step is complete
        ids = self._state_ids()
        for device in last.devices:
            device.begin(self.state, self.placement, same_states=ids == last.state_ids)
        # Only new entries: ``begin`` replaces none.
        last.state_ids = ids if len(ids) == len(self.state) else self._state_ids()
        return last

    def _state_ids(self) -> list[int]:
        return list(map(id, self.state.values()))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does; momentum is v, whichever kernel wrote it."""
        self.unfold_momentum()
        state: dict[str, Any] = torch_internals.state_dict(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, but keep the float32 state of half parameters float32.

        Raises ValueError if the state is another optimizer's.
        """
        loaded = []  # the state that torch loads, which a hook may have replaced

        def before(_: Optimizer, state_dict: dict[str, Any]) -> None:
            check_ours("LARS", state_dict, self.defaults)
            loaded.append(state_dict)

        def after(_: Optimizer) -> None:
            self._last = None
            self._keep_precision(loaded[-1])

        # Run last of the pre-hooks and first of the post-hooks.
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
        """Reload the state of half parameters, which torch has rounded to their dtype."""
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for number, param in zip(numbers, params, strict=True):
            if is_half(param):
                for name, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        self.state[param][name] = value.detach().to(param.device, copy=True)

    def momentum(self, param: Tensor) -> Tensor | None:
        """Return a parameter's momentum v in the parameter's shape; None before its first step.

        Collective under a placement.  The live tensor, not a copy, if this rank holds all of it.
        """
        state = self.state.get(param, {})
        unfold(state)
        buffer: Tensor | None = state.get("momentum_buffer")
        if buffer is None or self.placement is None:
            return buffer
        return self.placement.whole(param, buffer)

    def set_momentum(self, param: Tensor, value: Tensor | None) -> None:
        """Set a parameter's momentum v, None as before its first step.

        Not copied if this rank holds all of it.  Raises RuntimeError if ``value`` does not have the
        parameter's shape.
        """
        if value is None:
            self.state.get(param, {}).pop("momentum_buffer", None)
            return
        if value.shape != param.shape:
            raise RuntimeError(
                f"LARS: momentum of shape {tuple(value.shape)} for a parameter of "
                f"{tuple(param.shape)}"
            )
        part = value if self.placement is None else self.placement.part(param, value)
        kept = {key: v for key, v in self.state.get(param, {}).items() if key == "master_weight"}
        self.state[param] = kept | {"momentum_buffer": part.to(param.device)}

    def slot(self, name: str, param: Tensor) -> Tensor | None:
        """Return :meth:`momentum`, the only slot of this optimizer."""
        assert name in self.slots
        return self.momentum(param)

    def new_slot(self, name: str, param: Tensor) -> Tensor:
        """Return zeros in the parameter's shape."""
        return torch.zeros_like(param)

    def set_slots(self, param: Tensor, values: Mapping[str, Tensor]) -> None:
        """Set the momentum, the only slot of this optimizer.

        A half parameter's float32 master begins anew from it, as in another process.
        """
        self.state.pop(param, None)
        self.set_momentum(param, values["momentum"])

    def unfold_momentum(self) -> None:
        """Make every ``state[param]["momentum_buffer"]`` hold v; the fused kernel scales it."""
        for state in self.state.values():
            if isinstance(state, dict):  # schedulers and hooks may store their own entries there
                unfold(state)
