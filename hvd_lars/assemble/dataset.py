"""The config's data set, the same on every rank."""

from __future__ import annotations

import hashlib
import json

import torch

from hvd_lars.comm.agree import on_each_rank
from hvd_lars.comm.base import Communicator
from hvd_lars.config.schema import Config
from hvd_lars.data.source import Source
from hvd_lars.errors import UserError
from hvd_lars.sources import BuildContext


def build_source(
    config: Config, comm: Communicator, device: torch.device, only_eval: bool = False
) -> Source:
    """Build the data set on every rank and compare it; collective.

    Args:
        config: its ``data`` and seed.
        comm: the ranks.
        device: where the images are needed.
        only_eval: ranks may differ in the images to train on.

    Raises:
        UserError: on every rank alike: it cannot be read, or a rank has other data than rank 0.
    """
    source = config.data.build(BuildContext(comm, config.run.seed, device.type == "cuda"))
    known = source.identity.record()
    if only_eval:
        del known["train"]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    mine = source.num_train, source.num_eval, digest
    roots = comm.broadcast_object(mine)

    def check() -> None:
        if digest != roots[2]:
            raise UserError(
                f"data: rank {comm.rank} has {mine[0]:,} images to train and {mine[1]:,} to "
                f"evaluate on, rank 0 has {roots[0]:,} and {roots[1]:,}"
                + (", of other names, labels or classes" if mine[:2] == roots[:2] else "")
                + "; all ranks must have the same data"
            )

    on_each_rank(comm, check)
    return source
