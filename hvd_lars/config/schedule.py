"""The config's ``schedule`` section."""

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
    """A schedule resolved for the length of a run.

    Attributes:
        warmup_steps: length of the warmup, in steps.
        target_lr: γ at the end of the warmup.
        rate: γ as a function of the step.
    """

    warmup_steps: int
    target_lr: float
    rate: schedules.Schedule


class Schedule(Section):
    """The learning rate γ over the run."""

    base_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = key(
        binds="run and recipe", description="γ at the end of the warmup, before scaling"
    )
    scaling: Literal["none", "linear", "sqrt"] = key(
        binds="run and recipe",
        default="none",
        description="base_lr, times k or times √k, with k = global_batch / reference_batch",
    )
    reference_batch: Positive = key(
        binds="run and recipe", default=256, description="global batch that base_lr is meant for"
    )
    policy: Literal["poly", "multistep", "cosine", "constant"] = key(
        binds="run and recipe", default="poly", description="rule for γ after the warmup"
    )
    poly_power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = key(
        binds="run and recipe", default=2.0, description="p in (1 − t/T)^p"
    )
    poly_span: Literal["post_warmup", "total"] = key(
        binds="run and recipe",
        default="post_warmup",
        description="t and T count the steps after the warmup (MLPerf), or all steps (Caffe)",
    )
    end_lr: Rate = key(
        binds="run and recipe", default=0.0, description="final γ of poly and cosine"
    )
    milestones: Annotated[tuple[DurationField, ...], Field(strict=False)] = key(
        binds="run and recipe",
        default=(),
        description="multistep: when γ is multiplied by factor",
    )
    factor: Annotated[float, Field(gt=0, le=1)] = key(
        binds="run and recipe", default=0.1, description="multistep: applied at each milestone"
    )
    warmup: Literal["none", "gradual", "constant"] = key(
        binds="run and recipe",
        default="none",
        description="gradual: linear from warmup_start_lr; constant: warmup_start_lr until the end",
    )
    warmup_duration: DurationField = key(
        binds="run and recipe", default=Duration(0, "epochs"), description="required with a warmup"
    )
    warmup_start_lr: Rate = key(
        binds="run and recipe",
        default=0.0,
        description="first γ of a gradual warmup; γ of a constant one",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Schedule:
        if self.policy == "multistep" and not self.milestones:
            raise ValueError(
                "policy multistep needs milestones, such as ['30 epochs', '60 epochs']"
            )
        if self.policy != "multistep" and self.milestones:
            raise ValueError(
                f"milestones has no effect with policy {self.policy}; "
                f"allowed: [], or policy multistep"
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
        """Resolve the schedule for a run.

        Args:
            total: steps of the run.
            global_batch: samples per step.
            steps: converts a duration to steps; its second argument is the key to name in errors.

        Raises:
            UserError: the warmup does not fit into the run, or ``end_lr`` exceeds the target rate.
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
