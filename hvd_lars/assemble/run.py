"""Build a run from a config and a communicator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hvd_lars.assemble.recording import make_sinks
from hvd_lars.assemble.resuming import Resume
from hvd_lars.assemble.starting import Start, find_start
from hvd_lars.assemble.trainer import Built, build_trainer
from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.config.file import dump_config
from hvd_lars.config.schema import Config
from hvd_lars.health.agreement import Agreement
from hvd_lars.health.stop_requests import StopRequests
from hvd_lars.launchers.environment import ALONE, Launch
from hvd_lars.metrics import Sink, check_loggers
from hvd_lars.models import check_model_name
from hvd_lars.runtime.files import expand_user
from hvd_lars.state import run_folder
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.snapshots import Snapshots
from hvd_lars.train.evaluation import Evaluator
from hvd_lars.train.loop import Loop
from hvd_lars.train.profiling import Profile


def build_run(
    config: Config,
    comm: Communicator,
    launch: Launch,
    resume: Resume | None = None,
    snapshots: Snapshots | None = None,
    after_snapshot: Callable[[], None] = lambda: None,
    stops: StopRequests | None = None,
    sinks: Sequence[Sink] = (),
) -> tuple[Loop, Path]:
    """Return this rank's training loop and the run folder; collective.

    The config is resolved, the checkpoint found and verified, and everything built before the run
    folder is created or changed.

    Args:
        config: the user's config.
        comm: the ranks.
        launch: how they were started.
        resume: what to continue; None for a new run.
        snapshots: those of an elastic job; the run starts from the newest and takes more.
        after_snapshot: called after each snapshot.
        stops: stop requests of a job of several runs; by default, this run's own.
        sinks: receive the records too; empty except on rank 0.

    Raises:
        UserError: on every rank alike: the config cannot be run, or the run cannot be resumed.
        ReplicasDifferError: ranks do not hold the same bits.
    """
    check_loggers(config.run.loggers)
    check_model_name(config.model.name)
    start = find_start(config, comm, resume, snapshots)
    built = build_trainer(start.config, comm, launch)
    state = built.trainer.state
    start.check_data(built.trainer.feed.source.identity, comm)
    start.load(state, comm, snapshots)
    folder = _prepare_folder(start, built, comm, launch, elastic=snapshots is not None)
    take_snapshot = None
    if snapshots is not None:
        settings = (built.config, str(folder))
        snapshots.announce(settings)

        def take_snapshot() -> None:
            snapshots.take(state, settings)
            after_snapshot()

    if stops is None:
        stops = _stop_requests(built.config, folder if comm.rank == 0 else None, snapshots)
    if comm.rank == 0:
        sinks = [
            *make_sinks(
                built.config,
                folder,
                built.plan.intervals.total,
                launch is ALONE,
                state.progress.step,
            ),
            *sinks,
        ]
    return _make_loop(built, folder, stops, take_snapshot, sinks), folder


def _prepare_folder(
    start: Start, built: Built, comm: Communicator, launch: Launch, elastic: bool
) -> Path:
    """Create the run folder, or prepare a resumed run's own; collective."""
    config, trainer = built.config, built.trainer

    def prepare() -> str:
        if start.continues and not elastic:  # whose processes outlive their attempt
            run_folder.refuse_running(expand_user(str(start.directory), "run.dir"))
        folder = run_folder.create_run_folder(start.directory, config.run.name, start.continues)
        ranks = {"backend": comm.backend, "launcher": launch.launcher, "world_size": comm.size}
        machine = {"device": str(trainer.feed.device), "threads": torch.get_num_threads()}
        data = trainer.feed.source.identity.record()
        try:
            run_folder.describe_run(folder, dump_config(config), data, ranks | machine)
        except OSError:  # such as a full disk
            if not start.continues:
                run_folder.leave(folder)
            raise
        if start.snapshot is None:
            (folder / run_folder.STOP).unlink(missing_ok=True)
        run_folder.forget_after(folder, trainer.state.progress.step)
        return str(folder)

    return Path(on_root(comm, prepare))


def _make_loop(
    built: Built,
    folder: Path,
    stops: StopRequests,
    take_snapshot: Callable[[], None] | None,
    sinks: Sequence[Sink],
) -> Loop:
    """Return the loop around the trainer, with checkpoints in the run folder."""
    trainer, config, intervals = built.trainer, built.config, built.plan.intervals
    source, comm, steps = trainer.feed.source, trainer.comm, config.train.profiled_steps
    checkpoints = folder / run_folder.CHECKPOINTS
    return Loop(
        trainer,
        intervals,
        Evaluator(
            source, comm, config.train.eval_batch, trainer.feed.device, config.data.num_workers
        ),
        Checkpointer(checkpoints, comm, config.checkpoint.keep_last, source.identity),
        sinks,
        Agreement(
            comm,
            stops,
            source.unreadable,
            source.num_train,
            source.num_eval,
            config.data.tolerated_bad_fraction,
            intervals.checkpoint_seconds,
        ),
        take_snapshot,
        None if steps is None else Profile(*steps, folder / "profile", comm),
    )


def _stop_requests(
    config: Config, folder: Path | None, snapshots: Snapshots | None
) -> StopRequests:
    """Return this rank's stop requests; with ``folder``, also look for the stop file there.

    An elastic job keeps its requests over all attempts.
    """
    stops = StopRequests.within(config.run.max_hours) if snapshots is None else snapshots.stops
    return stops.with_file(None if folder is None else folder / run_folder.STOP)
