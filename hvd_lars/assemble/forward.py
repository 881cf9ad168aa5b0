"""How a run computes its network: as it is, compiled, or from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hvd_lars.comm.agree import on_each_rank
from hvd_lars.config.schema import Config
from hvd_lars.errors import UserError
from hvd_lars.optim import Placement
from hvd_lars.runtime.terminal import tell
from hvd_lars.train.cuda_graphs import CaptureBroken, GraphedNetwork
from hvd_lars.train.feed import Feed
from hvd_lars.train.graph_parts import NotCapturable


def make_forward(
    config: Config, model: nn.Module, placement: Placement, feed: Feed
) -> Callable[[Tensor], Tensor] | None:
    """Return what computes the logits in a training step, None for the model itself; collective.

    Args:
        config: ``train.compile`` and ``train.cuda_graphs`` decide.
        model: in its final memory, the placement's.
        placement: of its parameters.
        feed: the micro-batches; graphs take the largest.

    Raises:
        UserError: on every rank alike: ``train.cuda_graphs: true`` cannot be had, or a capture
            failed on its way, after which its rank cannot go on.
    """
    train, comm = config.train, feed.comm
    reason = config.why_no_graphs(comm.size)
    if train.cuda_graphs is True and reason:
        raise UserError(f"train.cuda_graphs: true: {reason}; allowed here: auto, false")
    if train.compile:
        return torch.compile(model)
    if train.cuda_graphs is False or reason:
        return None
    found = on_each_rank(comm, lambda: _capture(config, model, placement, feed))
    try:
        graphed = on_each_rank(comm, lambda: _usable(found))
    except UserError as error:
        if train.cuda_graphs is True:
            raise
        if comm.rank == 0 and feed.device.type == "cuda":
            tell(f"{error}; the network runs without them")
        return None
    if comm.rank == 0:
        count = len(graphed.parts)
        tell(f"train.cuda_graphs: {count} part{'s' * (count > 1)} of the network captured")
    return graphed


def _capture(
    config: Config, model: nn.Module, placement: Placement, feed: Feed
) -> GraphedNetwork | str:
    """Return the graphs, or why there are none; UserError if the run cannot go on."""
    train, (*smaller, size) = config.train, sorted(feed.sizes)
    if feed.device.type != "cuda":
        return "a rank computes on the CPU"
    if not size:
        return "a rank has no samples in a step"
    if smaller and train.cuda_graphs == "auto":
        # They would need memory of their own beside that of the graphs.
        return f"micro-batches of {smaller[0]} and {size} samples are not of one size"
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    images = torch.zeros(size, *config.data.shapes[0], device=feed.device)
    was_training = model.training
    model.train()
    try:
        images = images.contiguous(memory_format=layout)
        take = placement.gradients.take
        return GraphedNetwork(model, images, train.precision, take, cut=feed.comm.size > 1)
    except NotCapturable as error:
        return str(error)
    except torch.cuda.OutOfMemoryError as error:
        return str(error).partition(". ")[0]
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
