"""Running, or printing, the command that starts training."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from hvd_lars.errors import UserError
from hvd_lars.launchers.local import launcher_environment
from hvd_lars.launchers.start import Start


def submit(start: Start, print_only: bool) -> int:
    """Run the command or print it; return its exit code.

    Raises:
        UserError: the launcher is not on this machine.
    """
    environment = launcher_environment() | start.variables
    if print_only:
        print(_resolved(start, environment))
        return 0
    try:
        if start.stdin is None:
            os.execvpe(start.command[0], start.command, environment)  # so signals reach it directly
        text = start.stdin.read_text() if isinstance(start.stdin, Path) else start.stdin
        done = subprocess.run(start.command, env=environment, input=text, text=True, check=False)
        return done.returncode
    except FileNotFoundError:
        raise UserError(f"{start.command[0]}: no such program on this machine") from None


def _resolved(start: Start, environment: Mapping[str, str]) -> str:
    """Return the command line; for a script of launch/, the command that it assembles."""
    if start.command[0] != "bash":
        return start.line()
    result = subprocess.run(
        start.command,
        env={**environment, "PRINT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise UserError(result.stderr.strip() or f"{start.command[1]} failed")
    return shlex.join(shlex.split(result.stdout))
