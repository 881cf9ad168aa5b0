"""``hvd-lars tune``: search for the best values of a config's keys."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from statistics import stdev
from typing import TYPE_CHECKING, Any

from hvd_lars.cli.command import add_config, load_config
from hvd_lars.runtime.terminal import tell

if TYPE_CHECKING:
    from hvd_lars.assemble.tune import Tuned
    from hvd_lars.comm import Communicator, Launch
    from hvd_lars.config.schema import Config
    from hvd_lars.tuning import TuneSettings
    from hvd_lars.tuning.study import Trial

NAME, HELP = "tune", "search for the best values of keys, trial after trial over the ranks"
EPILOG = (
    "Example: horovodrun -np 4 hvd-lars tune my.yaml "
    '"tune={space: {schedule.base_lr: {log: [1, 64]}}, trials: 20, duration: 5 epochs}"'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, overrides and what to resume."""
    add_config(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the study in run.dir, or start it there if there is none",
    )


def read_config(options: argparse.Namespace) -> Config:
    """Read the config with its overrides, and check the keys to tune."""
    config = load_config(options.config, options.overrides)
    from hvd_lars.config.trials import check_space

    check_space(config)
    return config


def run(options: argparse.Namespace, config: Config, comm: Communicator, launch: Launch) -> int:
    """Run the trials; rank 0 prints a line after each."""
    from hvd_lars.assemble.tune import tune
    from hvd_lars.health.stop_requests import STOP_FILE

    settings = config.tune
    assert settings is not None
    total = len(settings.grid()) if settings.sampler == "grid" else settings.trials

    def note(trial: Trial, seconds: float) -> None:
        tell(f"trial {trial.number + 1} of {total}: {describe(trial, settings)}, {seconds:.1f} s")

    found = tune(config, comm, launch, options.resume, note)
    if comm.rank == 0:
        _tell_end(found, settings)
    if found.stopped is None or found.stopped == STOP_FILE:
        return 0
    return os.EX_TEMPFAIL


def _tell_end(found: Tuned, settings: TuneSettings) -> None:
    folder = found.folder
    if found.stopped is not None:
        ended = sum(trial.ended != "running" for trial in found.trials)
        tell(
            f"stopped by {found.stopped} after {ended} trials; --resume run.dir={folder} continues"
        )
    if found.best is None:
        if found.stopped is None:
            tell(f"{folder}: no trial finished: see the lines above")
        return
    tell(f"best: trial {found.best.number + 1}: {describe(found.best, settings)}")
    tell(f"hvd-lars train {folder}/best.yaml trains with it; hvd-lars report {folder} shows all")


def describe(trial: Trial, settings: TuneSettings) -> str:
    """Return a trial's values and how it ended, on one line."""
    from hvd_lars.tuning.study import shown

    values = ", ".join(f"{name} {shown(value)}" for name, value in named(trial.params).items())
    if trial.ended == "pruned":
        curve = trial.curve or {}
        last = max(curve, default=0)
        return f"{values}: pruned at evaluation {last}, {settings.metric} {curve[last]:.4f}"
    if trial.value is None:
        return f"{values}: {trial.ended}"
    spread = f" ± {stdev(trial.values):.4f}" if len(trial.values) > 1 else ""
    seeds = f" ({len(trial.values)} seeds)" if len(trial.values) > 1 else ""
    return f"{values}: {settings.metric} {trial.value:.4f}{spread}{seeds}"


def named(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by their keys' last part, where that is unique."""
    last = [key.rpartition(".")[2] for key in params]
    return {
        part if last.count(part) == 1 else key: value
        for (key, value), part in zip(params.items(), last, strict=True)
    }
