"""From a Config and a Communicator to a Trainer, or to an evaluation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hvd_lars.assemble.choices import settle
from hvd_lars.assemble.network import build_network, check_batch_norm, shapes_of
from hvd_lars.assemble.placing import place
from hvd_lars.assemble.plan import make_plan
from hvd_lars.assemble.recording import make_sinks
from hvd_lars.assemble.resuming import (
    Resume,
    check_same_data,
    checkpoints_in,
    config_to_resume,
    stored_data,
)
from hvd_lars.assemble.sources import build_source, mixes_pairs, workers_of
from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.config.file import dump_config
from hvd_lars.config.optimizer import Optimizer
from hvd_lars.config.schema import Config
from hvd_lars.data import GlobalBatches, Source
from hvd_lars.errors import UserError
from hvd_lars.health.agreement import Votes
from hvd_lars.health.stop_requests import StopRequests
from hvd_lars.launchers.environment import ALONE, Launch
from hvd_lars.metrics import check_loggers
from hvd_lars.models import check_model_name, load_weights
from hvd_lars.models.batch_norm import span_ranks
from hvd_lars.optim import LARS, Placement, Sharded, parameter_groups
from hvd_lars.runtime.allocator import keep_freed_memory
from hvd_lars.runtime.files import expand_user
from hvd_lars.runtime.terminal import tell
from hvd_lars.state import run_folder
from hvd_lars.state.checkpoint import Checkpointer, find_checkpoint, look_for_checkpoint, restore
from hvd_lars.state.checkpoint_files import Found, choose
from hvd_lars.state.snapshots import Commits
from hvd_lars.train.evaluation import Evaluation, evaluate
from hvd_lars.train.loop import Loop
from hvd_lars.train.profiling import Profile
from hvd_lars.train.trainer import Trainer


def choose_device(comm: Communicator) -> torch.device:
    """This rank's GPU where there is one; a launcher that shows each rank one GPU counts as 0."""
    if not torch.cuda.is_available():
        keep_freed_memory()
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


def optimizer_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """The model's parameters as the optimizer section groups them."""
    adapt = "none" if settings.name == "sgd" else settings.adapt
    return parameter_groups(model, settings.weight_decay, adapt, settings.decay)


def build_optimizer(model: nn.Module, settings: Optimizer, lr: float, placement: Placement) -> LARS:
    """LARS with the config's groups; ``sgd`` is the same rule without trust ratios."""
    options = settings.model_dump(exclude={"name", "adapt", "decay", "weight_decay", "placement"})
    return LARS(optimizer_groups(model, settings), lr=lr, placement=placement, **options)


def build_run(
    config: Config,
    comm: Communicator,
    launch: Launch,
    resume: Resume | None = None,
    commits: Commits | None = None,
    after_commit: Callable[[], None] = lambda: None,
) -> tuple[Loop, Path]:
    """Everything for one rank's part of the run, and the run folder; collective.

    Nothing is written before all of it is checked and built.  ``commits`` of an elastic job is
    where it goes on from, if there is one, and what it keeps; ``after_commit`` is called every time
    then.

    Raises:
        UserError: on every rank alike, for anything in the config that cannot be done, or a run
            that cannot be resumed.
    """
    check_loggers(config.run.loggers)
    check_model_name(config.model.name)
    committed = None if commits is None else commits.agree(comm)
    wanted, allowed = config.run.dir, config.run.allow_other_data
    if committed is not None:
        config, wanted = committed.settings
    elif resume is not None:
        config = on_root(comm, lambda: config_to_resume(config, resume))
    again = committed is not None or (resume is not None and resume.source is None)
    if wanted is not None and not again:
        folder_wanted = wanted
        on_root(comm, lambda: str(run_folder.refuse_other_run(folder_wanted)))
    in_memory = committed is not None and committed.tensors
    found = None
    if resume is not None and not in_memory:
        found = _checkpoint_of(resume, Path(str(wanted)), comm)
    # It holds for this command; the run keeps the new data.
    config = config.with_values("run", allow_other_data=False)
    trainer, config = make_trainer(config, comm, launch)
    identity = trainer.source.identity
    where, then = (None, None) if found is None else (found.folder, found.data)
    if then is None and again:
        where = expand_user(str(wanted), "run.dir")
        folder_before = where
        then = on_root(comm, lambda: stored_data(folder_before))
    if where is not None:
        check_same_data(then, identity, allowed, where, comm.rank)
    progress = None
    state = trainer.model, trainer.optimizer, trainer.average
    if commits is not None and committed is not None and in_memory:
        progress = commits.restore(committed, *state, comm)
    elif found is not None:
        progress = restore(found, comm, *state)

    def make_folder() -> str:
        folder = run_folder.create_run_folder(wanted, config.run.name, again)
        ranks = {"backend": comm.backend, "launcher": launch.launcher, "world_size": comm.size}
        threads, device = torch.get_num_threads(), str(trainer.device)
        run_folder.describe_run(
            folder, dump_config(config), identity.record(), ranks, device, threads
        )
        if committed is None:
            (folder / run_folder.STOP).unlink(missing_ok=True)
        return str(folder)

    folder = Path(on_root(comm, make_folder))
    if comm.rank == 0:
        run_folder.forget_after(folder, 0 if progress is None else progress.step)
    commit = None
    if commits is not None:
        commits.announce((config, str(folder)))

        def commit() -> None:
            commits.keep(*state, trainer.progress, (config, str(folder)))
            after_commit()

    stops = _stop_requests(config, folder if comm.rank == 0 else None, commits)
    loop = _make_loop(trainer, config, folder, comm, stops, commit, launch is ALONE)
    if progress is not None:
        loop.resume(progress)
    return loop, folder


def _checkpoint_of(resume: Resume, own: Path, comm: Communicator) -> Found | None:
    """The checkpoint to go on from; None where the run in ``own`` has none yet."""
    if resume.source is not None:
        return find_checkpoint(checkpoints_in(resume.source), comm)
    return look_for_checkpoint(expand_user(own, "run.dir") / run_folder.CHECKPOINTS, comm)


def _make_loop(
    trainer: Trainer,
    config: Config,
    folder: Path,
    comm: Communicator,
    stops: StopRequests,
    commit: Callable[[], None] | None,
    alone: bool,
) -> Loop:
    """The loop around the trainer, which keeps its checkpoints in the run folder."""
    source, steps = trainer.source, config.train.profiled_steps
    intervals = make_plan(config, source.num_train, comm.size).intervals
    kept = folder / run_folder.CHECKPOINTS
    return Loop(
        trainer,
        intervals,
        config.train.eval_batch,
        Checkpointer(kept, comm, config.checkpoint.keep_last, source.identity),
        sinks=make_sinks(config, folder, intervals.total, alone) if comm.rank == 0 else (),
        max_skipped_steps=config.train.max_skipped_steps,
        verify_every=config.train.verify_every or 0,
        votes=_make_votes(config, source, comm, stops, intervals.checkpoint_seconds),
        commit=commit,
        commit_every=config.checkpoint.commit_every,
        layers_every=intervals.layers,
        profile=None if steps is None else Profile(*steps, folder / "profile", comm),
    )


def _make_votes(
    config: Config,
    source: Source,
    comm: Communicator,
    stops: StopRequests | None = None,
    keep_every: float = math.inf,
) -> Votes:
    bad = getattr(config.data, "max_bad_fraction", 0.0)
    counts = source.num_train, source.num_eval
    return Votes(comm, stops, source.unreadable, *counts, bad, keep_every)


def _stop_requests(config: Config, folder: Path | None, commits: Commits | None) -> StopRequests:
    """This rank's, which an elastic job keeps over its attempts; ``folder`` where it may look."""
    hours = config.run.max_hours
    kept = None if commits is None else commits.stops
    stops = kept or StopRequests(max_seconds=float("inf") if hours is None else hours * 3600.0)
    if commits is not None:
        commits.stops = stops
    return stops.with_file(None if folder is None else folder / run_folder.STOP)


def make_trainer(config: Config, comm: Communicator, launch: Launch) -> tuple[Trainer, Config]:
    """A trainer that keeps nothing, and the config with all choices made; collective.

    Raises:
        UserError: on every rank alike, for anything in the config that cannot be done.
    """
    threads = set_threads(config.train.threads, launch)
    device = choose_device(comm)
    source = build_source(config, comm, gpu=device.type == "cuda")
    plan = make_plan(config, source.num_train, comm.size)
    torch.manual_seed(config.run.seed)
    model = build_network(config.model, config.data, source.num_classes, device)
    check_batch_norm(model, config, plan)
    if (path := config.model.init_from) is not None:
        # On rank 0 alone: all take its weights before the first step.
        taken = on_root(comm, lambda: load_weights(model, path, source.num_classes))
        for line in taken.lines() if comm.rank == 0 else ():
            tell(f"model.init_from: {path}: {line}")
    average = None
    if config.model.ema_decay is not None:
        average = make_average(model, config.model.ema_decay)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = next(iter(shapes_of(config.data)))
    config = settle(config, model, shape, source.num_classes, comm, device)
    if config.model.bn_sync_ranks > 1:
        try:
            if not span_ranks(model, comm.group(config.model.bn_sync_ranks)):
                raise ValueError("the network has no BatchNorm")
        except ValueError as error:
            raise UserError(f"model.bn_sync_ranks: {error}") from None
    placement = place(model, comm, config.optimizer, config.comm)
    if isinstance(placement, Sharded) and not config.train.compile:
        # On the CPU only where a core is free to gather: else forward would share its own.
        cores = len(os.sched_getaffinity(0))
        if device.type == "cuda" or cores >= (launch.local_size or cores) * (threads + 1):
            placement.gather_during_forward(model)
    optimizer = build_optimizer(model, config.optimizer, plan.schedule(0), placement)
    trainer = Trainer(
        model=model,
        average=average,
        optimizer=optimizer,
        placement=placement,
        schedule=plan.schedule,
        source=source,
        batches=GlobalBatches(
            source.num_train,
            config.train.global_batch,
            config.run.seed,
            pairs=mixes_pairs(config),
        ),
        comm=comm,
        device=device,
        micro_batch=config.train.micro_batch,
        total_steps=plan.intervals.total,
        seed=config.run.seed,
        workers=workers_of(config),
        label_smoothing=config.train.label_smoothing,
        precision=config.train.precision,
        channels_last=config.train.channels_last,
        compiled=torch.compile(model) if config.train.compile else None,
    )
    return trainer, config


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows its parameters and buffers: e ← decay·e + (1 − decay)·w."""
    follow = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=follow, use_buffers=True)


def evaluate_run(
    folder: Path, config: Config, comm: Communicator, launch: Launch, which: str = "latest"
) -> tuple[Evaluation, Evaluation | None]:
    """Evaluate a checkpoint of a run folder, and its averaged weights; collective.

    ``which``: as of :func:`checkpoint_files.choose`.

    Raises:
        UserError: on every rank alike: there is no sound checkpoint, the data is not what the run
            has seen, or more of it cannot be read than ``data.max_bad_fraction``.
    """
    set_threads(config.train.threads, launch)
    device = choose_device(comm)
    chosen = on_root(comm, lambda: choose(folder / run_folder.CHECKPOINTS, which))
    found = find_checkpoint(chosen, comm)
    source = build_source(config, comm, gpu=device.type == "cuda")
    allowed = config.run.allow_other_data
    told = allowed, found.folder, comm.rank
    check_same_data(found.data, source.identity, *told, only_eval=True)
    model = build_network(config.model, config.data, source.num_classes, device)
    decay = config.model.ema_decay
    average = None if decay is None else make_average(model, decay)
    restore(found, comm, model, average=average)
    votes = _make_votes(config, source, comm)
    too_many: list[UserError] = []

    def agree() -> bool:
        try:
            votes.count()
        except UserError as error:  # all that cannot be read is to be named first
            too_many.append(error)
        return False

    options = source, comm, config.train.eval_batch, device, workers_of(config), agree
    try:
        result = evaluate(model, *options)
    except UserError as error:
        too_many.insert(0, error)
    if too_many:
        raise too_many[-1]
    assert result is not None  # nothing stops it
    return result, None if average is None else evaluate(average.module, *options)
