"""A command of ``hvd-lars``: a module that parses its own arguments and runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hvd_lars.comm import Communicator, Launch
    from hvd_lars.config.schema import Config


class Command(Protocol):
    """Its module imports nothing heavy: every start parses the arguments of all commands."""

    NAME: str
    HELP: str  # one line

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what stands behind the command's name."""
        ...


class Tool(Command, Protocol):
    """A command of one process."""

    def run(self, options: argparse.Namespace) -> int:
        """Run it; returns the exit code.  UserError: the user can mend it."""
        ...


class RanksCommand(Command, Protocol):
    """A command that every rank of a launcher runs."""

    def read_config(self, options: argparse.Namespace) -> Config:
        """The config, read before torch is imported: most mistakes are in it."""
        ...

    def run(
        self, options: argparse.Namespace, config: Config, comm: Communicator, launch: Launch
    ) -> int:
        """Run it on this rank; returns the exit code."""
        ...


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config as ``config.file`` does, whose import of pydantic only some commands need."""
    from hvd_lars.config import file

    return file.load_config(name, overrides)


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add CONFIG and the overrides of its keys."""
    text = "a YAML file or a bundled config's name"
    if default is None:
        parser.add_argument("config", metavar="CONFIG", help=text)
    else:
        text += f"; {default}"
        parser.add_argument("config", metavar="CONFIG", nargs="?", default=default, help=text)
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``key.sub=value`` arguments."""
    text = "replaces a value of the config"
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help=text)


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Add a run folder, and which of its checkpoints is meant."""
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest (the newest sound one), best (greatest top-1), a step, or a path",
    )
