"""The size of a network: measured once, then read from a cache, as measuring loads PyTorch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hvd_lars
from hvd_lars.config.schema import Model
from hvd_lars.optimizers import OptimizerSettings
from hvd_lars.runtime.files import cache_folder, replace_text
from hvd_lars.sources import SourceSettings

_LIBRARIES = ("torch", "torchvision", "timm")


@dataclass(frozen=True)
class Group:
    """One optimizer group: its size, trust ratio and weight decay."""

    tensors: int
    parameters: int
    adapt: str
    weight_decay: float


@dataclass(frozen=True)
class NetworkSize:
    """A network's optimizer groups, and bytes in float32.

    Attributes:
        groups: of the optimizer.
        parameters: bytes.
        buffers: bytes.
        activations_fixed: bytes kept for backward, whatever the micro-batch.
        activations_per_sample: bytes kept for backward by each sample.
        has_batch_norm: whether it has a BatchNorm.
    """

    groups: tuple[Group, ...]
    parameters: int
    buffers: int
    activations_fixed: float
    activations_per_sample: float
    has_batch_norm: bool

    def activations(self, samples: int) -> float:
        """Return the bytes kept for backward by ``samples`` images, images included."""
        return self.activations_fixed + self.activations_per_sample * samples


_known: dict[str, NetworkSize] = {}  # by key: the recipes share a few networks


def network_size(
    settings: Model, optimizer: OptimizerSettings, data: SourceSettings, num_classes: int
) -> NetworkSize:
    """Return a network's size, from the cache on disk if it is there.

    A network of the user's own is always built, as its code may have changed.

    Raises:
        UserError: the network cannot be built, or does not take the data's images.
    """
    parts = [settings.model_dump_json(), optimizer.model_dump_json(), num_classes, data.shapes]
    key = hashlib.sha256(json.dumps([parts, _code()]).encode()).hexdigest()
    if key in _known:
        return _known[key]
    folder = None if ":" in settings.name else cache_folder("networks")
    path = None if folder is None else folder / f"{key[:32]}.json"
    found = _read(path) if path is not None else None
    if found is None:
        found = _measure(settings, optimizer, data, num_classes)
        if path is not None:
            with contextlib.suppress(OSError):  # a cache that cannot be written is none
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(path, json.dumps(asdict(found)))
    _known[key] = found
    return found


@functools.cache
def _code() -> list[object]:
    """Return what the size depends on beside the config: the libraries' versions and our code."""
    versions = []
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    files = [path.stat() for path in sorted(Path(hvd_lars.__file__).parent.rglob("*.py"))]
    return [versions, [(stat.st_mtime_ns, stat.st_size) for stat in files]]


def _read(path: Path) -> NetworkSize | None:
    try:
        found = json.loads(path.read_bytes())
        groups = tuple(Group(**group) for group in found.pop("groups"))
        return NetworkSize(groups=groups, **found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # absent, or cut off
        return None


def _measure(
    settings: Model, optimizer: OptimizerSettings, data: SourceSettings, num_classes: int
) -> NetworkSize:
    import torch

    from hvd_lars.assemble.network import build_network
    from hvd_lars.models import batch_norms
    from hvd_lars.models.footprint import footprint

    model = build_network(settings, data, num_classes, torch.device("cpu"))
    groups = tuple(
        Group(
            len(group["params"]),
            sum(param.numel() for param in group["params"]),
            group["adapt"],
            group["weight_decay"],
        )
        for group in optimizer.groups(model)
    )
    size = footprint(model, max(data.shapes, key=math.prod))
    return NetworkSize(
        groups,
        size.parameters,
        size.buffers,
        size.activations_fixed,
        size.activations_per_sample,
        bool(batch_norms(model)),
    )
