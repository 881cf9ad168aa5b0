"""The config's schedule section: its settings, and ``build()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from hvd_lars.errors import UserError
from hvd_lars.settings.durations import Duration
from hvd_lars.settings.fields import DurationField, Positive, Rate, Section, key
from hvd_lars.train import schedules

Steps = Callable[[Duration, str], int]


class Planned(NamedTuple):
    """A schedule for a run of a certain length.

    Attributes:
        warmup_steps: length of the warmup.
        target_lr: γ at its end.
        rate: γ of every step.
    """

    warmup_steps: int
    target_lr: float
    rate: schedules.Schedule


class Schedule(Section):
    """The learning rate γ over the run."""

    base_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = key(
        binds="run and recipe", description="γ that the warmup ends at, before scaling"
    )
    scaling: Literal["none", "linear", "sqrt"] = key(
        binds="run and recipe",
        default="none",
        description="of base_lr with the batch: γ, γ·k or γ·√k for k references",
    )
    reference_batch: Positive = key(
        binds="run and recipe", default=256, description="base_lr is meant for this global batch"
    )
    policy: Literal["poly", "multistep", "cosine", "constant"] = key(
        binds="run and recipe", default="poly", description="the rule after the warmup"
    )
    poly_power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = key(
        binds="run and recipe", default=2.0, description="p, of (1 − t/T)^p"
    )
    poly_span: Literal["post_warmup", "total"] = key(
        binds="run and recipe",
        default="post_warmup",
        description="what t and T count: steps after the warmup (MLPerf), or all (Caffe)",
    )
    end_lr: Rate = key(binds="run and recipe", default=0.0, description="where poly and cosine end")
    milestones: Annotated[tuple[DurationField, ...], Field(strict=False)] = key(
        binds="run and recipe",
        default=(),
        description="multistep: when the rate is multiplied by factor",
    )
    factor: Annotated[float, Field(gt=0, le=1)] = key(
        binds="run and recipe", default=0.1, description="multistep: of each milestone"
    )
    warmup: Literal["none", "gradual", "constant"] = key(
        binds="run and recipe",
        default="none",
        description="gradual: a straight line; constant: warmup_start_lr, then all",
    )
    warmup_duration: DurationField = key(
        binds="run and recipe", default=Duration(0, "epochs"), description="needed with a warmup"
    )
    warmup_start_lr: Rate = key(
        binds="run and recipe", default=0.0, description="where a gradual warmup begins"
    )

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

    def build(self, total: int, global_batch: int, steps: Steps) -> Planned:
        """The learning rate of every step.

        Args:
            total: steps of the run.
            global_batch: samples of a step.
            steps: the steps of a duration; its second argument is the key for errors.

        Raises:
            UserError: the warmup does not fit into the run, or the rate would end above its target.
        """
        warmup = 0
        if self.warmup != "none":
            warmup = steps(self.warmup_duration, "schedule.warmup_duration")
        if warmup >= total:
            raise UserError(
                f"schedule.warmup_duration: {self.warmup_duration} is {warmup} steps; the whole "
                f"run has {total}; give a shorter one, or warmup none and warmup_duration "
                f"'0 epochs'"
            )
        target = schedules.scaled_rate(
            self.base_lr, self.scaling, global_batch, self.reference_batch
        )
        if self.end_lr > target:
            raise UserError(
                f"schedule.end_lr: found {self.end_lr}; at most the target rate {target:g}"
            )
        start = warmup if self.poly_span == "post_warmup" else 0
        if self.policy == "poly":
            rate = schedules.poly(target, total, self.poly_power, self.end_lr, start)
        elif self.policy == "cosine":
            rate = schedules.cosine(target, total, self.end_lr, start)
        elif self.policy == "multistep":
            milestones = [steps(each, "schedule.milestones") for each in self.milestones]
            rate = schedules.multistep(target, milestones, self.factor)
        else:
            rate = schedules.constant(target)
        if self.warmup == "gradual":
            rate = schedules.gradual_warmup(rate, warmup, target, self.warmup_start_lr)
        elif self.warmup == "constant":
            rate = schedules.constant_warmup(rate, warmup, self.warmup_start_lr)
        return Planned(warmup, target, rate)
