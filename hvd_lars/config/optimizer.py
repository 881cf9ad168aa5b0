"""The config's optimizer and schedule sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hvd_lars.settings.durations import Duration
from hvd_lars.settings.fields import DurationField, Positive, Rate, Section


class Optimizer(Section):
    """LARS, or momentum SGD with the same options; see the docstring of hvd_lars.LARS."""

    name: Literal["lars", "sgd"] = Field(
        default="lars", description="sgd: the same step with a trust ratio of 1"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="μ")
    weight_decay: Rate = Field(default=0.0, description="β")
    trust_coefficient: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=0.001, description="l, of λ = l · ‖w‖ / (‖g‖ + β‖w‖ + ε)"
    )
    eps: Rate = Field(default=0.0, description="ε")
    nesterov: bool = Field(default=False, description="look ahead by one momentum step")
    lr_position: Literal["momentum", "update"] = Field(
        default="momentum",
        description="where γ stands: inside the momentum (the paper), or before the whole update",
    )
    denominator: Literal["separate", "combined"] = Field(
        default="separate", description="‖g‖ + β‖w‖ (the paper), or ‖g + βw‖ (optax, SimCLR)"
    )
    trust_clip: bool = Field(
        default=False, description="no layer's rate exceeds γ: min(λ/γ, 1) for λ (LARC)"
    )
    zero_norm: Literal["unit", "skip", "coast"] = Field(
        default="unit", description="where a norm is zero: λ = 1, or the layer stays as it is"
    )
    adapt: Literal["weights", "layer", "all"] = Field(
        default="weights",
        description="what takes a trust ratio: weights alone; layer: biases take their weight's; "
        "all: each tensor its own",
    )
    decay: Literal["weights", "all"] = Field(
        default="weights", description="what is decayed: not biases and normalisation, or all"
    )
    kernel: Literal["auto", "native", "fused", "eager"] = Field(
        default="auto", description="how a step is computed; auto: the fastest that all ranks have"
    )
    placement: Literal["replicated", "sharded", "auto"] = Field(
        default="replicated",
        description="sharded: momentum and update divided over the ranks; auto: the faster one",
    )

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Optimizer:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov is true with momentum 0; it needs momentum above 0")
        return self


class Schedule(Section):
    """The learning rate γ over the run."""

    base_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        description="γ that the warmup ends at, before scaling"
    )
    scaling: Literal["none", "linear", "sqrt"] = Field(
        default="none", description="of base_lr with the batch: γ, γ·k or γ·√k for k references"
    )
    reference_batch: Positive = Field(
        default=256, description="base_lr is meant for this global batch"
    )
    policy: Literal["poly", "multistep", "cosine", "constant"] = Field(
        default="poly", description="the rule after the warmup"
    )
    poly_power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=2.0, description="p, of (1 − t/T)^p"
    )
    poly_span: Literal["post_warmup", "total"] = Field(
        default="post_warmup",
        description="what t and T count: steps after the warmup (MLPerf), or all (Caffe)",
    )
    end_lr: Rate = Field(default=0.0, description="where poly and cosine end")
    milestones: Annotated[tuple[DurationField, ...], Field(strict=False)] = Field(
        default=(), description="multistep: when the rate is multiplied by factor"
    )
    factor: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="multistep: of each milestone"
    )
    warmup: Literal["none", "gradual", "constant"] = Field(
        default="none", description="gradual: a straight line; constant: warmup_start_lr, then all"
    )
    warmup_duration: DurationField = Field(
        default=Duration(0, "epochs"), description="needed with a warmup"
    )
    warmup_start_lr: Rate = Field(default=0.0, description="where a gradual warmup begins")

    @model_validator(mode="after")
    def _parts_fit(self) -> Schedule:
        if self.policy == "multistep" and not self.milestones:
            raise ValueError(
                "policy multistep needs milestones, such as ['30 epochs', '60 epochs']"
            )
        if self.warmup != "none" and self.warmup_duration.value == 0:
            raise ValueError(f"warmup {self.warmup} needs a warmup_duration above 0")
        if self.warmup == "none" and self.warmup_duration.value > 0:
            raise ValueError(
                f"warmup_duration is {self.warmup_duration} but warmup is none; "
                f"allowed: gradual, constant"
            )
        if self.warmup == "constant" and self.warmup_start_lr == 0:
            raise ValueError("warmup constant needs warmup_start_lr above 0")
        return self
