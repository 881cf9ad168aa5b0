"""The command line of ``hvd-lars``, and its commands by name."""

from __future__ import annotations

import argparse
import os

import hvd_lars
from hvd_lars.cli import (
    bench,
    check,
    completion,
    doctor,
    evaluate,
    export,
    launch,
    pack,
    plan,
    report,
    schema,
    train,
    tune,
)
from hvd_lars.cli.command import Command, RanksCommand, Tool

_ON_RANKS: tuple[RanksCommand, ...] = (train, evaluate, bench, tune)
_TOOLS: tuple[Tool, ...] = (export, check, plan, pack, launch, report, schema, doctor)
ON_RANKS = {command.NAME: command for command in _ON_RANKS}
TOOLS = {command.NAME: command for command in _TOOLS}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line with overrides and options in any order."""
    parser = _parser()
    if completion.VARIABLE in os.environ:
        completion.complete(parser)
    options, rest = parser.parse_known_args(arguments)
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(late) < len(rest) or (late and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        options.overrides += late
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvd-lars",
        description="Train image classifiers with enormous batches: LARS over Horovod and MPI.",
        epilog="Start several ranks with: horovodrun -np N hvd-lars train CONFIG",
    )
    parser.add_argument("--version", action="version", version=f"hvd-lars {hvd_lars.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every: tuple[Command, ...] = (*_ON_RANKS, *_TOOLS)
    for command in every:
        own = commands.add_parser(
            command.NAME, help=command.HELP, description=command.HELP, epilog=command.EPILOG
        )
        command.add_arguments(own)
    return parser
