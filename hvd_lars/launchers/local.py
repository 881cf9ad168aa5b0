"""Commands that start ranks on this machine."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

LAUNCHERS = ("mpirun", "horovodrun", "horovodrun --gloo")


def launcher_environment() -> dict[str, str]:
    """Return the environment with the Python environment's programs at the end of PATH.

    A site's own MPI comes first, as it did when Horovod was built; without one, mpirun is that
    installed by pip beside Python, whether or not the environment is activated.
    """
    scripts = sysconfig.get_path("scripts")
    return os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])}


def find_program(name: str) -> str | None:
    """Return the path of a launcher's program, or None."""
    return shutil.which(name, path=launcher_environment()["PATH"])


def mpirun_version() -> str:
    """Return the first line of ``mpirun --version``; empty without mpirun."""
    mpirun = find_program("mpirun")
    if mpirun is None:
        return ""
    result = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    lines = (result.stdout + result.stderr).strip().splitlines()
    return lines[0] if lines else ""


def local_command(launcher: str, ranks: int, program: Sequence[str]) -> list[str]:
    """Return the command that runs ``program`` on ``ranks`` ranks here, even more than cores.

    ``launcher`` is one of ``LAUNCHERS``.  Ranks are not bound to cores: Open MPI would give each
    of two ranks a single core.
    """
    if launcher.startswith("horovodrun"):
        return [find_program("horovodrun") or "horovodrun", *launcher.split()[1:]] + [
            "-np",
            str(ranks),
            *program,
        ]
    command = [find_program("mpirun") or "mpirun", "-np", str(ranks)]
    if "Open MPI" in mpirun_version() or "OpenRTE" in mpirun_version():
        command += ["--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"]
        if os.geteuid() == 0:
            command.append("--allow-run-as-root")
    return [*command, *program]


def run_here(
    launcher: str,
    ranks: int,
    program: Sequence[str],
    timeout: float,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``program`` under a launcher and return its output, including standard error.

    After ``timeout`` seconds the whole process group is killed and the exit code is 124.
    """
    process = subprocess.Popen(
        local_command(launcher, ranks, program),
        env=launcher_environment() | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 15)
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
        code = 124
    return subprocess.CompletedProcess(process.args, code, output, "")


def run_in_terminal(
    program: Sequence[str], columns: int, cwd: Path | None = None
) -> tuple[int, str]:
    """Run ``program`` in a terminal of ``columns``; return its exit code and its output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        program,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env=launcher_environment() | {"TERM": "xterm-256color", "COLUMNS": str(columns)},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    return process.wait(), shown.decode(errors="replace")


def this_python(*arguments: str) -> list[str]:
    """Return a command line of the running Python."""
    return [sys.executable, *arguments]
