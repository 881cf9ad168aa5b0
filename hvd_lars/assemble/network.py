"""Build the network of the config's model section."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hvd_lars.assemble.plan import Plan
from hvd_lars.config.schema import Config, Model
from hvd_lars.errors import UserError
from hvd_lars.models import (
    batch_norms,
    build_model,
    checkpoint_activations,
    initialise_last_layer,
    set_batch_norm_momentum,
    zero_last_gammas,
)
from hvd_lars.sources import SourceSettings


def build_network(
    settings: Model, data: SourceSettings, num_classes: int, device: torch.device
) -> nn.Module:
    """Build the named network with the recipe's changes, and test it on every image shape.

    ``init_from`` is not loaded here.

    Raises:
        UserError: the name is unknown, an option does not fit the network, or the network does
            not take images of the data's shape.
    """
    model = build_model(settings.name, num_classes, settings.options)
    if settings.zero_init_last_gamma:
        zero_last_gammas(model)
    if settings.fc_sigma is not None:
        initialise_last_layer(model, num_classes, settings.fc_sigma)
    if settings.bn_momentum is not None:
        set_batch_norm_momentum(model, settings.bn_momentum)
    if settings.checkpoint_blocks:
        if settings.bn_sync_ranks > 1:
            raise UserError(
                "model.checkpoint_blocks: cannot be used with model.bn_sync_ranks above 1, as "
                "backward would repeat BatchNorm's sums over ranks"
            )
        checkpoint_activations(model)
    model = model.to(device).eval()
    for shape in data.shapes:
        try:
            with torch.no_grad():
                logits = model(torch.zeros(2, *shape, device=device))
        except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"model.name: {settings.name} does not take the {'×'.join(map(str, shape))} "
                f"images of the data: {str(error).strip().splitlines()[0]}"
            ) from error
        _check_logits(logits, settings.name, num_classes, "")
        _check_logits(_trained_on_meta(model, shape), settings.name, num_classes, " in training")
    for name, value in model.state_dict().items():
        if value is not None and not isinstance(value, Tensor):
            raise UserError(
                f"model.name: {settings.name} keeps {name}, a {type(value).__name__}, as extra "
                f"state, which a checkpoint cannot hold; a buffer can be held"
            )
    return model.train()


def _check_logits(logits: object, name: str, num_classes: int, when: str) -> None:
    """Raise UserError if logits of 2 images have another shape; None is not checked."""
    if logits is not None and not isinstance(logits, Tensor):
        raise UserError(
            f"model.name: {name} gives a {type(logits).__name__}{when}; a tensor of logits is "
            f"expected (torchvision's aux_logits: false)"
        )
    if logits is not None and tuple(logits.shape) != (2, num_classes):
        raise UserError(
            f"model.name: {name} gives {tuple(logits.shape)} for 2 images{when}; "
            f"(2, {num_classes}) is expected"
        )


def _trained_on_meta(model: nn.Module, shape: tuple[int, ...], images: int = 2) -> object:
    """Return what the network gives in training, or None if it does not run without memory.

    A copy on the ``meta`` device runs, which takes no time and leaves the network as it is.

    Raises:
        ValueError: of one image, a BatchNorm gets one value per channel.
    """
    kept: dict[int, Tensor] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for param in model.parameters():
        kept[id(param)] = nn.Parameter(param.detach().to("meta"), param.requires_grad)
    try:
        with torch.no_grad():
            return copy.deepcopy(model, kept).train()(torch.zeros(images, *shape, device="meta"))
    except ValueError as error:
        if images == 1 and "more than 1 value per channel" in str(error):
            raise
        return None
    except Exception:  # whatever a network's operations raise on this device
        return None


def check_batch_norm(model: nn.Module, config: Config, plan: Plan) -> None:
    """Refuse a plan whose first step would fail, as a BatchNorm gets one value per channel.

    Raises:
        UserError: some micro-batches have one sample, and a BatchNorm sees one pixel of it.
    """
    if plan.smallest_micro_batch > 1 or config.model.bn_sync_ranks > 1:
        return
    seen: list[str] = []
    hooks = [
        norm.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, norm in batch_norms(model).items()
    ]
    try:
        for shape in config.data.shapes:
            _trained_on_meta(model, shape, images=1)
    except ValueError:
        raise UserError(
            f"train.micro_batch: {plan.global_batch} samples over {plan.ranks} "
            f"rank{'s' if plan.ranks > 1 else ''} (accumulation {plan.accumulation}) leave a "
            f"micro-batch of 1 sample, which the BatchNorm {seen[-1]} cannot normalise; choose "
            f"train.global_batch or train.micro_batch so that each has 2 or more"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
