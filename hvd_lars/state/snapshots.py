"""The state of training in host memory, for ranks that go on when others are lost or join."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from hvd_lars.comm.base import Communicator
from hvd_lars.health.stop_requests import StopRequests
from hvd_lars.optim import LARS
from hvd_lars.state.checkpoint import load_state
from hvd_lars.state.progress import Progress
from hvd_lars.state.replicas import named_state


@dataclass(frozen=True)
class Commit:
    """What ranks found that they can go on from: rank ``root`` has it in memory.

    ``tensors``: whether there is a state beside the settings.
    """

    root: int
    settings: Any
    tensors: bool


@final
class Commits:
    """The newest commit of this process; it outlives communicators, models and optimizers."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._record: dict[str, Any] | None = None
        self._settings: Any = None
        self.stops: StopRequests | None = None  # they are not forgotten, nor does the clock restart

    def announce(self, settings: object) -> None:
        """The run has a folder: an attempt that fails before the first commit goes on in it."""
        self._settings = settings

    def keep(
        self,
        model: nn.Module,
        optimizer: LARS,
        average: nn.Module | None,
        progress: Progress,
        settings: object,
    ) -> None:
        """Copy everything to host memory; collective.  ``settings`` is kept beside it.

        Statistics of BatchNorm are this rank's own: to average them would change the run.
        """
        state = named_state(model, optimizer, average)  # here a rank that is lost is noticed
        if self._tensors.keys() != state.keys():
            self._tensors = {n: torch.empty_like(t, device="cpu") for n, t in state.items()}
        with torch.no_grad():
            for name, tensor in state.items():
                self._tensors[name].copy_(tensor)
        self._record, self._settings = progress.record(), settings

    def agree(self, comm: Communicator) -> Commit | None:
        """The newest commit of any rank; None where none knows of the run.  Collective."""
        steps = torch.zeros(comm.size, dtype=torch.int64)
        if self._settings is not None:
            steps[comm.rank] = 1 if self._record is None else 2 + self._record["step"]
        comm.start_all_reduce_sum(steps, "commits").wait()
        if not steps.any():
            return None
        root = int(steps.argmax())
        settings = comm.broadcast_object(self._settings, root)
        return Commit(root, settings, bool(steps[root] > 1))

    def restore(
        self,
        commit: Commit,
        model: nn.Module,
        optimizer: LARS,
        average: nn.Module | None,
        comm: Communicator,
    ) -> Progress:
        """Load a commit on every rank, with the same bits; collective."""
        record, names = comm.broadcast_object((self._record, list(self._tensors)), commit.root)

        def fill(live: dict[str, Tensor], _: list[str]) -> None:
            if comm.rank == commit.root:
                for name, tensor in live.items():
                    tensor.copy_(self._tensors[name])

        load_state(names, fill, comm, model, optimizer, average, commit.root)
        assert record is not None
        return Progress(**record)
