"""The plan of a run: a config in steps, for a data set's size and a world size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from hvd_lars.config.schema import Config
from hvd_lars.data.sampler import accumulation, smallest_micro_batch
from hvd_lars.errors import UserError
from hvd_lars.settings.durations import Duration, Intervals
from hvd_lars.train.schedules import Schedule


@dataclass(frozen=True)
class Plan:
    """A run for a data set and a world size; lengths in steps."""

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
        UserError: the global batch exceeds the data set, or the warmup does not fit into the run.
    """
    train = config.train
    if train.global_batch > num_train:
        raise UserError(
            f"train.global_batch: found {train.global_batch}; must be at most {num_train:,}, the "
            "number of training images"
        )
    steps_per_epoch = num_train // train.global_batch

    def steps(duration: Duration, key: str) -> int:
        found = duration.steps(steps_per_epoch, train.global_batch)
        if found < 1:
            raise UserError(
                f"{key}: found {duration}; must be at least one step, {train.global_batch} samples"
            )
        return found

    total = steps(train.duration, "train.duration")
    planned = config.schedule.build(total, train.global_batch, steps)
    block = 2 if config.data.mixes_pairs else 1
    if train.micro_batch < block:
        raise UserError(
            f"train.micro_batch: found {train.micro_batch}; mixup and cutmix need 2 or more"
        )
    batches = train.global_batch, ranks, train.micro_batch, block
    accumulated = accumulation(*batches)
    fullest = min(-(-train.global_batch // (block * ranks)) * block, train.global_batch)
    _check_batch_norm_groups(config, ranks, accumulated, block)
    return Plan(
        ranks=ranks,
        num_train=num_train,
        global_batch=train.global_batch,
        steps_per_epoch=steps_per_epoch,
        accumulation=accumulated,
        largest_micro_batch=min(-(-fullest // (block * accumulated)) * block, fullest),
        smallest_micro_batch=smallest_micro_batch(*batches),
        intervals=_intervals(config, total, steps),
        warmup_steps=planned.warmup_steps,
        target_lr=planned.target_lr,
        schedule=planned.rate,
    )


def _intervals(config: Config, total: int, steps: Callable[[Duration, str], int]) -> Intervals:
    """Return the config's intervals in steps."""
    train, every = config.train, config.checkpoint.every
    by_clock = every.unit == "minutes"
    if by_clock and every.value == 0:
        raise UserError(f"checkpoint.every: found {every}; must be above 0")
    return Intervals(
        total=total,
        evaluate=steps(train.eval_every, "train.eval_every"),
        log=steps(train.log_every, "train.log_every"),
        checkpoint=total if by_clock else steps(every, "checkpoint.every"),
        layers=steps(train.log_layers_every, "train.log_layers_every"),
        verify=train.verify_every or 0,
        snapshot=config.checkpoint.commit_every,
        checkpoint_seconds=60.0 * every.value if by_clock else math.inf,
    )


def _check_batch_norm_groups(config: Config, ranks: int, accumulated: int, block: int) -> None:
    """Refuse incomplete groups of ranks, and ranks without samples in a micro-batch."""
    span = config.model.bn_sync_ranks
    if ranks % span:
        raise UserError(f"model.bn_sync_ranks: found {span}; it must divide the {ranks} ranks")
    least = config.train.global_batch // block // ranks
    if span > 1 and least < accumulated:
        raise UserError(
            f"train.global_batch: found {config.train.global_batch}; with model.bn_sync_ranks "
            f"{span}, each of {ranks} ranks needs samples in each of {accumulated} micro-batches"
        )


def plan_facts(plan: Plan) -> dict[str, object]:
    """Return the plan as plain values, as ``check`` prints them."""
    total, warmup = plan.intervals.total, plan.warmup_steps
    rates = {"start": 0, "after warmup": warmup, "middle": total // 2, "last step": total - 1}
    facts = {key: value for key, value in asdict(plan).items() if key != "schedule"}
    return facts | {"lr": {when: plan.schedule(step) for when, step in rates.items()}}
