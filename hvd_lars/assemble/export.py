"""Export the weights of a run for other programs."""

from __future__ import annotations

import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import hvd_lars
from hvd_lars.assemble.network import build_network
from hvd_lars.config.schema import Config
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import let_umask_decide, sync
from hvd_lars.state import checkpoint_files, run_folder

ENDINGS = (".safetensors", ".pth", ".pt", ".onnx")


def export(folder: Path, config: Config, output: Path, which: str, average: bool) -> str:
    """Write the network's tensors under their plain names; return a one-line summary.

    The metadata is ``model``, ``classes`` by label, ``mean`` and ``std`` of the channels in
    [0, 1], ``image_size``, ``eval_resize``, ``step`` and, for the plain weights, ``top1``.  It is
    the attribute ``hvd_lars`` of the state dict in a ``.pth`` file; a ``.safetensors`` file has
    each value as JSON in its metadata, an ``.onnx`` file in its properties.

    Args:
        folder: a run folder.
        config: its resolved config.
        output: file to write; its ending selects the format.
        which: checkpoint, as in :func:`checkpoint_files.choose`.
        average: write the moving average of the weights.

    Raises:
        UserError: no such checkpoint or average, or the file cannot be written.
    """
    if output.suffix not in ENDINGS:
        raise UserError(f"-o: {output}: found {output.suffix!r}; allowed: {', '.join(ENDINGS)}")
    chosen = checkpoint_files.choose(folder / run_folder.CHECKPOINTS, which)
    found = checkpoint_files.find(chosen)
    if found is None:
        raise UserError(f"{chosen}: no checkpoint (a folder step-N) in it")
    prefix = "average/module." if average else "model/"
    tensors = checkpoint_files.tensors_of(found, prefix)
    if average and not tensors:
        raise UserError(f"--average: {found.folder} has no average; model.ema_decay keeps one")
    facts = _metadata(config, found)
    if average:
        facts.pop("top1")  # measured with the plain weights
    classes = len(facts["classes"]) if "classes" in facts else _width(tensors)
    model = build_network(config.model, config.data, classes, torch.device("cpu")).eval()
    _check_of(model, tensors, found.folder)
    writers: dict[str, Callable[[Path], None]] = {
        ".safetensors": lambda path: save_file(
            tensors, path, {key: json.dumps(value) for key, value in facts.items()}
        ),
        ".onnx": lambda path: _write_onnx(model, tensors, facts, path),
    }
    _write(output, writers.get(output.suffix, lambda path: _write_state_dict(tensors, facts, path)))
    passed = f" (skipped: {'; '.join(found.passed_over)})" if found.passed_over else ""
    return (
        f"{output}: {len(tensors)} tensors of {config.model.name} after step {found.progress.step}"
        f"{', averaged' if average else ''}{passed}"
    )


def _metadata(config: Config, found: checkpoint_files.Found) -> dict[str, Any]:
    """Return the metadata that a user of the weights needs, as plain values."""
    facts: dict[str, Any] = {
        "hvd_lars": hvd_lars.__version__,
        "model": config.model.name,
        "step": found.progress.step,
        "top1": found.progress.top1,
        "image_shape": list(config.data.shapes[0]),
    }
    if found.data is not None:
        facts["classes"] = list(found.data.classes)
    statistics = config.data.statistics(config.run.seed)
    if statistics is not None:
        facts |= {"mean": list(statistics[0]), "std": list(statistics[1])}
    return facts | config.data.facts()


def _write(output: Path, write: Callable[[Path], None]) -> None:
    """Write the whole file under its name, or nothing."""
    draft = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        with draft.open("wb"):
            pass  # so that an error names the file
        write(draft)
        let_umask_decide(draft)
        sync(draft)
        draft.replace(output)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap them
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{output}: cannot be written: {reason}") from None
    finally:
        draft.unlink(missing_ok=True)


def _write_state_dict(tensors: dict[str, Tensor], facts: dict[str, Any], path: Path) -> None:
    state = OrderedDict(tensors)
    state.hvd_lars = facts  # type: ignore[attr-defined]
    torch.save(state, path)


class _Named(nn.Module):
    """The network with a named input, for the exported graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def _shape_in(tensors: Mapping[str, Tensor], name: str) -> str:
    """Return a tensor's shape for a message."""
    return str(tuple(tensors[name].shape)) if name in tensors else "none"


def _check_of(model: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Raise UserError if a checkpoint does not match the run's network."""
    wanted = model.state_dict()
    odd = sorted(wanted.keys() ^ tensors.keys())
    odd += [
        name for name in wanted if name in tensors and wanted[name].shape != tensors[name].shape
    ]
    if odd:
        raise UserError(
            f"{where}: {odd[0]} does not fit the run's model: found "
            f"{_shape_in(tensors, odd[0])}, the model has {_shape_in(wanted, odd[0])}; the "
            "checkpoint is of another model"
        )


def _write_onnx(
    model: nn.Module, tensors: dict[str, Tensor], facts: dict[str, Any], path: Path
) -> None:
    """Write a graph from normalised images (n, channels, height, width) to logits (n, classes)."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("-o: an .onnx file needs pip install 'hvd_lars[onnx]'") from None
    model.load_state_dict(tensors)
    images = torch.zeros(2, *facts["image_shape"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from calls inside torch's exporter
        program = torch.onnx.export(
            _Named(model).eval(),
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("n")}},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(v) for key, v in facts.items()})
    program.save(path)


def _width(tensors: dict[str, Tensor]) -> int:
    """Count the classes of a checkpoint without names: outputs of the last layer."""
    return list(tensors.values())[-1].shape[0] if tensors else 1
