"""``hvd-lars train``: train on every rank."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_lars.cli.command import add_config, load_config
from hvd_lars.runtime.terminal import tell
from hvd_lars.state.run_folder import refuse_moved

if TYPE_CHECKING:
    from hvd_lars.comm import Communicator, Launch
    from hvd_lars.config.schema import Config
    from hvd_lars.state.snapshots import Snapshots

NAME, HELP = "train", "train, on every rank that the launcher starts"
EPILOG = "Example: horovodrun -np 4 hvd-lars train digits schedule.base_lr=16 run.dir=runs/a"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, overrides, and what to resume."""
    add_config(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume in run.dir from its newest checkpoint, or start there if it has none",
    )
    parser.add_argument(
        "--resume-from",
        type=Path,
        metavar="PATH",
        help="start from a run folder or a checkpoint; with --resume, unless run.dir has its own",
    )
    parser.add_argument("--quiet", action="store_true", help="same as run.console=none")


def read_config(options: argparse.Namespace) -> Config:
    """Read the config with its overrides.

    Raises:
        UserError: it is wrong, or a run folder's that names another folder, as after a move.
    """
    quiet = ["run.console=none"] if options.quiet else []
    config = load_config(options.config, [*options.overrides, *quiet])
    if options.resume and config.run.dir is not None and "run.dir" not in _given(options):
        refuse_moved(Path(options.config), config.run.dir)
    return config


def _given(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the keys that are set on the command line."""
    return tuple(text.partition("=")[0] for text in options.overrides)


def run(options: argparse.Namespace, config: Config, comm: Communicator, launch: Launch) -> int:
    """Train; return the exit code."""
    return train(options, config, comm, launch)


def train(
    options: argparse.Namespace,
    config: Config,
    comm: Communicator,
    launch: Launch,
    snapshots: Snapshots | None = None,
    after_snapshot: Callable[[], None] = lambda: None,
) -> int:
    """Train; return the exit code: 0, or 75 if the run was stopped and should be resumed.

    ``snapshots`` and ``after_snapshot`` are those of an elastic job; see ``build_run``.
    """
    from hvd_lars.assemble.resuming import Resume
    from hvd_lars.assemble.run import build_run
    from hvd_lars.health.stop_requests import STOP_FILE
    from hvd_lars.health.watchdog import Watchdog

    resume = None
    if options.resume or options.resume_from is not None:
        resume = Resume(options.resume_from, _given(options), again=options.resume)
    loop, folder = build_run(config, comm, launch, resume, snapshots, after_snapshot)
    run = config.run
    elastic = snapshots is not None
    watchdog = Watchdog(comm, loop.position, run.rank_timeout, run.stall_timeout, elastic)
    with loop.agreement.stops.listening(), watchdog.watching():
        if comm.rank == 0:
            ranks = f"{comm.size} rank{'s' if comm.size > 1 else ''} on {comm.backend}"
            done = loop.state.progress.step
            tell(
                f"{config.run.name}: {ranks}, run folder {folder}"
                f"{f', resuming after step {done}' if done else ''}"
            )
        summary = loop.run()
    if summary.stopped is not None:
        if comm.rank == 0:
            tell(
                f"stopped by {summary.stopped} after step {loop.state.progress.step}, saved in "
                f"{summary.checkpoint}; --resume continues"
            )
        return 0 if summary.stopped == STOP_FILE else os.EX_TEMPFAIL
    result, skipped = summary.evaluation, loop.state.progress.skipped_steps
    if comm.rank == 0 and result is None:
        tell(f"nothing is left to do: all {loop.intervals.total} steps are done")
    elif comm.rank == 0 and result is not None:
        tell(
            f"done in {summary.seconds:.1f} s: top-1 {result.top1:.4f} on {result.num_samples} "
            f"images, {summary.images_per_second:,.0f} images/s, run folder {folder}"
            + (f"; {skipped:,} of {loop.intervals.total:,} steps skipped" if skipped else "")
        )
    return 0
