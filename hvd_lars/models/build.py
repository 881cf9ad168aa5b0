"""From a name in the config to a network; imports the networks and errors."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from hvd_lars.errors import UserError
from hvd_lars.models.alexnet import CaffeAlexNet
from hvd_lars.models.digits_alexnet import DigitsAlexNet

OWN: dict[str, Callable[[int], nn.Module]] = {
    "digits_alexnet": DigitsAlexNet,
    "alexnet_caffe": CaffeAlexNet,
    "alexnet_bn": partial(CaffeAlexNet, batch_norm=True),
}


def _torchvision_names() -> list[str]:
    """Names of torchvision's image classifiers; none without torchvision."""
    try:
        from torchvision import models
    except (ImportError, OSError, RuntimeError):  # absent, or built for another torch
        return []
    names: list[str] = models.list_models(module=models)
    return names


def model_names() -> list[str]:
    """Every name that :func:`build_model` takes."""
    return [*OWN, *_torchvision_names()]


def check_model_name(name: str) -> None:
    """Raise UserError for a name that :func:`build_model` does not take; gives the nearest."""
    if name in OWN or name in (names := model_names()):
        return
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"nearest: {', '.join(near)}" if near else f"{', '.join(OWN)} or one of torchvision's"
    missing = "" if len(names) > len(OWN) else " (torchvision is not there or does not import)"
    raise UserError(f"model.name: found {name!r}; {hint}{missing}")


def build_model(name: str, num_classes: int) -> nn.Module:
    """A freshly initialised network; torch's global random state decides the weights.

    Raises:
        UserError: the name is unknown.
    """
    check_model_name(name)
    if name in OWN:
        return OWN[name](num_classes)
    from torchvision import models

    options: dict[str, object] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = models.get_model(name, **options)
    return model
