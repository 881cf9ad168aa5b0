"""Create the sinks of a run's records."""

from __future__ import annotations

import sys
from pathlib import Path

from hvd_lars.config.binding import values_of
from hvd_lars.config.schema import Config
from hvd_lars.metrics import Bar, Console, JsonLines, Sink, make_logger
from hvd_lars.state import run_folder


def make_sinks(
    config: Config, folder: Path, total_steps: int, alone: bool, step: int
) -> list[Sink]:
    """Return rank 0's sinks: files in the run folder, the console, and other loggers.

    ``step``: that the run goes on from.  ``alone``: no launcher is between this process and the
    terminal.  (mpirun gives its ranks a terminal of their own, wherever their output goes.)
    """
    sinks: list[Sink] = [
        JsonLines(folder / run_folder.METRICS, ("train", "eval", "event")),
        JsonLines(folder / run_folder.LAYERS, ("layers",)),
    ]
    console = config.run.console
    if console == "auto":
        console = "bar" if alone and sys.stdout.isatty() else "lines"
    if console == "bar":
        sinks.append(Bar(total_steps))
    elif console == "lines":
        sinks.append(Console(total_steps))
    values = {k: v for k, v in values_of(config).items() if not k.startswith(("recipe", "extends"))}
    return sinks + [make_logger(name, folder, values, step) for name in config.run.loggers]
