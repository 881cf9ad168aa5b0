"""The layers of a step: which parameters, on which device, and whose trust ratio each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """One parameter tensor in a step.

    ``source`` is the layer of its device whose trust ratio applies, by index, or -1 for none.
    """

    param: Tensor
    group: dict[str, Any]
    source: int


@dataclass(frozen=True, slots=True)
class DeviceLayers:
    """The layers of one device.

    Attributes:
        layers: all that are updated.
        sources: indices of those whose norms are taken: whose trust ratio is used, or all.
        adapted: their parameters.
        places: ``sources`` as an int64 tensor (sources,) on the device.
        ratio_of: (layers,), the index of each layer's ratio among the sources' ratios, which a 1
            follows.
    """

    layers: list[Layer]
    sources: list[int]
    adapted: list[Tensor]
    places: Tensor
    ratio_of: Tensor

    @property
    def device(self) -> torch.device:
        """The device of all of them."""
        return self.ratio_of.device


def signature(groups: Sequence[dict[str, Any]], placed: bool, all_norms: bool) -> list[object]:
    """A key that changes where :func:`layers_of` would give other layers."""
    key: list[object] = [all_norms]
    key += [(id(g), g["adapt"], g["momentum"] != 0, tuple(g.get("ratio_from", ()))) for g in groups]
    for group in groups:
        if placed:
            key += [param.requires_grad for param in group["params"]]
        else:
            key += [p.grad is not None and p.requires_grad for p in group["params"]]
        key += map(id, group["params"])
    return key


def layers_of(
    groups: Sequence[dict[str, Any]], placed: bool, all_norms: bool
) -> list[DeviceLayers]:
    """Parameters that have a gradient and are not frozen, by device, in the order of the groups.

    Args:
        groups: the optimizer's parameter groups.
        placed: a placement gives every parameter a gradient.
        all_norms: also take norms that no trust ratio needs.

    Raises:
        RuntimeError: tensors were taken out of a group that shares trust ratios.
    """
    layers: dict[torch.device, list[Layer]] = {}
    places: dict[int, tuple[torch.device, int]] = {}  # by position over all groups
    shared: list[tuple[torch.device, int, int]] = []  # device, index there, position of the source
    position = 0
    for group in groups:
        _check_complete(group)
        for i, param in enumerate(group["params"]):
            if param.requires_grad and (placed or param.grad is not None):
                here = layers.setdefault(param.device, [])
                places[position] = (param.device, len(here))
                if group["adapt"] == "layer":
                    shared.append((param.device, len(here), group["ratio_from"][i]))
                here.append(Layer(param, group, len(here) if group["adapt"] == "own" else -1))
            position += 1
    for device, index, source in shared:
        # A bias whose weight is frozen or elsewhere has no ratio to share: it takes the plain rate.
        found, where = places.get(source, (None, -1))
        if found == device:
            layer = layers[device][index]
            layers[device][index] = Layer(layer.param, layer.group, where)
    return [_on_device(here, device, all_norms) for device, here in layers.items()]


def _check_complete(group: dict[str, Any]) -> None:
    """Raise RuntimeError where tensors that share a ratio were taken out of their group."""
    sources = group.get("ratio_from", ())
    if group["adapt"] == "layer" and len(group["params"]) != len(sources):
        raise RuntimeError(
            f'LARS: a group with adapt="layer" has {len(group["params"])} tensors and '
            f"{len(sources)} in ratio_from: tensors were added or taken out, as "
            f'hvd.Adasum does, which steps on one at a time; there, use adapt="weights"'
        )


def _on_device(layers: list[Layer], device: torch.device, all_norms: bool) -> DeviceLayers:
    sources = sorted({layer.source for layer in layers if layer.source >= 0})
    if all_norms:
        sources = list(range(len(layers)))
    place = {source: i for i, source in enumerate(sources)}
    index = [place.get(layer.source, len(sources)) for layer in layers]
    adapted = [layers[i].param for i in sources]
    places = torch.tensor(sources, dtype=torch.int64, device=device)
    return DeviceLayers(layers, sources, adapted, places, torch.tensor(index, device=device))
