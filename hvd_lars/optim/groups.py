"""Parameter groups: which tensors are adapted and decayed, and the checks of a group."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

CHOICES = {
    "lr_position": ("momentum", "update"),
    "denominator": ("separate", "combined"),
    "zero_norm": ("unit", "skip", "coast"),
    "adapt": ("own", "layer", "none"),
    "kernel": ("auto", "native", "fused", "eager"),
}


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    adapt: Literal["weights", "layer", "all", "none"] = "weights",
    decay: Literal["weights", "all"] = "weights",
) -> list[dict[str, Any]]:
    """Return parameter groups for :class:`LARS`: weights apart from biases and normalisation.

    Weights are the tensors of two dimensions or more, but for LayerNorm's.  Adaptation and weight
    decay are separate choices; each group carries its own ``adapt`` and ``weight_decay``, which may
    be changed.

    Args:
        model: the model, uncompiled; frozen parameters are omitted.
        weight_decay: β of the decayed tensors.
        adapt: which tensors get a trust ratio.  ``"weights"``: weights only; the others use plain
            momentum SGD with rate γ (every published recipe for ResNet-50).  ``"layer"``: a bias
            also takes the ratio of the weight in its module, which keeps networks without
            normalisation stable at rates of 16 and more.  ``"all"``: every tensor has its own
            ratio, as in the Caffe code of 2017; a zero-initialised tensor then moves by the full
            γ.  ``"none"``: momentum SGD.
        decay: which tensors are decayed.

    Returns:
        Up to three groups, each ``{"params", "names", "adapt", "weight_decay"}``, plus
        ``ratio_from`` if its ``adapt`` is ``"layer"``.  Groups of several models can go into one
        optimizer.

    Raises:
        ValueError: ``adapt`` or ``decay`` is not among its choices, or the model has no trainable
            parameter or is sharded by FSDP.
    """
    if adapt not in ("weights", "layer", "all", "none"):
        raise ValueError(f"adapt is {adapt!r}; allowed: weights, layer, all, none")
    if decay not in ("weights", "all"):
        raise ValueError(f"decay is {decay!r}; allowed: weights, all")
    _check_not_fsdp(model)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    norms = (nn.LayerNorm, nn.RMSNorm)  # which may be over several dimensions
    flat = {p for m in model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)}
    weights = [(name, param) for name, param in named if param.dim() >= 2 and param not in flat]
    others = [(name, param) for name, param in named if param.dim() < 2 or param in flat]
    position: dict[Tensor, int] = {param: i for i, (_, param) in enumerate(weights)}
    owned = _owned_biases(model)
    owner = {name: position.get(owned[p]) if p in owned else None for name, p in others}
    sharing = [(n, p) for n, p in others if adapt == "layer" and owner[n] is not None]
    alone = [(n, p) for n, p in others if not (adapt == "layer" and owner[n] is not None)]

    other_decay = weight_decay if decay == "all" else 0.0
    groups = [
        _group(weights, "none" if adapt == "none" else "own", weight_decay),
        _group(sharing, "layer", other_decay)
        | {"ratio_from": _Owners(owner[name] for name, _ in sharing)},
        _group(alone, "own" if adapt == "all" else "none", other_decay),
    ]
    groups[1]["ratio_from"].tensors = [owned[param] for _, param in sharing]
    return [group for group in groups if group["params"]]


class _Owners(list[Any]):
    """Positions among the groups of one model, and the tensors there."""

    tensors: list[Tensor]


def resolve_owners(groups: list[dict[str, Any]]) -> None:
    """Make ``ratio_from`` of the last group positions over all groups.

    Raises ValueError if the weight of a bias is in none of them.
    """
    sources = groups[-1].get("ratio_from")
    if not isinstance(sources, _Owners):
        return
    places = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
    for param, weight in zip(groups[-1]["params"], sources.tensors, strict=False):
        if weight not in places:
            raise ValueError(
                f"a bias of shape {tuple(param.shape)} takes the trust ratio of a weight of shape "
                f"{tuple(weight.shape)}, which is in no group: add the weights' group first"
            )
    groups[-1]["ratio_from"] = [places[weight] for weight in sources.tensors]


def _check_not_fsdp(model: nn.Module) -> None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is sharded by FSDP, whose parameters are flattened parts: "
            "shapes, norms and trust ratios of the layers are lost; use a placement (Sharded)"
        )


def _owned_biases(model: nn.Module) -> dict[Tensor, Tensor]:
    """Map each bias to the weight of its module, which may be tied or parametrised.

    LSTM's ``bias_ih_l0`` belongs to ``weight_ih_l0``; with weight norm the direction is the weight.
    """
    owned: dict[Tensor, Tensor] = {}
    for module in model.modules():
        local = dict(module.named_parameters(recurse=False))
        parametrised: Any = getattr(module, "parametrizations", {})
        for name, bias in local.items():
            before, found, after = name.rpartition("bias")
            weight = f"{before}weight{after}"
            inside: Any = parametrised[weight] if found and weight in parametrised else None
            candidates = [local.get(weight), local.get(f"{weight}_v"), local.get(f"{weight}_orig")]
            candidates += [getattr(inside, n, None) for n in ("original1", "original")]
            owner = next((c for c in candidates if isinstance(c, Tensor) and c.dim() >= 2), None)
            if found and owner is not None:
                owned[bias] = owner
    return owned


def _group(
    members: list[tuple[str, nn.Parameter]], adapt: str, weight_decay: float
) -> dict[str, Any]:
    return {
        "params": [param for _, param in members],
        "names": [name for name, _ in members],
        "adapt": adapt,
        "weight_decay": weight_decay,
    }


def check_group(group: dict[str, Any], count: int) -> None:
    """Raise ValueError for the first invalid hyper-parameter or tensor of a group.

    ``count`` is the number of tensors in this and all previous groups, which bounds ``ratio_from``.
    """
    for name in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"):
        value = group[name]
        if name == "lr" and isinstance(value, Tensor) and value.numel() == 1:
            continue  # reading it would wait for its device
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"LARS: {name} is {value}; it must be finite and not negative")
    for name, allowed in CHOICES.items():
        if group[name] not in allowed:
            raise ValueError(f"LARS: {name} is {group[name]!r}; allowed: {', '.join(allowed)}")
    if group["nesterov"] and group["momentum"] == 0:
        raise ValueError("LARS: nesterov needs momentum above 0")
    for param in group["params"]:
        if hasattr(param, "placements") and hasattr(param, "to_local"):
            raise ValueError(
                f"LARS takes plain tensors; a parameter of shape {tuple(param.shape)} is a DTensor "
                f"(FSDP2, tensor parallel), whose norms would cover this rank's part only"
            )
        if hasattr(param, "_is_flat_param"):
            raise ValueError(
                f"LARS takes a network's own tensors; a parameter of {tuple(param.shape)} is "
                f"FSDP's, which joins layers: use a placement (Sharded)"
            )
        if param.is_complex() or param.is_sparse:
            kind = "complex" if param.is_complex() else "sparse"
            raise ValueError(
                f"LARS takes dense real parameters; one of shape {tuple(param.shape)} is {kind}"
            )
    if group["adapt"] == "layer":
        sources = group.get("ratio_from", ())
        if len(sources) != len(group["params"]) or not all(0 <= s < count for s in sources):
            raise ValueError(
                f'LARS: a group with adapt="layer" has {len(group["params"])} tensors and '
                f"ratio_from {list(sources)}; it needs one position below {count} for each"
            )


def check_ours(optimizer: str, state_dict: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ValueError if the state is another optimizer's."""
    for group in state_dict["param_groups"]:
        missing = sorted(defaults.keys() - group.keys())
        if missing:
            raise ValueError(
                f"{optimizer}: the state is another optimizer's: a group without "
                f"{', '.join(missing)}"
            )
