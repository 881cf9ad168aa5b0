"""Checkpoints as folders on a file system, each whole or absent.

``step-N/`` holds every tensor by name in safetensors, the progress and the data's identity as JSON
and, written last, a manifest with all sizes and SHA-256.  Loading runs no code from a file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hvd_lars.data.identity import DataIdentity
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import let_umask_decide, sha256_of, sync
from hvd_lars.state.progress import Progress

_TENSORS, _PROGRESS, _DATA, _MANIFEST, _LATEST = (
    "state.safetensors",
    "progress.json",
    "data.json",
    "manifest.json",
    "latest",
)


@dataclass(frozen=True)
class Found:
    """A sound checkpoint, and the errors of newer ones that were passed over.

    ``data`` is the identity of its data; None if not recorded.
    """

    folder: Path
    progress: Progress
    names: tuple[str, ...]
    passed_over: tuple[str, ...]
    data: DataIdentity | None = None


def folder_of(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` steps."""
    return folder / f"step-{step:08d}"


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    keep_last: int,
    data: DataIdentity | None = None,
) -> None:
    """Write ``step-N`` under another name, sync it, rename it, and delete old ones.

    The newest ``keep_last`` and the one with the greatest ``top1`` are kept.

    Raises:
        UserError, OSError: writing fails; earlier checkpoints are untouched.
    """
    target = folder_of(folder, progress["step"])
    draft = target.with_suffix(".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        save_file(dict(tensors), draft / _TENSORS)
        let_umask_decide(draft / _TENSORS)
        (draft / _PROGRESS).write_text(json.dumps(dict(progress), indent=2))
        if data is not None:
            (draft / _DATA).write_text(json.dumps(data.record()))
        files = sorted(path.name for path in draft.iterdir())
        manifest = {name: _fingerprint(draft / name) for name in files}
        (draft / _MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in (*draft.iterdir(), draft):
            sync(path)
    except (SafetensorError, OSError) as error:  # safetensors wraps the operating system's errors
        shutil.rmtree(draft, ignore_errors=True)  # frees space on a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{draft}: cannot be written: {reason}") from None
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    pointer = folder / f"{_LATEST}.tmp"
    pointer.write_text(target.name + "\n")
    pointer.rename(folder / _LATEST)
    sync(folder)
    _forget(folder, keep_last)


def find(folder: Path) -> Found | None:
    """Return the newest sound checkpoint under ``folder``, or ``folder`` itself if it is one.

    Raises:
        UserError: all checkpoints are damaged; gives the newest one's error.
    """
    wrong: list[str] = []
    for path in [folder] if is_checkpoint(folder) else reversed(steps(folder)):
        try:
            return _open(path, tuple(wrong))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError(wrong[0])
    return None


def read(found: Found, live: Mapping[str, Tensor], names: list[str]) -> None:
    """Copy the file's tensors into the live ones.

    Raises:
        UserError: a name, shape or dtype does not match.
    """
    path = found.folder / _TENSORS
    absent = sorted(set(live) - set(names)) or sorted(set(names) - set(live))
    if absent:
        where = "the checkpoint" if absent[0] in live else "the model"
        raise UserError(f"{path}: tensor {absent[0]} is not in {where}; it is of another model")
    with safe_open(path, framework="pt") as tensors, torch.no_grad():
        for name, tensor in live.items():
            stored = tensors.get_tensor(name)
            if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
                raise UserError(
                    f"{path}: {name} is {tuple(stored.shape)} {stored.dtype}, the model has "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )
            tensor.copy_(stored)


def tensors_of(found: Found, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without the prefix."""
    with safe_open(found.folder / _TENSORS, framework="pt") as tensors:
        names = [name for name in found.names if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}


def is_checkpoint(folder: Path) -> bool:
    """Return whether the folder's name is a checkpoint's."""
    return re.fullmatch(r"step-\d+", folder.absolute().name) is not None


def choose(folder: Path, which: str) -> Path:
    """Return the checkpoint under ``folder`` that ``which`` selects.

    ``latest`` is ``folder`` itself, from which :func:`find` takes the newest sound one; ``best``
    is the one with the greatest top-1 among evaluated steps; a number is a step; anything else is
    the path of a checkpoint.

    Raises:
        UserError: there is no such checkpoint.
    """
    there = steps(folder)
    if which == "latest":
        return folder
    if which == "best":
        best = max(there, key=_top1, default=None)
        if best is None or _top1(best) < 0.0:
            raise UserError(f"--checkpoint best: no checkpoint in {folder} was evaluated")
        return best
    if re.fullmatch(r"[0-9]+", which):
        path = folder_of(folder, int(which))
        if path not in there:
            kept = ", ".join(str(int(each.name.removeprefix("step-"))) for each in there)
            raise UserError(f"--checkpoint {which}: not found; {folder} has steps {kept or 'none'}")
        return path
    path = folder / which if (folder / which).is_dir() else Path(which)
    if not is_checkpoint(path) or not path.is_dir():
        raise UserError(
            f"--checkpoint {which}: no checkpoint there (a folder step-N); allowed: latest, best, "
            f"a step, or a path"
        )
    return path


def steps(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _open(folder: Path, passed_over: tuple[str, ...]) -> Found:
    """Check a checkpoint's files, then read its progress and tensor names."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        for name in (_TENSORS, _PROGRESS, *({_DATA} & set(manifest))):
            if manifest[name] != _fingerprint(folder / name):
                raise UserError(f"{folder / name}: damaged: does not match {_MANIFEST}")
        progress = Progress.from_json((folder / _PROGRESS).read_text())
        with safe_open(folder / _TENSORS, framework="pt") as tensors:
            names = tuple(tensors.keys())
        data = None
        if _DATA in manifest:
            data = DataIdentity.from_json((folder / _DATA).read_bytes())
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, OSError) as error:
        raise UserError(f"{folder}: damaged checkpoint: {error}") from None
    return Found(folder, progress, names, passed_over, data)


def _forget(folder: Path, keep_last: int) -> None:
    found = steps(folder)
    best = {max(found, key=_top1)} if any(_top1(each) >= 0.0 for each in found) else set()
    for old in set(found[:-keep_last]) - best:
        shutil.rmtree(old, ignore_errors=True)


def _top1(folder: Path) -> float:
    try:
        top1 = json.loads((folder / _PROGRESS).read_text())["top1"]
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0
    return float(top1) if isinstance(top1, (int, float)) else -1.0


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
