"""How a run computes its network: as it is, compiled, or from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hvd_lars.comm.agree import on_each_rank
from hvd_lars.config.schema import Config
from hvd_lars.errors import UserError
from hvd_lars.optim import Placement, Sharded
from hvd_lars.runtime.terminal import tell
from hvd_lars.train.cuda_graphs import CaptureBroken, GraphedNetwork, NotCapturable
from hvd_lars.train.feed import Feed


def make_forward(
    config: Config, model: nn.Module, placement: Placement, feed: Feed
) -> Callable[[Tensor], Tensor] | None:
    """Return what computes the logits in a training step, None for the model itself; collective.

    Args:
        config: ``train.compile`` and ``train.cuda_graphs`` decide.
        model: in its final memory, the placement's.
        placement: of its parameters.
        feed: the micro-batches; a graph takes those as large as the first.

    Raises:
        UserError: on every rank alike: ``train.cuda_graphs: true`` cannot be had.
    """
    train = config.train
    reason = _why_not_graphs(config, placement, feed)
    if train.cuda_graphs is True and reason:
        raise UserError(f"train.cuda_graphs: true: {reason}; allowed here: auto, false")
    if train.compile:
        return torch.compile(model)
    if train.cuda_graphs is False or reason:
        return None
    found = on_each_rank(feed.comm, lambda: _capture(config, model, placement, feed))
    try:
        graphed = on_each_rank(feed.comm, lambda: _usable(found))
    except UserError as error:
        if train.cuda_graphs is True:
            raise
        if feed.comm.rank == 0:
            tell(f"{error}; the network runs as it is")
        return None
    if feed.comm.rank == 0:
        count = len(graphed.parts)
        tell(f"train.cuda_graphs: {count} part{'s' * (count > 1)} of the network captured")
    return graphed


def _why_not_graphs(config: Config, placement: Placement, feed: Feed) -> str:
    """Return why no graph is tried, before anything is captured; the same on all ranks."""
    if feed.device.type != "cuda":
        return "this rank computes on the CPU"
    if config.train.compile:
        return "train.compile is on"
    if config.model.bn_sync_ranks > 1:
        return "model.bn_sync_ranks: BatchNorm exchanges statistics during forward"
    if config.train.cuda_graphs == "auto" and isinstance(placement, Sharded) and feed.comm.size > 1:
        return "optimizer.placement: sharded parameters arrive during forward"
    return ""


def _capture(
    config: Config, model: nn.Module, placement: Placement, feed: Feed
) -> GraphedNetwork | str:
    """Return the graphs, or why there are none; UserError if the run cannot go on."""
    train = config.train
    if not feed.first_size:
        return "a rank has no samples in a step"
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    images = torch.zeros(feed.first_size, *config.data.shapes[0], device=feed.device)
    was_training = model.training
    model.train()
    try:
        images = images.contiguous(memory_format=layout)
        take = placement.gradients.take
        return GraphedNetwork(model, images, train.precision, take, cut=feed.comm.size > 1)
    except NotCapturable as error:
        return str(error)
    except CaptureBroken as error:
        raise UserError(
            f"train.cuda_graphs: the capture failed, after which this process cannot use the GPU: "
            f"{error}; set train.cuda_graphs: false"
        ) from None
    finally:
        model.train(was_training)


def _usable(found: GraphedNetwork | str) -> GraphedNetwork:
    if isinstance(found, str):
        raise UserError(f"train.cuda_graphs: {found}")
    return found
