"""Read named tensors from the usual weight files.

No code in a file is run: anything but a tensor or a plain value becomes an inert object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user

_FOLDER_FILES = ("state.safetensors", "model.safetensors", "pytorch_model.bin")  # ours, the Hub's
_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
_EMA_KEYS = (
    "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema",
)  # fmt: skip
_DEPTH = 4  # of nested dictionaries
_CONVERT = (
    "it holds objects beside tensors; convert it where it was made: "
    "torch.save(model.state_dict(), 'weights.pth')"
)


@dataclass(frozen=True)
class Stored:
    """A file's tensors by name, and in words where in the file they were found."""

    tensors: dict[str, Tensor]
    found: tuple[str, ...]


class Inert:
    """Stands in for an object of an unknown class; keeps its state without acting."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_weights(path: str) -> Stored:
    """Read a run folder or checkpoint, a ``.safetensors`` file, or a file of torch.save.

    Raises:
        UserError: it cannot be read or holds no named tensors.
    """
    file = expand_user(path, "model.init_from")
    try:
        if file.is_dir():
            file = _file_in(file)
        with file.open("rb") as opened:  # an error here names the file
            head = opened.read(9)
        if file.suffix == ".safetensors" or (
            head[8:] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size
        ):
            return _of_safetensors(load_file(file))
        found = _load(file)
    except OSError as error:
        raise UserError(f"model.init_from: {path}: cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        raise UserError(f"model.init_from: {path}: no readable weights: {error}") from None
    where: list[str] = []
    tensors = dict(_tensors_in(_inside(found, where, _DEPTH), ""))
    if not tensors:
        raise UserError(f"model.init_from: {path}: no state dict in it")
    return Stored(tensors, tuple(where))


def _file_in(folder: Path) -> Path:
    """Return the weight file in a folder, or in the newest checkpoint of a run folder."""
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    inside = folder / "checkpoints"
    steps = [
        path
        for path in (inside if inside.is_dir() else folder).glob("step-*")
        if re.fullmatch(r"step-\d+", path.name)
    ]
    if not steps:
        raise UserError(
            f"model.init_from: {folder}: no checkpoint in it, nor {' or '.join(_FOLDER_FILES[1:])}"
        )
    return max(steps, key=lambda step: int(step.name.removeprefix("step-"))) / _FOLDER_FILES[0]


def _of_safetensors(tensors: dict[str, Tensor]) -> Stored:
    ours = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    return Stored(ours, ("an hvd-lars checkpoint",)) if ours else Stored(tensors, ())


def _load(file: Path) -> Any:
    """Load a file of torch.save, with :class:`Inert` for all but tensors and plain values."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # fails in many ways on anything but a state dict
        first = error
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        stand_ins: list[Any] = [(type("Inert", (Inert,), {}), name) for name in unknown]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # not a zip file, or an object that needs more than a state
        known = "global" in str(first).lower()
        reason = _CONVERT if known else "torch.save did not write it, or it is damaged"
        raise UserError(f"model.init_from: {file}: no readable weights: {reason}") from None


def _inside(found: Any, where: list[str], depth: int) -> Any:
    """Find the dictionary of tensors in nested ones; prefers plain to averaged weights."""
    if not isinstance(found, Mapping) or depth == 0:
        return found
    there = [key for key in (*_KEYS, *_EMA_KEYS) if isinstance(found.get(key), (Mapping, Inert))]
    for key in there:
        below: list[str] = []
        inner = _inside(found[key], below, depth - 1)
        if any(True for _ in _tensors_in(inner, "")):
            others = [other for other in there if other != key]
            beside = f" (beside {', '.join(others)})" if others else ""
            where += [f"its key {key}{beside}", *below]
            return inner
    return found


def _tensors_in(found: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name from a dictionary or from a whole saved module."""
    if isinstance(found, Inert):
        state = found.state if isinstance(found.state, Mapping) else {}
        for part in ("_parameters", "_buffers"):
            yield from _tensors_in(state.get(part), prefix)
        modules = state.get("_modules")
        for name, module in modules.items() if isinstance(modules, Mapping) else ():
            yield from _tensors_in(module, f"{prefix}{name}.")
    elif isinstance(found, Mapping):
        for name, value in found.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value.detach()
