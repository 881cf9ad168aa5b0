"""What a config comes to in steps, for a data set's size and a number of ranks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from hvd_lars.assemble.sources import mixes_pairs
from hvd_lars.config.schema import Config
from hvd_lars.data.sampler import accumulation, smallest_micro_batch
from hvd_lars.errors import UserError
from hvd_lars.settings.durations import Duration, Intervals
from hvd_lars.train.schedules import (
    Schedule,
    constant,
    constant_warmup,
    cosine,
    gradual_warmup,
    multistep,
    poly,
    scaled_rate,
)


@dataclass(frozen=True)
class Plan:
    """What a config comes to for a data set and a number of ranks; lengths in steps."""

    ranks: int
    num_train: int
    global_batch: int
    steps_per_epoch: int
    accumulation: int
    largest_micro_batch: int
    smallest_micro_batch: int
    intervals: Intervals
    warmup_steps: int
    target_lr: float
    schedule: Schedule


def make_plan(config: Config, num_train: int, ranks: int) -> Plan:
    """Turn durations into steps and the schedule section into a function of the step.

    Raises:
        UserError: the batch does not fit into the data set, or the warmup into the run.
    """
    train, rates = config.train, config.schedule
    if train.global_batch > num_train:
        raise UserError(
            f"train.global_batch: found {train.global_batch}; an epoch of {config.data.name} has "
            f"{num_train} samples"
        )
    steps_per_epoch = num_train // train.global_batch

    def steps(duration: Duration, key: str) -> int:
        found = duration.steps(steps_per_epoch, train.global_batch)
        if found < 1:
            raise UserError(f"{key}: {duration} is less than one step of {train.global_batch}")
        return found

    total = steps(train.duration, "train.duration")
    warmup = (
        0 if rates.warmup == "none" else steps(rates.warmup_duration, "schedule.warmup_duration")
    )
    if warmup >= total:
        raise UserError(
            f"schedule.warmup_duration: {rates.warmup_duration} is {warmup} steps; the whole run "
            f"has {total}; give a shorter one, or warmup none and warmup_duration '0 epochs'"
        )
    target = scaled_rate(rates.base_lr, rates.scaling, train.global_batch, rates.reference_batch)
    if rates.end_lr > target:
        raise UserError(
            f"schedule.end_lr: found {rates.end_lr}; at most the target rate {target:g}"
        )
    start = warmup if rates.poly_span == "post_warmup" else 0
    if rates.policy == "poly":
        main = poly(target, total, rates.poly_power, rates.end_lr, start)
    elif rates.policy == "cosine":
        main = cosine(target, total, rates.end_lr, start)
    elif rates.policy == "multistep":
        milestones = [steps(m, "schedule.milestones") for m in rates.milestones]
        main = multistep(target, milestones, rates.factor)
    else:
        main = constant(target)
    if rates.warmup == "gradual":
        schedule = gradual_warmup(main, warmup, target, rates.warmup_start_lr)
    elif rates.warmup == "constant":
        schedule = constant_warmup(main, warmup, rates.warmup_start_lr)
    else:
        schedule = main
    block = 2 if mixes_pairs(config) else 1
    if train.micro_batch < block:
        raise UserError(
            f"train.micro_batch: found {train.micro_batch}; mixup and cutmix need 2 or more"
        )
    kept = config.checkpoint.every
    by_clock = kept.unit == "minutes"
    if by_clock and kept.value == 0:
        raise UserError(f"checkpoint.every: found {kept}; must be above 0")
    pieces = accumulation(train.global_batch, ranks, train.micro_batch, block)
    fullest = min(-(-train.global_batch // (block * ranks)) * block, train.global_batch)
    _check_batch_norm_groups(config, ranks, pieces, block)
    return Plan(
        ranks=ranks,
        num_train=num_train,
        global_batch=train.global_batch,
        steps_per_epoch=steps_per_epoch,
        accumulation=pieces,
        largest_micro_batch=min(-(-fullest // (block * pieces)) * block, fullest),
        smallest_micro_batch=smallest_micro_batch(
            train.global_batch, ranks, train.micro_batch, block
        ),
        intervals=Intervals(
            total=total,
            evaluate=steps(train.eval_every, "train.eval_every"),
            log=steps(train.log_every, "train.log_every"),
            checkpoint=total if by_clock else steps(kept, "checkpoint.every"),
            layers=steps(train.log_layers_every, "train.log_layers_every"),
            checkpoint_seconds=60.0 * kept.value if by_clock else math.inf,
        ),
        warmup_steps=warmup,
        target_lr=target,
        schedule=schedule,
    )


def _check_batch_norm_groups(config: Config, ranks: int, pieces: int, block: int) -> None:
    """Statistics over several ranks need whole groups, and samples on every rank every time."""
    span = config.model.bn_sync_ranks
    if ranks % span:
        raise UserError(f"model.bn_sync_ranks: found {span}; it must divide the {ranks} ranks")
    least = config.train.global_batch // block // ranks
    if span > 1 and least < pieces:
        raise UserError(
            f"train.global_batch: found {config.train.global_batch}; with model.bn_sync_ranks "
            f"{span}, each of {ranks} ranks needs samples in each of {pieces} micro-batches"
        )


def plan_facts(plan: Plan) -> dict[str, object]:
    """The plan as plain values: what ``check`` prints."""
    total, warmup = plan.intervals.total, plan.warmup_steps
    rates = {"start": 0, "after warmup": warmup, "middle": total // 2, "last step": total - 1}
    facts = {key: value for key, value in asdict(plan).items() if key != "schedule"}
    return facts | {"lr": {when: plan.schedule(step) for when, step in rates.items()}}
