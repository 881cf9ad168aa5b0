"""``hvd-lars launch``: start training with a launcher or scheduler."""

from __future__ import annotations

import argparse
import os

from hvd_lars.cli.command import add_config, load_config
from hvd_lars.errors import UserError
from hvd_lars.launchers.kinds import KINDS, start_of
from hvd_lars.launchers.start import Request
from hvd_lars.launchers.submit import submit

NAME, HELP = "launch", "start training on this machine, on hosts or in a scheduler's queue"
EPILOG = (
    "CONFIG, overrides and --resume are as for train.  "
    "Example: hvd-lars launch --on slurm -np 32 my.yaml"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the launcher, the ranks and their hosts; then arguments as for train."""
    parser.add_argument("--on", choices=tuple(KINDS), required=True, help="what starts the ranks")
    parser.add_argument("-np", type=int, metavar="N", dest="ranks", help="number of ranks")
    parser.add_argument("--hosts", metavar="a:4,b:4", help="hosts with their slots")
    parser.add_argument("--nic", metavar="NAME", help="network interface for all traffic")
    parser.add_argument("--print-only", action="store_true", help="only print the command")
    parser.add_argument("--resume", action="store_true", help="as for train")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    """Replace this process by the command, or print it."""
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"-np: found {options.ranks}; must be 1 or more")
    config = load_config(options.config, options.overrides)  # its mistakes, before it is queued
    resume = ["--resume"] if options.resume else []
    training = [options.config, *options.overrides, *resume]
    request = Request(
        options.on, training, options.ranks, options.hosts, options.nic, os.environ, config.run.dir
    )
    return submit(start_of(request), options.print_only)
