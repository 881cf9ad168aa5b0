"""Snapshots of a run in host memory, from which ranks resume when others are lost or join."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from hvd_lars.comm.base import Communicator
from hvd_lars.health.stop_requests import StopRequests
from hvd_lars.state.checkpoint import load_state
from hvd_lars.state.progress import Progress
from hvd_lars.state.run_state import RunState


@dataclass(frozen=True)
class Newest:
    """The newest snapshot of any rank.

    Attributes:
        root: the rank that has it in memory.
        settings: of the run.
        tensors: whether it has a state; else the run has only its settings and folder.
    """

    root: int
    settings: Any
    tensors: bool


@final
class Snapshots:
    """This process's newest snapshot; it outlives communicators, models and optimizers.

    Args:
        stops: stop requests, which outlive them, too.
    """

    def __init__(self, stops: StopRequests) -> None:
        self.stops = stops
        self._tensors: dict[str, Tensor] = {}
        self._record: dict[str, Any] | None = None
        self._settings: Any = None

    def announce(self, settings: object) -> None:
        """Note a run's settings, so that a failure before the first snapshot resumes its folder."""
        self._settings = settings

    def take(self, state: RunState, settings: object) -> None:
        """Copy the state to host memory, together with ``settings``; collective.

        BatchNorm's statistics stay this rank's own: averaging them would change the run.
        """
        tensors = state.tensors()  # a lost rank is noticed here
        if self._tensors.keys() != tensors.keys():
            self._tensors = {n: torch.empty_like(t, device="cpu") for n, t in tensors.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._tensors[name].copy_(tensor)
        self._record, self._settings = state.progress.record(), settings

    def newest(self, comm: Communicator) -> Newest | None:
        """Return the newest of all ranks; None if no rank knows of the run; collective."""
        steps = torch.zeros(comm.size, dtype=torch.int64)
        if self._settings is not None:
            steps[comm.rank] = 1 if self._record is None else 2 + self._record["step"]
        comm.start_all_reduce_sum(steps, "snapshots").wait()
        if not steps.any():
            return None
        root = int(steps.argmax())
        settings = comm.broadcast_object(self._settings, root)
        return Newest(root, settings, bool(steps[root] > 1))

    def restore(self, newest: Newest, state: RunState, comm: Communicator) -> None:
        """Load a snapshot on every rank with the same bits; collective."""
        record, names = comm.broadcast_object((self._record, list(self._tensors)), newest.root)

        def fill(live: dict[str, Tensor], _: list[str]) -> None:
            if comm.rank == newest.root:
                for name, tensor in live.items():
                    tensor.copy_(self._tensors[name])

        load_state(names, fill, comm, state, newest.root)
        assert record is not None  # or it would have no tensors
        state.restored(Progress(**record))
