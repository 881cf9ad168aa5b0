"""From the config's model section to a network that takes the images; imports models, config."""

from __future__ import annotations

import torch
from torch import nn

from hvd_lars.assemble.sources import shape_of
from hvd_lars.config import Data, Model
from hvd_lars.config_data import Images as ImagesSection
from hvd_lars.errors import UserError
from hvd_lars.models import (
    build_model,
    initialise_last_layer,
    recompute_blocks,
    set_batch_norm_momentum,
    zero_last_gammas,
)


def build_network(settings: Model, data: Data, num_classes: int, device: torch.device) -> nn.Module:
    """The named network with what the recipe changes in it, seen to take images of every size.

    Weights to start from are not loaded here.

    Raises:
        UserError: the name is unknown, an option does not fit the network, or the network does
            not take images of the data's shape.
    """
    model = build_model(settings.name, num_classes)
    if settings.zero_init_last_gamma:
        zero_last_gammas(model)
    if settings.fc_sigma is not None:
        initialise_last_layer(model, num_classes, settings.fc_sigma)
    if settings.bn_momentum is not None:
        set_batch_norm_momentum(model, settings.bn_momentum)
    if settings.checkpoint_blocks:
        if settings.bn_sync_ranks > 1:
            raise UserError(
                "model.checkpoint_blocks: not together with model.bn_sync_ranks above 1, whose "
                "sums over ranks would be taken again in backward"
            )
        recompute_blocks(model)
    model = model.to(device).eval()
    for shape in shapes_of(data):
        try:
            with torch.no_grad():
                logits = model(torch.zeros(2, *shape, device=device))
        except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"model.name: {settings.name} does not take the {'×'.join(map(str, shape))} "
                f"images of the data: {str(error).strip().splitlines()[0]}"
            ) from error
        if tuple(logits.shape) != (2, num_classes):
            raise UserError(
                f"model.name: {settings.name} gives {tuple(logits.shape)} for 2 images; "
                f"(2, {num_classes}) is expected"
            )
    return model.train()


def shapes_of(data: Data) -> list[tuple[int, int, int]]:
    """Shapes of the images that the network will be shown."""
    shapes = [shape_of(data)]
    if isinstance(data, ImagesSection):
        shapes += [(3, e.image_size, e.image_size) for e in data.progressive]
    return shapes
