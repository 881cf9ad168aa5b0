"""LARS, layer-wise adaptive rate scaling: the mathematics of a step.

Where gradients come from (one device, or the sum over ranks) is the placement's affair.
Imports groups, norms and placement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvd_lars.optim.groups import check_group
from hvd_lars.optim.norms import flat, in_layout_of, sums_of_squares
from hvd_lars.optim.placement import Placement

LrPosition = Literal["momentum", "update"]
Denominator = Literal["separate", "combined"]
ZeroNorm = Literal["unit", "skip"]


@dataclass(slots=True)
class _Layer:
    """One parameter tensor in a step: ``param`` and ``grad`` have the same shape."""

    param: Tensor
    grad: Tensor
    group: dict[str, Any]
    source: int  # whose trust ratio applies: an index into the step's layers, -1 for none


class LARS(Optimizer):
    r"""Stochastic gradient descent with momentum and one learning rate per layer.

    A layer is one parameter tensor :math:`w` with gradient :math:`g` of the whole global batch:

    .. math::
        \lambda &= l \, \lVert w \rVert_2 \,/\,
            (\lVert g \rVert_2 + \beta \lVert w \rVert_2 + \epsilon)
            \quad\text{(1 where a norm is zero)} \\
        v &\leftarrow \mu v + \gamma \lambda (g + \beta w), \qquad w \leftarrow w - v

    A step runs in four phases: the placement completes the reduction of the gradients; each rank
    sums squares over its part of every layer; one all-reduce completes those sums; every layer is
    updated.  Without a placement the first and third fall away.  No phase copies a value from the
    device to the host.

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
        trust_clip: use min(λ/γ, 1) in place of λ, so that no layer's rate exceeds γ (LARC).
        zero_norm: ``"unit"`` uses λ = 1 where a norm is zero (paper), ``"skip"`` leaves such a
            layer and its momentum as they are (apex, lightly).
        placement: sums gradients over ranks; None for one process, or where something else does
            (``hvd.DistributedOptimizer``, DDP).

    Raises:
        ValueError: a hyper-parameter is negative, not finite or not among its choices; a
            parameter is complex or sparse.
        RuntimeError: from ``step``: a gradient is sparse.

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

    placement: Placement | None = None  # a copy of the optimizer has none

    def __init__(
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
            "adapt": "own",
        }
        self.placement = placement
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, after checking its hyper-parameters and tensors."""
        super().add_param_group(param_group)
        count = sum(len(group["params"]) for group in self.param_groups)
        try:
            check_group(param_group, count)
            if self.placement is not None:
                for param in param_group["params"]:
                    self.placement.owned(param)
        except ValueError:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; under a placement its flat buffers are kept and zeroed."""
        if self.placement is None:
            super().zero_grad(set_to_none)
        else:
            self.placement.zero_gradients()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; ``closure`` recomputes the loss, which is then returned.

        ``param.grad`` is only read here, after the placement has summed it over the ranks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.placement is not None:
            self.placement.reduce_gradients()
        layers = self._layers()
        ratios = self._trust_ratios(layers)
        for layer in layers:
            ratio = ratios[layer.source] if layer.source >= 0 else None
            self._update(layer, ratio)
        if self.placement is not None:
            self.placement.publish_parameters()
        return loss

    def _layers(self) -> list[_Layer]:
        """Parameters that have a gradient and are not frozen, in the order of the groups."""
        layers: list[_Layer] = []
        index_of: dict[int, int] = {}  # position over all groups -> position among the layers
        wanted: list[int] = []
        position = 0
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                if param.grad is not None and param.requires_grad:
                    if param.grad.is_sparse:
                        raise RuntimeError(
                            f"LARS takes dense gradients; a parameter of shape "
                            f"{tuple(param.shape)} has a sparse one"
                        )
                    index_of[position] = len(layers)
                    layers.append(_Layer(param, in_layout_of(param, param.grad), group, -1))
                    adapt = group["adapt"]
                    source = position if adapt == "own" else -1
                    wanted.append(group["ratio_from"][i] if adapt == "layer" else source)
                position += 1
        for layer, source in zip(layers, wanted, strict=True):
            # A bias whose weight is frozen has no ratio to share: it takes the plain rate.
            layer.source = index_of.get(source, -1)
        return layers

    def _trust_ratios(self, layers: list[_Layer]) -> dict[int, Tensor]:
        """λ of every layer that some layer uses: 0-dim float64 tensors on the layer's device."""
        ratios: dict[int, Tensor] = {}
        by_device: dict[torch.device, list[int]] = {}
        for index in sorted({layer.source for layer in layers if layer.source >= 0}):
            by_device.setdefault(layers[index].param.device, []).append(index)
        for indices in by_device.values():
            used = [layers[i] for i in indices]
            vector = _ratios(used, *self._norms(used))
            ratios.update(zip(indices, vector.unbind(), strict=True))
        return ratios

    def _norms(self, layers: list[_Layer]) -> tuple[Tensor, Tensor]:
        """‖w‖ and the denominator's gradient norm, (len(layers),) each, float64."""
        weights, gradients = [], []
        for layer in layers:
            weight, gradient = flat(layer.param), flat(layer.grad)
            if self.placement is not None:
                begin, end = self.placement.owned(layer.param)
                weight, gradient = weight[begin:end], gradient[begin:end]
            decay = layer.group["weight_decay"]
            if layer.group["denominator"] == "combined" and decay != 0:
                gradient = gradient.add(weight, alpha=decay)
            weights.append(weight)
            gradients.append(gradient)
        sums = sums_of_squares(weights + gradients)
        if self.placement is not None:
            sums = self.placement.complete_sums(sums)
        weight_norms, gradient_norms = sums.sqrt().chunk(2)
        return weight_norms, gradient_norms

    def _update(self, layer: _Layer, ratio: Tensor | None) -> None:
        """Apply the momentum rule to one layer in place.

        With a the rate inside the buffer and b the rate outside it, a·b = γλ:
        v ← μv + a(g + βw) and w ← w − b·v, Nesterov w ← w − b(μv + a(g + βw)).
        """
        group, param, grad = layer.group, layer.param, layer.grad
        momentum, decay, lr = group["momentum"], group["weight_decay"], group["lr"]
        inside, outside = (1.0, lr) if group["lr_position"] == "update" else (lr, 1.0)
        if ratio is None:
            ratio = torch.ones((), dtype=torch.float64, device=param.device)
        rate = ratio * inside  # 0-dim: stays on the device
        # λ = 0 marks a layer to skip: elsewhere a zero norm gives λ = 1.
        live = ratio != 0 if group["zero_norm"] == "skip" else None
        scale = rate.to(param.dtype)

        def add_gradient(target: Tensor) -> Tensor:
            target.addcmul_(grad, scale)
            return target.addcmul_(param, scale * decay) if decay != 0 else target

        if momentum == 0:
            step = add_gradient(torch.zeros_like(param))
        else:
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param)
            buffer = state["momentum_buffer"]
            if live is None:
                buffer.mul_(momentum)
            else:
                decayed = torch.full_like(ratio, momentum)
                buffer.mul_(torch.where(live, decayed, 1.0).to(param.dtype))
            add_gradient(buffer)
            step = add_gradient(buffer * momentum) if group["nesterov"] else buffer
        if live is not None:
            step = step * live
        param.sub_(step, alpha=outside)


def _ratios(layers: list[_Layer], weight_norms: Tensor, gradient_norms: Tensor) -> Tensor:
    """λ from the two norms; all (len(layers),), float64.

    Hyper-parameters may differ by layer, so they enter as one matrix made on the host.
    """
    rows = [
        [
            group["weight_decay"] if group["denominator"] == "separate" else 0.0,
            group["eps"],
            group["trust_coefficient"],
            group["lr"],
            group["trust_clip"],
            group["zero_norm"] == "unit",
        ]
        for group in (layer.group for layer in layers)
    ]
    table = torch.tensor(rows, dtype=torch.float64).to(weight_norms.device, non_blocking=True)
    decay, eps, coefficient, lr, clip, ratio_at_zero = table.unbind(1)
    ratio = coefficient * weight_norms / (gradient_norms + decay * weight_norms + eps)
    ratio = torch.where(clip != 0, (ratio / lr).clamp(max=1.0), ratio)
    return torch.where((weight_norms > 0) & (gradient_norms > 0), ratio, ratio_at_zero)
