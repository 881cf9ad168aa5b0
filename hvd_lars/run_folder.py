"""The folder of one run: config.yaml, environment.json, metrics.jsonl, layers.jsonl, checkpoints/.

Imports errors and files.  Its functions run on rank 0.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from hvd_lars.errors import UserError
from hvd_lars.files import sync

CONFIG, ENVIRONMENT, METRICS, LAYERS, CHECKPOINTS, STOP = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "layers.jsonl",
    "checkpoints",
    "STOP",
)


def create_run_folder(wanted: str | None, name: str, again: bool = False) -> Path:
    """Make and return the run's folder: ``wanted``, or ``runs/<name>-<time>``.

    Raises:
        UserError: it cannot be written, or holds a run already and is not to be used ``again``.
    """
    unnamed = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(wanted).expanduser() if wanted else unnamed
    if not again and ((folder / METRICS).exists() or (folder / CONFIG).exists()):
        raise UserError(
            f"run.dir: {folder} holds a run already; name another folder, or --resume it"
        )
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"run.dir: {folder} cannot be written: {error.strerror}") from None
    return folder


def require_run(folder: Path) -> None:
    """Raise UserError where the folder holds no run."""
    if not (folder / CONFIG).is_file():
        reason = f"no {CONFIG} in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: not a run folder: {reason}")


def describe_run(
    folder: Path, config_yaml: str, ranks: dict[str, Any], device: str, threads: int
) -> None:
    """Write the resolved config and what it runs on."""
    (folder / CONFIG).write_text(config_yaml, encoding="utf-8")
    facts = environment_facts() | {"device": device, "threads": threads} | ranks
    (folder / ENVIRONMENT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def forget_after(folder: Path, step: int) -> None:
    """Cut what was recorded to what is of steps up to ``step``; torn lines go, too."""
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
    """Machine, versions and command line, for environment.json and ``doctor``."""
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
    """The checkout's commit, with ``-dirty`` where files differ; None outside a checkout."""
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
