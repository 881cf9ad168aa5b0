"""Which tensors of a model are adapted and decayed; imports nothing of hvd_lars."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    adapt: Literal["weights", "layer", "all", "none"] = "weights",
    decay: Literal["weights", "all"] = "weights",
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`LARS`: weights in one, biases and normalisation in others.

    Weights are the tensors of two dimensions or more.  Adaptation and weight decay are separate
    choices; each group carries its own ``adapt`` and ``weight_decay``, free to be changed.

    Args:
        model: the model, uncompiled; frozen parameters are left out.
        weight_decay: β of the tensors that are decayed.
        adapt: which tensors get a trust ratio.  ``"weights"``: weights only, the others move by
            plain momentum SGD with rate γ (every published recipe).  ``"layer"``: a bias also
            takes the ratio of the weight in its module, which keeps networks without
            normalisation stable at rates of 16 and more.  ``"all"``: every tensor its own ratio,
            as the Caffe code of 2017; beware that a zero-initialised tensor then moves by the
            full γ.  ``"none"``: momentum SGD.
        decay: which tensors are decayed.

    Returns:
        Up to three groups, each ``{"params", "names", "adapt", "weight_decay"}``, and
        ``ratio_from`` where ``adapt`` is ``"layer"``.

    Raises:
        ValueError: ``adapt`` or ``decay`` is not among its choices, or nothing can be trained.
    """
    if adapt not in ("weights", "layer", "all", "none"):
        raise ValueError(f"adapt is {adapt!r}; allowed: weights, layer, all, none")
    if decay not in ("weights", "all"):
        raise ValueError(f"decay is {decay!r}; allowed: weights, all")
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    weights = [(name, param) for name, param in named if param.dim() >= 2]
    others = [(name, param) for name, param in named if param.dim() < 2]
    position = {name: i for i, (name, _) in enumerate(weights)}
    owner = {
        name: position.get(f"{name.rpartition('.')[0]}.weight".lstrip(".")) for name, _ in others
    }
    sharing = [(n, p) for n, p in others if adapt == "layer" and owner[n] is not None]
    alone = [(n, p) for n, p in others if not (adapt == "layer" and owner[n] is not None)]

    other_decay = weight_decay if decay == "all" else 0.0
    groups = [
        _group(weights, "none" if adapt == "none" else "own", weight_decay),
        _group(sharing, "layer", other_decay)
        | {"ratio_from": [owner[name] for name, _ in sharing]},
        _group(alone, "own" if adapt == "all" else "none", other_decay),
    ]
    return [group for group in groups if group["params"]]


def _group(
    members: list[tuple[str, nn.Parameter]], adapt: str, weight_decay: float
) -> dict[str, Any]:
    return {
        "params": [param for _, param in members],
        "names": [name for name, _ in members],
        "adapt": adapt,
        "weight_decay": weight_decay,
    }
