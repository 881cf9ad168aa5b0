"""``hvd-lars launch``: the right command for where one is."""

from __future__ import annotations

import argparse
import os

from hvd_lars.cli.command import add_config, load_config
from hvd_lars.errors import UserError
from hvd_lars.launchers.kinds import KINDS, start_of
from hvd_lars.launchers.start import Request
from hvd_lars.launchers.submit import submit

NAME, HELP = "launch", "start training where one is: here, on hosts, in a scheduler's queue"
EPILOG = "CONFIG, overrides and --resume are those of train."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What starts the ranks, how many and where; then as for train."""
    parser.add_argument("--on", choices=tuple(KINDS), required=True, help="what starts the ranks")
    parser.add_argument("-np", type=int, metavar="N", dest="ranks", help="ranks")
    parser.add_argument("--hosts", metavar="a:4,b:4", help="hosts with their slots")
    parser.add_argument("--nic", metavar="NAME", help="interface that all traffic keeps to")
    parser.add_argument("--print-only", action="store_true", help="print the command")
    parser.add_argument("--resume", action="store_true", help="as for train")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    """Become the command, or print it."""
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"-np: found {options.ranks}; must be 1 or more")
    load_config(options.config, options.overrides)  # mistakes come before a queue
    resume = ["--resume"] if options.resume else []
    training = [options.config, *options.overrides, *resume]
    request = Request(options.on, training, options.ranks, options.hosts, options.nic, os.environ)
    return submit(start_of(request), options.print_only)
