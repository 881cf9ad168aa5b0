"""Starting from somebody's weights; imports options and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hvd_lars.errors import UserError
from hvd_lars.models.options import last_linear


def load_weights(model: nn.Module, path: str, num_classes: int) -> list[str]:
    """Copy the weights in ``path`` into ``model``; no code in the file is run.

    Args:
        model: changed in place, or not at all.
        path: a run folder or one of its checkpoints, a ``.safetensors`` file, or a state dict
            that torch.save wrote, bare or under ``state_dict`` or ``model``.
        num_classes: of ``model``; a classifying layer of another width is left as it is.

    Returns:
        Names of the tensors that were left as they were.

    Raises:
        UserError: nothing can be read there, or a tensor is missing, unknown or of another shape.
    """
    stored = _read(Path(path).expanduser())
    live = model.state_dict()
    head = last_linear(model, num_classes)
    prefix = next((f"{name}." for name, m in model.named_modules() if m is head), None)
    skipped = [
        name
        for name in live
        if prefix
        and name.startswith(prefix)
        and name in stored
        and stored[name].shape != live[name].shape
    ]
    absent = sorted(set(live) - set(stored))
    # Files from before torch 0.4.1 do not count batches.
    absent = [name for name in absent if not name.endswith("num_batches_tracked")]
    unknown = sorted(set(stored) - set(live))
    if absent or unknown:
        name, where = (absent[0], "the file") if absent else (unknown[0], "the model")
        raise UserError(f"model.init_from: {path}: {name} is not in {where}: it is another model")
    for name, tensor in live.items():
        if name in stored and name not in skipped and stored[name].shape != tensor.shape:
            raise UserError(
                f"model.init_from: {path}: {name} is {tuple(stored[name].shape)}, the model has "
                f"{tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name in set(stored) - set(skipped):
            live[name].copy_(stored[name])
    return skipped


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors by name."""
    try:
        if path.is_dir():
            path = _newest_checkpoint(path) / "state.safetensors"
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            inside = {n.removeprefix("model/"): t for n, t in tensors.items() if "model/" in n}
            return inside or tensors
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"model.init_from: {path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # torch.load fails in many ways on what is no state dict
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "damaged"
        raise UserError(f"model.init_from: {path}: no readable weights: {reason}") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"model.init_from: {path}: no state dict in it")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def _newest_checkpoint(folder: Path) -> Path:
    """The folder itself, or the newest checkpoint of a run folder."""
    if (folder / "state.safetensors").is_file():
        return folder
    steps = [
        p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)
    ]
    if not steps:
        raise UserError(f"model.init_from: {folder}: no checkpoint in it")
    return max(steps, key=lambda step: int(step.name.removeprefix("step-")))
