"""The folder of one run: its config, environment and data, its records and checkpoints.

These functions run on rank 0.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user, replace_text, sync

CONFIG, ENVIRONMENT, METRICS, LAYERS, CHECKPOINTS, STOP, DATA = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "layers.jsonl",
    "checkpoints",
    "STOP",
    "data.json",
)


def refuse_other_run(wanted: str) -> Path:
    """Return the folder that ``run.dir`` names; raises UserError if it holds a run already."""
    folder = expand_user(wanted, "run.dir")
    if (folder / METRICS).exists() or (folder / CONFIG).exists():
        raise UserError(
            f"run.dir: {folder} holds a run already; name another folder, or --resume it"
        )
    return folder


def refuse_running(folder: Path) -> None:
    """Raise UserError if the run's first rank is another process of this machine, still alive.

    A restart may meet one that is just ending, so it is given ten seconds.  Of another machine
    nothing can be told here.
    """
    for tries in range(21):
        try:
            facts = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
            pid, begun, host = facts["pid"], facts["process_began"], facts["host"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        alive = begun is not None and _process_began(pid) == begun
        if host != socket.gethostname() or pid == os.getpid() or not alive:
            return
        if tries < 20:
            time.sleep(0.5)
    raise UserError(
        f"run.dir: {folder} is in use: its run is process {pid} of this machine, which has not "
        f"ended; name another folder, or stop it"
    )


def refuse_moved(file: Path, named: str) -> None:
    """Raise UserError if ``file`` is the config of a run whose ``run.dir`` names another folder."""
    folder = file.parent
    if file.name != CONFIG or not (folder / ENVIRONMENT).is_file():
        return
    if expand_user(named, "run.dir").resolve() != folder.resolve():
        raise UserError(
            f"run.dir: found {named} in {file}, whose run is in {folder}: it was moved, or copied; "
            f"add run.dir={folder} to go on there"
        )


def _process_began(pid: int) -> int | None:
    """Return when a process began, in the kernel's ticks; None if there is none, or no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(fields[18])


def create_run_folder(
    wanted: str | None, name: str, again: bool = False, inside: str = CHECKPOINTS
) -> Path:
    """Create and return the run's folder: ``wanted``, or a new ``runs/<name>-<time>``.

    ``inside`` is a folder to create in it.

    It belongs to this run alone: of two that start at once, only one creates the folder or the
    file that claims it.

    Raises:
        UserError: it cannot be written, or holds a run already and ``again`` is false.
    """
    unnamed = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = expand_user(wanted, "run.dir") if wanted else unnamed
    try:
        if wanted is None:
            folder = _make_new(unnamed)
        elif not again:
            refuse_other_run(wanted)
        (folder / inside).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        if wanted is not None and not again:
            (folder / CONFIG).touch(exist_ok=False)
    except FileExistsError as error:
        if Path(error.filename or "").name == CONFIG:  # another run claimed it first
            refuse_other_run(str(wanted))
        raise UserError(f"run.dir: {folder} cannot be written: {error.strerror}") from None
    except OSError as error:
        raise UserError(f"run.dir: {folder} cannot be written: {error.strerror}") from None
    return folder


def _make_new(folder: Path) -> Path:
    """Create ``folder``, with a number appended to its name if that is taken."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        found = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            found.mkdir()
        except FileExistsError:
            continue
        return found
    raise AssertionError("there is always a next number")


# Overrides to read a run's config: its backend and world size do not bind the reader.
ANYWHERE = ("comm.backend=auto", "run.expect_world_size=null")


def config_of(folder: Path) -> str:
    """Return the path of a run's config; raises UserError if the folder holds no run."""
    require_run(folder)
    return str(folder / CONFIG)


def require_run(folder: Path) -> None:
    """Raise UserError if the folder holds no run."""
    if not (folder / CONFIG).is_file():
        reason = f"no {CONFIG} in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: not a run folder: {reason}")


def describe_run(
    folder: Path,
    config_yaml: str,
    data: dict[str, Any],
    machine: dict[str, Any],
) -> None:
    """Write the resolved config, the data's identity, and the environment with ``machine``.

    The environment also tells this process, for :func:`refuse_running`.
    """
    replace_text(folder / CONFIG, config_yaml)
    replace_text(folder / DATA, json.dumps(data) + "\n")
    process = {"pid": os.getpid(), "process_began": _process_began(os.getpid())}
    facts = environment_facts() | process | machine
    replace_text(folder / ENVIRONMENT, json.dumps(facts, indent=2) + "\n")


def leave(folder: Path) -> None:
    """Remove what a run that could not begin has made in its folder, and the folder if empty."""
    for name in (CONFIG, DATA, ENVIRONMENT):
        (folder / name).unlink(missing_ok=True)
    for each in (folder / CHECKPOINTS, folder):
        with suppress(OSError):  # there is something else in it
            each.rmdir()


def forget_after(folder: Path, step: int) -> None:
    """Drop the records of steps after ``step``, and torn lines."""
    for path in (folder / METRICS, folder / LAYERS):
        if path.exists():
            _cut(path, step)


def _cut(path: Path, step: int) -> None:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
            if line.endswith(b"\n") and int(record["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    draft = path.with_suffix(".tmp")
    draft.write_bytes(b"".join(kept))
    sync(draft)
    draft.rename(path)


def environment_facts() -> dict[str, Any]:
    """Return machine, versions and command line, for environment.json and ``doctor``."""
    packages = ("hvd_lars", "torch", "torchvision", "horovod", "mpi4py", "numpy", "pydantic")
    return {
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _commit() -> str | None:
    """Return the checkout's commit, with ``-dirty`` if files differ; None outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match=-"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git on this machine
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
