"""Saving and restoring the state of training; imports replicas, optim, comm, files and errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.errors import UserError
from hvd_lars.files import let_umask_decide, sha256_of, sync
from hvd_lars.optim import LARS
from hvd_lars.replicas import average_buffers, broadcast_and_verify, named_state

_TENSORS, _PROGRESS, _MANIFEST = "state.safetensors", "progress.json", "manifest.json"


@final
class Checkpointer:
    """Folders ``step-N`` under one folder, each whole or absent, the newest ``keep_last`` kept.

    A folder holds every tensor by name in safetensors, the progress as JSON, and last of all a
    manifest with sizes and SHA-256.  It is written under another name, synced, and renamed.
    Loading runs no code from the file.
    """

    def __init__(self, folder: Path, comm: Communicator, keep_last: int = 2) -> None:
        self._folder, self._comm, self._keep_last = folder, comm, keep_last

    def save(
        self,
        model: nn.Module,
        optimizer: LARS,
        progress: Mapping[str, Any],
        average: nn.Module | None = None,
    ) -> Path:
        """Write ``step-N`` with N = progress["step"]; collective, rank 0 writes.

        Raises:
            UserError: on every rank, when the file system refuses; earlier ones are untouched.
        """
        average_buffers(model, self._comm)
        if average is not None:
            average_buffers(average, self._comm)
        target = self._folder / f"step-{progress['step']:08d}"
        state = named_state(model, optimizer, average)
        on_root(self._comm, lambda: self._write(target, state, progress))
        return target

    def restore(
        self,
        model: nn.Module,
        optimizer: LARS | None = None,
        average: nn.Module | None = None,
    ) -> dict[str, Any]:
        """Load the newest checkpoint on every rank and return its progress; collective.

        Only rank 0 reads.  Momentum is sent before parameters, and a checksum then proves that
        all ranks hold the same bits.

        Raises:
            UserError: on every rank: there is none, it is damaged, or it is of another model.
        """
        source, progress, names = on_root(self._comm, self._open_latest)
        live = named_state(model, average=average)
        momentum = {}
        if optimizer is not None:
            momentum = {
                param: torch.zeros_like(param)
                for name, param in model.named_parameters()
                if f"momentum/{name}" in names
            }
            live = {
                f"momentum/{name}": momentum[param]
                for name, param in model.named_parameters()
                if param in momentum
            } | live
        wanted = {name.partition("/")[0] for name in live} | {"model"}
        names = [name for name in names if name.partition("/")[0] in wanted]
        on_root(self._comm, lambda: _read(source / _TENSORS, live, names))
        broadcast_and_verify(live, self._comm)
        for param, value in momentum.items():
            assert optimizer is not None
            optimizer.set_momentum(param, value)
        return progress

    def _write(
        self, target: Path, state: Mapping[str, Tensor], progress: Mapping[str, Any]
    ) -> None:
        draft = target.with_suffix(".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            # Copies, since safetensors refuses tensors that share memory (tied weights).
            tensors = {
                name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items()
            }
            save_file(tensors, draft / _TENSORS)
            let_umask_decide(draft / _TENSORS)
            (draft / _PROGRESS).write_text(json.dumps(dict(progress), indent=2))
            manifest = {name: _fingerprint(draft / name) for name in (_TENSORS, _PROGRESS)}
            (draft / _MANIFEST).write_text(json.dumps(manifest, indent=2))
            for path in (*draft.iterdir(), draft):
                sync(path)
        except SafetensorError as error:  # it wraps the operating system's errors
            raise UserError(f"{draft}: cannot be written: {error}") from None
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        sync(self._folder)
        for old in _steps(self._folder)[: -self._keep_last]:
            shutil.rmtree(old, ignore_errors=True)

    def _open_latest(self) -> tuple[Path, dict[str, Any], list[str]]:
        """The newest checkpoint's folder, progress and tensor names, after checking its files."""
        steps = _steps(self._folder)
        if not steps:
            raise UserError(f"{self._folder}: no checkpoint (a folder step-N) in it")
        source = steps[-1]
        try:
            manifest = json.loads((source / _MANIFEST).read_text())
            for name in (_TENSORS, _PROGRESS):
                if manifest[name] != _fingerprint(source / name):
                    raise UserError(f"{source / name}: damaged: not what {_MANIFEST} says")
            progress = json.loads((source / _PROGRESS).read_text())
            with safe_open(source / _TENSORS, framework="pt") as tensors:
                names = list(tensors.keys())
        except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
            raise UserError(f"{source}: damaged checkpoint: {error}") from None
        return source, progress, names


def _steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _read(path: Path, live: Mapping[str, Tensor], names: list[str]) -> None:
    """Copy the file's tensors into the live ones; every name and shape must match."""
    absent = sorted(set(live) - set(names)) or sorted(set(names) - set(live))
    if absent:
        where = "the checkpoint" if absent[0] in live else "the model"
        raise UserError(f"{path}: {absent[0]} is not in {where}: it is of another model")
    with safe_open(path, framework="pt") as tensors, torch.no_grad():
        for name, tensor in live.items():
            stored = tensors.get_tensor(name)
            if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
                raise UserError(
                    f"{path}: {name} is {tuple(stored.shape)} {stored.dtype}, the model has "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )
            tensor.copy_(stored)
