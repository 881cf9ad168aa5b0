"""Build a network by its name in the config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from hvd_lars.errors import UserError
from hvd_lars.models.alexnet import CaffeAlexNet
from hvd_lars.models.small_alexnet import SmallAlexNet
from hvd_lars.runtime.imports import REFERENCE, load_callable


def resnet18_cifar(num_classes: int) -> nn.Module:
    """Return torchvision's ResNet-18 for 32×32 images: 3×3 stem of stride 1, no first pooling."""
    from torchvision import models

    model: nn.Module = models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


OWN: dict[str, Callable[..., nn.Module]] = {
    "digits_alexnet": partial(SmallAlexNet, image_size=8),
    "glyphs_alexnet": partial(SmallAlexNet, image_size=16),
    "mnist_alexnet": partial(SmallAlexNet, image_size=28, stem=(5, 2), hidden=256),
    "alexnet_caffe": CaffeAlexNet,
    "alexnet_bn": partial(CaffeAlexNet, batch_norm=True),
    "resnet18_cifar": resnet18_cifar,
}


def _torchvision_names() -> list[str]:
    """Return the names of torchvision's image classifiers; none without torchvision."""
    try:
        from torchvision import models
    except (ImportError, OSError, RuntimeError):  # absent, or built for another torch
        return []
    names: list[str] = models.list_models(module=models)
    return names


def _timm_names() -> list[str]:
    """Return ``timm/NAME`` of timm's classifiers; none without timm."""
    try:
        import timm
    except (ImportError, OSError, RuntimeError):
        return []
    return [f"timm/{name}" for name in timm.list_models()]


def model_names() -> list[str]:
    """Return every name that :func:`build_model` accepts."""
    return [*OWN, *_torchvision_names(), *_timm_names()]


def check_model_name(name: str) -> None:
    """Raise UserError, with the nearest names, if :func:`build_model` does not know ``name``."""
    if ":" in name:
        if not re.match(REFERENCE, name):
            raise UserError(f"model.name: found {name!r}; a network of your own is module:function")
        load_callable(name, "model.name")
        return
    if name in OWN:
        return
    library = "timm" if name.startswith("timm/") else "torchvision"
    names = _timm_names() if library == "timm" else [*OWN, *_torchvision_names()]
    if name in names:
        return
    missing = ""
    if not any(known not in OWN for known in names):
        missing = f" ({library} is not installed or does not import)"
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"nearest: {', '.join(near)}" if near else f"{', '.join(OWN)} or one of {library}'s"
    raise UserError(f"model.name: found {name!r}; {hint}{missing}")


def build_model(name: str, num_classes: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a new network, initialised from torch's global random state.

    Args:
        name: of a network of ours, torchvision's or timm's, or ``module:function`` of a callable
            that takes ``num_classes`` and the options.
        num_classes: outputs of the network.
        options: keyword arguments; none for a network of ours.

    Raises:
        UserError: the name is unknown, or its network is no ``torch.nn.Module``.
    """
    check_model_name(name)
    own = dict(options or {})
    model: nn.Module
    if ":" in name:
        model = load_callable(name, "model.name")(num_classes=num_classes, **own)
        if not isinstance(model, nn.Module):
            found = type(model).__name__
            raise UserError(f"model.name: {name} returned {found}; a torch.nn.Module is needed")
        return model
    try:
        return _build_known(name, num_classes, own)
    except (TypeError, ValueError) as error:
        if not own:
            raise
        hint = "; model.init_from loads weights from a file" if "weights" in own else ""
        raise UserError(f"model.options: {name} does not take them: {error}{hint}") from None


def _build_known(name: str, num_classes: int, own: dict[str, Any]) -> nn.Module:
    """Build a network of ours, torchvision's or timm's."""
    model: nn.Module
    if name in OWN:
        model = OWN[name](num_classes, **own)
        return model
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"), num_classes=num_classes, **own)
        return model
    from torchvision import models

    options: dict[str, object] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    model = models.get_model(name, **(options | own))
    return model
