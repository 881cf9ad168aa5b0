"""A command of ``hvd-lars``: a module that parses its own arguments and runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hvd_lars.cli import completion

if TYPE_CHECKING:
    from hvd_lars.comm import Communicator, Launch
    from hvd_lars.config.schema import Config


class Command(Protocol):
    """A command's module; imports nothing heavy, as every start parses all commands' arguments."""

    NAME: str
    HELP: str  # one line
    EPILOG: str  # an example

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of the command."""
        ...


class Tool(Command, Protocol):
    """A command that runs in one process."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the command; return the exit code, or raise UserError for a mistake of the user."""
        ...


class RanksCommand(Command, Protocol):
    """A command that every rank of a launcher runs."""

    def read_config(self, options: argparse.Namespace) -> Config:
        """Read the config before torch is imported: most mistakes are in it."""
        ...

    def run(
        self, options: argparse.Namespace, config: Config, comm: Communicator, launch: Launch
    ) -> int:
        """Run the command on this rank; return the exit code."""
        ...


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config; import pydantic only here, as not all commands need it."""
    from hvd_lars.config import file

    return file.load_config(name, overrides)


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add CONFIG and overrides of its keys."""
    text = "a YAML file or a bundled config's name"
    if default is None:
        config = parser.add_argument("config", metavar="CONFIG", help=text)
    else:
        text += f"; default {default}"
        config = parser.add_argument(
            "config", metavar="CONFIG", nargs="?", default=default, help=text
        )
    completed(config, completion.configs)
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``key.sub=value`` arguments."""
    text = "replace a value of the config"
    action = parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help=text)
    completed(action, completion.overrides)


def completed(action: argparse.Action, completer: Callable[..., list[str]]) -> None:
    """Let a shell complete an argument."""
    action.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks for it


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Add a run folder and the choice of its checkpoint."""
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest (the newest sound one), best (greatest top-1), a step, or a path",
    )
