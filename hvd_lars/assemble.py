"""From a Config and a Communicator to a Trainer: the one place that knows both."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hvd_lars import run_folder
from hvd_lars.checkpoint import Checkpointer
from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.comm.launcher import Launch
from hvd_lars.config import Config, DigitsData, ImageFolderData, SyntheticData
from hvd_lars.config_file import dump_config
from hvd_lars.data import (
    Digits,
    GlobalBatches,
    ImageFolder,
    Source,
    Synthetic,
    list_folder,
)
from hvd_lars.data.sampler import accumulation
from hvd_lars.durations import Duration
from hvd_lars.errors import UserError
from hvd_lars.evaluation import Evaluation, evaluate
from hvd_lars.metrics import Console, JsonLines, Sink
from hvd_lars.models import build_model
from hvd_lars.optim import LARS, Replicated, parameter_groups
from hvd_lars.schedules import (
    Schedule,
    constant,
    constant_warmup,
    cosine,
    gradual_warmup,
    multistep,
    poly,
    scaled_rate,
)
from hvd_lars.trainer import Intervals, Trainer


def build_source(config: Config, comm: Communicator) -> Source:
    """The data set that the config names; collective, only rank 0 lists files.

    Raises:
        UserError: on every rank alike, where the folder is not laid out as it should be.
    """
    data, seed = config.data, config.run.seed
    if isinstance(data, DigitsData):
        return Digits(data.copies, seed)
    if isinstance(data, SyntheticData):
        return Synthetic(**data.model_dump(exclude={"name"}), seed=seed)
    listing = on_root(comm, lambda: list_folder(data.root, _listing_cache()))
    return ImageFolder(listing, data.image_size, data.eval_resize, seed)


def _listing_cache() -> Path | None:
    """Where lists of image folders are kept; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "hvd_lars/listings" if not base.startswith("~") else None


def workers_of(config: Config) -> int:
    """Processes a rank that make batches; images made from memory need none."""
    return config.data.workers if isinstance(config.data, ImageFolderData) else 0


def build_model_for(name: str, source: Source, device: torch.device) -> nn.Module:
    """The named network, after it has been seen to take the images of ``source``.

    Raises:
        UserError: the name is unknown, or the network does not take images of that shape.
    """
    model = build_model(name, source.num_classes).to(device)
    images, _ = source.eval_batch(np.arange(min(2, source.num_eval)))
    try:
        with torch.no_grad():
            model.eval()(source.on_device(images.to(device)))
    except (RuntimeError, AssertionError) as error:
        shape = "×".join(str(n) for n in images.shape[1:])
        raise UserError(
            f"model.name: {name} does not take the {shape} images of the data: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return model.train()


@dataclass(frozen=True)
class Plan:
    """What a config comes to for a data set and a number of ranks; lengths in steps."""

    ranks: int
    num_train: int
    global_batch: int
    steps_per_epoch: int
    accumulation: int
    largest_micro_batch: int
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
    pieces = accumulation(train.global_batch, ranks, train.micro_batch)
    fullest = -(-train.global_batch // ranks)
    return Plan(
        ranks=ranks,
        num_train=num_train,
        global_batch=train.global_batch,
        steps_per_epoch=steps_per_epoch,
        accumulation=pieces,
        largest_micro_batch=-(-fullest // pieces),
        intervals=Intervals(
            total=total,
            evaluate=steps(train.eval_every, "train.eval_every"),
            log=steps(train.log_every, "train.log_every"),
            checkpoint=steps(config.checkpoint.every, "checkpoint.every"),
        ),
        warmup_steps=warmup,
        target_lr=target,
        schedule=schedule,
    )


def choose_device(comm: Communicator) -> torch.device:
    """This rank's GPU where there is one; a launcher that shows each rank one GPU counts as 0."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", comm.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def set_threads(wanted: int | None, launch: Launch) -> int:
    """CPU threads of this rank: as asked, as OMP_NUM_THREADS says, or its share of the cores.

    Ranks that share cores wait for each other's threads in every small operation, so a rank
    whose neighbours are unknown takes one.
    """
    if wanted is None and "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    share = len(os.sched_getaffinity(0)) // launch.local_size if launch.local_size else 1
    if launch.launcher == "srun" and os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        share = int(os.environ["SLURM_CPUS_PER_TASK"])  # the affinity is one task's already
    threads = wanted or max(1, share)
    torch.set_num_threads(threads)
    return threads


def build_optimizer(model: nn.Module, config: Config, lr: float, placement: Replicated) -> LARS:
    """LARS with the config's groups; ``sgd`` is the same rule without trust ratios."""
    settings = config.optimizer
    options = settings.model_dump(exclude={"name", "adapt", "decay", "weight_decay"})
    adapt = "none" if settings.name == "sgd" else settings.adapt
    groups = parameter_groups(model, settings.weight_decay, adapt, settings.decay)
    return LARS(groups, lr=lr, placement=placement, **options)


def build_trainer(config: Config, comm: Communicator, launch: Launch) -> tuple[Trainer, Path]:
    """Everything for one rank's part of the run, and the run folder; collective.

    Raises:
        UserError: on every rank alike, for anything in the config that cannot be done.
    """
    threads = set_threads(config.train.threads, launch)
    device = choose_device(comm)
    source = build_source(config, comm)
    plan = make_plan(config, source.num_train, comm.size)
    torch.manual_seed(config.run.seed)
    model = build_model_for(config.model.name, source, device)
    placement = Replicated(model.parameters(), comm, int(config.comm.bucket_mb * 2**20))
    optimizer = build_optimizer(model, config, plan.schedule(0), placement)

    def make_folder() -> str:
        folder = run_folder.create_run_folder(config.run.dir, config.run.name)
        ranks = {"backend": comm.backend, "launcher": launch.launcher, "world_size": comm.size}
        run_folder.describe_run(folder, dump_config(config), ranks, str(device), threads)
        return str(folder)

    folder = Path(on_root(comm, make_folder))
    sinks: list[Sink] = []
    if comm.rank == 0:
        sinks = [Console(plan.intervals.total), JsonLines(folder / run_folder.METRICS)]
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        placement=placement,
        schedule=plan.schedule,
        source=source,
        batches=GlobalBatches(source.num_train, config.train.global_batch, config.run.seed),
        comm=comm,
        device=device,
        micro_batch=config.train.micro_batch,
        eval_batch=config.train.eval_batch,
        intervals=plan.intervals,
        checkpointer=Checkpointer(
            folder / run_folder.CHECKPOINTS, comm, config.checkpoint.keep_last
        ),
        sinks=sinks,
        seed=config.run.seed,
        workers=workers_of(config),
        label_smoothing=config.train.label_smoothing,
    )
    return trainer, folder


def evaluate_run(folder: Path, config: Config, comm: Communicator, launch: Launch) -> Evaluation:
    """Evaluate the newest checkpoint of a run folder; collective.

    Raises:
        UserError: on every rank alike, when there is no sound checkpoint.
    """
    set_threads(config.train.threads, launch)
    device = choose_device(comm)
    source = build_source(config, comm)
    model = build_model_for(config.model.name, source, device)
    Checkpointer(folder / run_folder.CHECKPOINTS, comm).restore(model)
    return evaluate(model, source, comm, config.train.eval_batch, device, workers_of(config))


def plan_facts(plan: Plan) -> dict[str, object]:
    """The plan as plain values: what ``check`` prints."""
    total, warmup = plan.intervals.total, plan.warmup_steps
    rates = {"start": 0, "after warmup": warmup, "middle": total // 2, "last step": total - 1}
    facts = {key: value for key, value in asdict(plan).items() if key != "schedule"}
    return facts | {"lr": {when: plan.schedule(step) for when, step in rates.items()}}
