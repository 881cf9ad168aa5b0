"""BatchNorm whose statistics span several ranks.

A small micro-batch per rank makes noisy statistics; over a group of ranks they equal those of one
device with the group's samples (Goyal et al. 2017, §3, fix the span as the world size grows).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_lars.comm.base import Reducer


class _Normalise(torch.autograd.Function):
    """x (n, c, …) → (x − mean)/√(var + ε), with the mean and variance of the group's samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, group: Reducer, name: str) -> Any:
        """Return the result, and mean (c,), biased variance (c,) and count () in float64.

        One reduction of 2c + 1 numbers: the local moments are float32 and centred; only their
        sums over ranks are taken about zero, in float64, where that loses no precision.
        """
        dims, shape = _others(x), _spread(x)
        wide = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(wide, dims, correction=0)
        count = x.numel() // x.shape[1]
        mean, variance = mean.double(), variance.double()
        sums = torch.cat([mean, variance + mean**2, mean.new_ones(1)]) * count
        group.start_all_reduce_sum(sums, f"batch_norm.{name}").wait()
        channels = len(mean)
        mean, square = sums[:channels] / sums[-1], sums[channels:-1] / sums[-1]
        variance = (square - mean**2).clamp(min=0.0)
        scale = (variance + eps).rsqrt()
        normalised = (wide - mean.to(wide.dtype).view(shape)) * scale.to(wide.dtype).view(shape)
        ctx.save_for_backward(x, mean, scale, sums[-1])
        ctx.group, ctx.name = group, name
        ctx.mark_non_differentiable(mean, variance)
        return normalised.to(x.dtype), mean, variance, sums[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        """Return the input's gradient, with one reduction of 2c numbers."""
        x, mean, scale, count = ctx.saved_tensors
        dims, shape = _others(grad), _spread(grad)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide, scale = grad.to(exact), scale.to(exact).view(shape)
        # From the input, which is kept anyway: later layers may change the result in place.
        normalised = (x.to(exact) - mean.to(exact).view(shape)) * scale
        sums = torch.stack([wide.sum(dims), (wide * normalised).sum(dims)]).double()
        ctx.group.start_all_reduce_sum(sums, f"batch_norm.{ctx.name}.backward").wait()
        by_mean, by_scale = (sums / count).to(wide.dtype)
        centred = wide - by_mean.view(shape) - normalised * by_scale.view(shape)
        return (centred * scale).to(x.dtype), None, None, None


def _others(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _spread(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


class GroupBatchNorm(_BatchNorm):
    """BatchNorm over the samples of a group of ranks; torch's own in evaluation.

    In training, all ranks of the group must call it equally often and in the same order, each
    with at least one sample.
    """

    def __init__(self, plain: _BatchNorm, group: Reducer, name: str) -> None:
        super().__init__(
            plain.num_features, plain.eps, plain.momentum, affine=False, track_running_stats=False
        )
        self.affine, self.track_running_stats = plain.affine, plain.track_running_stats
        self.weight, self.bias = plain.weight, plain.bias
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            delattr(self, key)
            self.register_buffer(key, getattr(plain, key))
        self._group, self._name = group, name

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm takes (n, channels, …), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, channels, …); updates the running statistics in training."""
        if not self.training:
            return super().forward(input)
        normalised, mean, variance, count = _Normalise.apply(  # type: ignore[no-untyped-call]
            input, self.eps, self._group, self._name
        )
        if self.track_running_stats:
            self._track(mean, variance * count / (count - 1))
        if self.affine:
            shape = _spread(input)
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return cast(Tensor, normalised)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = self.momentum
        if weight is None:  # a plain average of all batches
            weight = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


def span_ranks(model: nn.Module, group: Reducer) -> int:
    """Make every BatchNorm take its statistics over ``group``, in place; returns their number.

    Parameters and buffers stay the same tensors under the same names.

    Raises:
        ValueError: a BatchNorm does more than normalise, such as timm's with an activation.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for name, norm in found:
        if type(norm) not in plain:
            raise ValueError(f"{name} is a {type(norm).__name__}, not a plain BatchNorm")
    for name, norm in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, GroupBatchNorm(norm, group, name))
    return len(found)
