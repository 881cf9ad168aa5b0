"""The layers of a step, by device, and the source of each layer's trust ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_requires_grad = attrgetter("requires_grad")


@dataclass(frozen=True, slots=True)
class Layer:
    """One parameter tensor in a step.

    ``source`` is the index, on the same device, of the layer whose trust ratio applies; -1 for
    none.
    """

    param: Tensor
    group: dict[str, Any]
    source: int


@dataclass(frozen=True, slots=True)
class DeviceLayers:
    """The layers of one device.

    Attributes:
        layers: all updated layers.
        sources: indices of the layers whose norms are computed: those whose trust ratio is used,
            or all.
        adapted: the parameters of ``sources``.
        groups: the parameter groups of ``sources``, each once.
        group_of: (sources,) int64, each source's index into ``groups``.
        places: ``sources`` as an int64 tensor (sources,) on the device; None if they are all
            layers, in order.
        source_of: each layer's index into ``sources``; -1 for none.
        ratio_of: (layers,), each layer's index into the sources' ratios followed by a 1.
        own: (layers,) bool, whether a layer's ratio is its own; None if any is another's, or if
            the sources are not all layers.
    """

    layers: list[Layer]
    sources: list[int]
    adapted: list[Tensor]
    groups: list[dict[str, Any]]
    group_of: Tensor
    places: Tensor | None
    source_of: list[int]
    ratio_of: Tensor
    own: Tensor | None

    @property
    def device(self) -> torch.device:
        """The device of all layers."""
        return self.ratio_of.device


def signature(groups: Sequence[dict[str, Any]], placed: bool, all_norms: bool) -> list[object]:
    """Return a key that changes whenever the result of :func:`layers_of` would."""
    key: list[object] = [all_norms]
    for group in groups:
        params = group["params"]
        key += id(group), group["adapt"], group.get("momentum", 0) != 0
        key.append(tuple(group.get("ratio_from", ())))
        key += map(_requires_grad, params)
        if not placed:
            key += [param.grad is None for param in params]
        key += map(id, params)
    return key


def layers_of(
    groups: Sequence[dict[str, Any]], placed: bool, all_norms: bool
) -> list[DeviceLayers]:
    """Return the unfrozen parameters that have a gradient, by device, in group order.

    Args:
        groups: the optimizer's parameter groups.
        placed: a placement gives every parameter a gradient.
        all_norms: also compute norms that no trust ratio needs.

    Raises:
        RuntimeError: tensors were added to or removed from a group that shares trust ratios.
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
        # A bias whose weight is frozen or on another device has no ratio to share: plain rate.
        found, where = places.get(source, (None, -1))
        if found == device:
            layer = layers[device][index]
            layers[device][index] = Layer(layer.param, layer.group, where)
    return [_on_device(here, device, all_norms) for device, here in layers.items()]


def _check_complete(group: dict[str, Any]) -> None:
    """Raise RuntimeError if a group that shares ratios has lost or gained tensors."""
    sources = group.get("ratio_from", ())
    if group["adapt"] == "layer" and len(group["params"]) != len(sources):
        raise RuntimeError(
            f'LARS: a group with adapt="layer" has {len(group["params"])} tensors but '
            f"{len(sources)} entries in ratio_from: tensors were added or removed.  hvd.Adasum "
            f'steps on one tensor at a time: use adapt="weights" with it'
        )


def _on_device(layers: list[Layer], device: torch.device, all_norms: bool) -> DeviceLayers:
    sources = sorted({layer.source for layer in layers if layer.source >= 0})
    if all_norms:
        sources = list(range(len(layers)))
    place = {source: i for i, source in enumerate(sources)}
    source_of = [place.get(layer.source, -1) for layer in layers]
    adapted = [layers[i].param for i in sources]
    places = own = None
    if len(sources) < len(layers):
        places = torch.tensor(sources, dtype=torch.int64, device=device)
    elif all(layer.source in (-1, i) for i, layer in enumerate(layers)):
        own = torch.tensor([layer.source >= 0 for layer in layers], device=device)
    groups = {id(layer.group): layer.group for layer in (layers[i] for i in sources)}
    numbers = {key: number for number, key in enumerate(groups)}
    group_of = [numbers[id(layers[i].group)] for i in sources]
    # An index of -1 is the 1 at the end.
    ratio_of = torch.tensor([i % (len(sources) + 1) for i in source_of], device=device)
    of_groups = torch.tensor(group_of, dtype=torch.int64, device=device)
    distinct = list(groups.values())
    return DeviceLayers(
        layers, sources, adapted, distinct, of_groups, places, source_of, ratio_of, own
    )
