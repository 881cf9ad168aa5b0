"""``hvd-lars eval``: evaluate a checkpoint of a run on the test images."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from hvd_lars.cli.command import add_overrides, add_run_folder, load_config
from hvd_lars.runtime.terminal import answer
from hvd_lars.state.run_folder import ANYWHERE, config_of

if TYPE_CHECKING:
    from hvd_lars.comm import Communicator, Launch
    from hvd_lars.config.schema import Config

NAME, HELP = "eval", "evaluate a checkpoint of a run"
EPILOG = "Example: mpirun -np 4 hvd-lars eval runs/a --checkpoint best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folder, its checkpoint, and overrides of its config."""
    add_run_folder(parser)
    add_overrides(parser)


def read_config(options: argparse.Namespace) -> Config:
    """Read the run's config with overrides."""
    return load_config(config_of(options.run_folder), [*ANYWHERE, *options.overrides])


def run(options: argparse.Namespace, config: Config, comm: Communicator, launch: Launch) -> int:
    """Evaluate; rank 0 prints one JSON object."""
    from hvd_lars.assemble.evaluation import evaluate_run
    from hvd_lars.metrics import finite

    result, average = evaluate_run(options.run_folder, config, comm, launch, options.checkpoint)
    record = result.record() | ({} if average is None else average.record("ema_"))
    if comm.rank == 0:
        answer(json.dumps(finite(record)))
    return 0
