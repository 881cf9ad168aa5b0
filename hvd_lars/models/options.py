"""Changes that recipes make to a new network."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_lars.errors import UserError


def zero_last_gammas(model: nn.Module) -> None:
    """Set γ of the last BatchNorm of every residual block to 0, so that blocks start as identity.

    Supports torchvision's and timm's ResNets, whose blocks are modules with ``bn1`` and the last
    of ``bn2``, ``bn3`` at the end of the branch.

    Raises:
        UserError: there is no such block.

    Reference: Goyal et al. 2017, arXiv 1706.02677, §5.1.
    """
    blocks = [m for m in model.modules() if hasattr(m, "bn1") and hasattr(m, "bn2")]
    last: list[Any] = [getattr(block, "bn3", block.bn2) for block in blocks]
    gammas = [norm.weight for norm in last if isinstance(norm.weight, nn.Parameter)]
    if not gammas:
        raise UserError(
            "model.zero_init_last_gamma: the network has no residual blocks with bn1 and bn2; "
            "remove the key"
        )
    for gamma in gammas:
        nn.init.zeros_(gamma)


def last_linear(model: nn.Module, num_classes: int) -> nn.Linear | None:
    """Return the classifying layer: the last linear layer with ``num_classes`` outputs."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    found = [layer for layer in layers if layer.out_features == num_classes]
    return found[-1] if found else None


def classifier_name(model: nn.Module, num_classes: int) -> str | None:
    """Return the name of :func:`last_linear`'s layer, else of the last such convolution."""
    linear = last_linear(model, num_classes)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    layer: nn.Module | None = linear
    if layer is None:
        layer = next((m for m in reversed(convolutions) if m.out_channels == num_classes), None)
    return next((name for name, m in model.named_modules() if m is layer), None)


def initialise_last_layer(model: nn.Module, num_classes: int, sigma: float) -> None:
    """Draw the classifying layer's weights from N(0, sigma²) and set its bias to 0.

    Raises:
        UserError: there is no such linear layer.

    Reference: Goyal et al. 2017, §5.1: σ 0.01 for ResNet-50.
    """
    layer = last_linear(model, num_classes)
    if layer is None:
        raise UserError(
            f"model.fc_sigma: the network has no linear layer of {num_classes} outputs; remove the "
            "key"
        )
    nn.init.normal_(layer.weight, std=sigma)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def set_batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Set the weight of a batch in the running statistics: running ← (1 − m)·running + m·batch.

    Raises:
        UserError: there is no BatchNorm.
    """
    norms = batch_norms(model)
    if not norms:
        raise UserError("model.bn_momentum: the network has no BatchNorm; remove the key")
    for norm in norms.values():
        norm.momentum = momentum
