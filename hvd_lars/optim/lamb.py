"""LAMB, layer-wise adaptive moments for batch training, over the same placements as LARS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_lars.optim.blocks import check_shape
from hvd_lars.optim.device_step import Measured, StepReport
from hvd_lars.optim.distributed.placement import Placement
from hvd_lars.optim.groups import CHOICES, check_ours
from hvd_lars.optim.kernels import Scale
from hvd_lars.optim.layers import DeviceLayers, layers_of, signature
from hvd_lars.optim.norms import all_finite, flat, in_layout_of, is_dense, sums_of_squares
from hvd_lars.optim.placed import PlacedOptimizer
from hvd_lars.runtime import torch_internals
from hvd_lars.runtime.joined import by_kind


class _Part(NamedTuple):
    """This rank's part of a parameter: (n,) in memory order, or the parameter's own shape.

    ``steps`` is 0-dim float64.
    """

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor  # shared by parameters that have taken the same steps
    norm_part: slice | None  # elements whose squares this rank sums; None for all

    def normed(self, tensor: Tensor) -> Tensor:
        return tensor if self.norm_part is None else tensor[self.norm_part]


class LAMB(PlacedOptimizer):
    r"""Adam whose update is rescaled, layer by layer, to the norm of the weights.

    A layer is one parameter tensor :math:`w` with gradient :math:`g` of the whole global batch:

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \beta w \\
        w &\leftarrow w - \gamma \, \frac{\phi(\lVert w \rVert)}{\lVert u \rVert} \, u
            \quad\text{(ratio 1 where a norm is zero)}

    Under a placement gradients are summed over the ranks, each rank updates its part, and two
    all-reduces complete the squared norms: of the gradients first, then of weights and updates.
    Norms are those of a single device.  No value is copied from the device to the host.

    Args:
        params: parameters, or groups from :func:`parameter_groups`; all on one device, float32 or
            float64.  A group's ``adapt`` is as in :class:`LARS`.
        lr: γ, the scheduled learning rate.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: β.
        bias_correction: divide the moments by 1 − β₁ᵗ and 1 − β₂ᵗ.
        grad_averaging: weigh a gradient in m by 1 − β₁; otherwise by 1.
        max_grad_norm: gradients are divided by their global norm over this, where that exceeds 1;
            None never; the same in all groups.  NVIDIA's and timm's code use 1, the paper none.
        trust_clip: use min(ratio, 1).
        max_weight_norm: φ(z) = min(z, this); infinity for φ(z) = z.
            cybertronai's pytorch-lamb uses 10.
        placement: sums gradients over ranks; None for one process.

    Raises:
        ValueError: a hyper-parameter is out of range, or a parameter is of another dtype or device.

    Reference:
        You et al. 2020, arXiv 1904.00962, algorithm 2.
    """

    slots: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "steps")
    report = StepReport()  # of the last step
    # Class attributes: copies and Horovod's DistributedOptimizer lose instance attributes.
    _known: tuple[list[object], DeviceLayers] | None = None

    def __init__(  # noqa: PLR0913 - hyper-parameters are arguments, as in every torch optimizer
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = None,
        trust_clip: bool = False,
        max_weight_norm: float = math.inf,
        placement: Placement | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
            "trust_clip": trust_clip,
            "max_weight_norm": max_weight_norm,
            "adapt": "own",
        }
        self.placement = placement
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        _check_group(group, self.param_groups)

    @torch.no_grad()
    @torch_internals.uncompiled
    def step(self, closure: None = None, loss_scale: Scale | None = None) -> None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: not supported.
            loss_scale: factor of the loss, or a 0-dim float64 tensor of it on the device; gradients
                are divided by it.  If given, even as 1, all ranks skip the step if a gradient is
                not finite (``report.skipped``).
        """
        if closure is not None:
            raise ValueError("LAMB takes no closure")
        placement, unscale = self.placement, 1.0 if loss_scale is None else 1.0 / loss_scale
        if placement is not None:
            placement.complete_parameters()
            placement.gradients.finish()
        layers = self._layers()
        if layers is None:
            self.report = StepReport()
            return
        parts = [self._part(layer.param) for layer in layers.layers]
        squares = self._summed(sums_of_squares([p.normed(p.gradient) for p in parts]))
        gradient_norms = squares.sqrt() * unscale
        live = None if loss_scale is None else all_finite(gradient_norms)
        factor = torch.ones_like(gradient_norms[0]) * unscale
        if (largest := self.param_groups[0]["max_grad_norm"]) is not None:
            excess = gradient_norms.square().sum().sqrt() / largest
            factor = factor / excess.clamp_min(1.0)
        updates = self._updates(layers, parts, factor, live)
        ours = [p.normed(p.weight) for p in parts]
        ours += [p.normed(u) for u, p in zip(updates, parts, strict=True)]
        weight_norms, update_norms = self._summed(sums_of_squares(ours)).sqrt().chunk(2)
        ratios = _ratios(layers, weight_norms, update_norms)
        measured = Measured(ratios, weight_norms, gradient_norms)
        self.report = StepReport([(layers, lambda: measured)], live)
        rates = [float(layer.group["lr"]) for layer in layers.layers]
        for members in by_kind(updates):
            moved, dtype = [updates[i] for i in members], updates[members[0]].dtype
            scales = ratios.to(dtype).unbind()  # indexing by a list would wait for the device
            torch._foreach_mul_(moved, [scales[i] for i in members])
            torch._foreach_mul_(moved, [rates[i] for i in members])
            torch._foreach_sub_([parts[i].weight for i in members], moved)
        if placement is not None:
            placement.publish_parameters()

    def _layers(self) -> DeviceLayers | None:
        """Return the layers with a gradient, None if there are none."""
        placed = self.placement is not None
        now = signature(self.param_groups, placed, True)
        if self._known is None or self._known[0] != now:
            if not placed:
                self._check_not_placed()
            self._check_not_horovods_restore()
            found = layers_of(self.param_groups, placed, True)
            if not found:
                return None
            self._known = (now, found[0])
            self._share_counts(found[0])
        return self._known[1]

    def _share_counts(self, layers: DeviceLayers) -> None:
        """Make parameters of this step that have taken the same steps count them together.

        Reads the counts.  Parameters that are not in this step keep theirs.
        """
        counts: dict[float, Tensor] = {}
        for layer in layers.layers:
            state = self.state[layer.param]
            steps = state.get("steps", self.new_slot("steps", layer.param))
            state["steps"] = counts.setdefault(float(steps), steps.clone())

    def _part(self, param: Tensor) -> _Part:
        """Return this rank's part of a parameter; missing moments are created."""
        if self.placement is None:
            assert param.grad is not None
            weight, gradient, norm_part = param, in_layout_of(param, param.grad), None
        else:
            weight, gradient = self.placement.block(param)
            norm_part = slice(*self.placement.norm_part(param))
        state = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state.get(name)
            if moment is None:
                moment = torch.zeros_like(weight)
            moment = _in_form_of(weight, moment, param)
            check_shape("LAMB", name, moment, weight, param)
            state[name] = in_layout_of(weight, moment) if is_dense(weight) else moment
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        return _Part(weight, gradient, mean, square, state["steps"], norm_part)

    def _summed(self, sums: Tensor) -> Tensor:
        return sums if self.placement is None else self.placement.scalars.sum(sums)

    def _updates(
        self, layers: DeviceLayers, parts: list[_Part], factor: Tensor, live: Tensor | None
    ) -> list[Tensor]:
        """Update the moments and return u of every layer; 0 and unchanged moments if not live."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, (layer, part) in enumerate(zip(layers.layers, parts, strict=True)):
            key = id(layer.group), id(part.steps), part.weight.dtype, part.gradient.dtype
            kinds.setdefault(key, []).append(i)
        kept = torch.ones_like(factor) if live is None else live.to(factor)
        for steps in {id(part.steps): part.steps for part in parts}.values():
            steps.add_(kept)
        updates: list[Tensor] = [factor] * len(parts)
        for members in kinds.values():
            made = _adam(layers.layers[members[0]].group, [parts[i] for i in members], factor, live)
            for i, update in zip(members, made, strict=True):
                updates[i] = update
        return updates

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, with the counts of steps as float64 again.

        Raises ValueError if the state is another optimizer's.
        """
        check_ours("LAMB", state_dict, self.defaults)
        torch_internals.load_state_dict(self, state_dict)
        for state in self.state.values():
            if isinstance(state, dict) and "steps" in state:  # others may keep entries there
                state["steps"] = state["steps"].double()
        self._known = None

    def slot(self, name: str, param: Tensor) -> Tensor | None:
        """Return a parameter's moment in the parameter's shape, or its count of steps.

        Collective under a placement; None before the parameter's first step.
        """
        value: Tensor | None = self.state.get(param, {}).get(name)
        if value is None or name == "steps":
            return value
        return value if self.placement is None else self.placement.whole(param, value)

    def new_slot(self, name: str, param: Tensor) -> Tensor:
        """Return zeros of a whole slot's shape: the parameter's, and 0-dim for the count."""
        if name == "steps":
            return torch.zeros((), dtype=torch.float64, device=param.device)
        return torch.zeros_like(param)

    def set_slots(self, param: Tensor, values: Mapping[str, Tensor]) -> None:
        """Replace a parameter's state with these whole slots."""
        parts = {
            name: value
            if name == "steps"
            else value
            if self.placement is None
            else flat(self.placement.part(param, value))
            for name, value in values.items()
        }
        self.state[param] = parts
        self._known = None


def _check_group(group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a hyper-parameter or tensor that does not fit in or with ``groups``."""
    betas, largest = group["betas"], group["max_grad_norm"]
    fits = {
        "lr": group["lr"] >= 0 and math.isfinite(group["lr"]),
        "betas": len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "eps": group["eps"] > 0,
        "weight_decay": group["weight_decay"] >= 0,
        "max_grad_norm": largest == groups[0]["max_grad_norm"] and (largest is None or largest > 0),
        "max_weight_norm": group["max_weight_norm"] > 0,
        "adapt": group["adapt"] in CHOICES["adapt"],
    }
    for name, right in fits.items():
        if not right:
            raise ValueError(f"LAMB: {name} is {group[name]}, which is out of range")
    devices = (param.device for each in groups for param in each["params"])
    device = next(devices, None)
    for param in group["params"]:
        if param.dtype not in (torch.float32, torch.float64) or param.device != device:
            raise ValueError(
                f"LAMB takes float32 or float64 on one device, {device}; found {param.dtype} on "
                f"{param.device}"
            )


def _in_form_of(weight: Tensor, moment: Tensor, param: Tensor) -> Tensor:
    """Return a moment of a state without a placement for a weight in one, or the reverse.

    A placement's are flat, in the parameter's memory order.  Others are returned as they are.
    """
    if moment.dim() == weight.dim() or moment.numel() != weight.numel():
        return moment
    if weight.dim() == 1 and moment.shape == param.shape:
        return flat(in_layout_of(param, moment))
    if moment.dim() == 1 and is_dense(weight):
        return moment.contiguous().as_strided(weight.shape, weight.stride())
    return moment


def _adam(
    group: dict[str, Any], parts: list[_Part], factor: Tensor, live: Tensor | None
) -> list[Tensor]:
    """Update the moments of parts of one kind with g·factor, and return their u."""
    weights, raw = [part.weight for part in parts], [part.gradient for part in parts]
    means, squares = [part.mean for part in parts], [part.square for part in parts]
    (first, second), dtype = group["betas"], weights[0].dtype
    gradients = list(torch._foreach_mul([g.to(dtype) for g in raw], factor.to(dtype)))
    kept = None
    if live is None:
        torch._foreach_mul_(means, first)
        torch._foreach_mul_(squares, second)
    else:  # or 0 times infinity would be NaN
        kept = live.to(dtype)
        gradients = [torch.where(live, g, 0.0) for g in gradients]
        torch._foreach_mul_(means, 1.0 - kept * (1.0 - first))
        torch._foreach_mul_(squares, 1.0 - kept * (1.0 - second))
    share = 1.0 - first if group["grad_averaging"] else 1.0
    torch._foreach_add_(means, gradients, alpha=share)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1.0 - second)
    roots, sizes = list(torch._foreach_sqrt(squares)), means
    if group["bias_correction"]:
        count = parts[0].steps.clamp_min(1.0)  # before a first step is kept, 1 − β⁰ would divide 0
        torch._foreach_div_(roots, (1.0 - second**count).sqrt().to(dtype))
        sizes = list(torch._foreach_div(means, (1.0 - first**count).to(dtype)))
    torch._foreach_add_(roots, group["eps"])
    updates = list(torch._foreach_div(sizes, roots))
    if group["weight_decay"]:
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
    if kept is not None:
        torch._foreach_mul_(updates, kept)
    return updates


def _ratios(layers: DeviceLayers, weight_norms: Tensor, update_norms: Tensor) -> Tensor:
    """Return φ(‖w‖)/‖u‖ of every layer, (layers,) float64; 1 for a layer without a ratio."""
    found, begin = [], 0
    groups = [layer.group for layer in layers.layers]
    while begin < len(groups):
        group, end = groups[begin], begin + 1
        while end < len(groups) and groups[end] is group:
            end += 1
        weight, update = weight_norms[begin:end], update_norms[begin:end]
        ratio = weight.clamp_max(group["max_weight_norm"]) / update
        if group["trust_clip"]:
            ratio = ratio.clamp_max(1.0)
        found.append(torch.where((weight > 0) & (update > 0), ratio, 1.0))
        begin = end
    return torch.cat([*found, torch.ones_like(weight_norms[:1])])[layers.ratio_of]
