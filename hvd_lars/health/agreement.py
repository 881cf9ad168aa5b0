"""Agreement of the ranks on stop requests, checkpoints by the clock and unreadable images.

Each rank's requests are part of an all-reduce that the step makes anyway.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hvd_lars.comm.base import Communicator
from hvd_lars.data.source import Unreadable
from hvd_lars.errors import UserError
from hvd_lars.health.stop_requests import REASONS, StopRequests
from hvd_lars.runtime.terminal import warn


@dataclass(frozen=True)
class Decision:
    """A decision that is the same on all ranks.

    Attributes:
        stop: the reason to stop; None to continue.
        checkpoint: a checkpoint is due by the clock.
        unreadable: unreadable images not reported before.
    """

    stop: str | None
    checkpoint: bool
    unreadable: tuple[Unreadable, ...] = ()

    def joined(self, later: Decision) -> Decision:
        """Return this decision and a later one as one."""
        return Decision(
            self.stop or later.stop,
            self.checkpoint or later.checkpoint,
            self.unreadable + later.unreadable,
        )


@final
class Agreement:
    """One rank's part in the decisions; :meth:`decide` is collective.

    Args:
        comm: the ranks.
        stops: stop requests that reach this rank.
        unreadable: the data source's list of unreadable images, which ``decide`` empties.
        num_train: number of training images.
        num_eval: number of evaluation images.
        max_bad_fraction: fraction of each that may be unreadable.
        checkpoint_seconds: seconds between checkpoints, by rank 0's clock.
    """

    def __init__(
        self,
        comm: Communicator,
        stops: StopRequests | None = None,
        unreadable: list[Unreadable] | None = None,
        num_train: int = 1,
        num_eval: int = 1,
        max_bad_fraction: float = 1.0,
        checkpoint_seconds: float = math.inf,
    ) -> None:
        self.stops = stops or StopRequests()
        self._comm, self._new = comm, [] if unreadable is None else unreadable
        self._num_images = {False: num_train, True: num_eval}  # key: whether for evaluation
        self._max_bad_fraction = max_bad_fraction
        self._known: set[Unreadable] = set()
        self._checkpoint_seconds = checkpoint_seconds if comm.rank == 0 else math.inf
        self.checkpoint_made()

    def checkpoint_made(self) -> None:
        """Restart the checkpoint clock."""
        self._last_checkpoint = time.monotonic()

    def requests(self) -> Tensor:
        """Return this rank's requests, (n,) float64, to be summed over the ranks."""
        due = time.monotonic() - self._last_checkpoint >= self._checkpoint_seconds
        bad = any(image not in self._known for image in self._new)
        return torch.cat([self.stops.requests(), torch.tensor([due, bad]).double()])

    def decide(self, summed: Tensor | None = None) -> Decision:
        """Decide from the ranks' summed requests; sum them first if ``summed`` is None.

        Rank 0 warns of each unreadable image once.

        Raises:
            UserError: on every rank: more images are unreadable than allowed.
        """
        if summed is None:
            summed = self.requests()
            self._comm.start_all_reduce_sum(summed, "agreement").wait()
        *asked, due, bad = summed.tolist()
        reasons = [reason for reason, count in zip(REASONS, asked, strict=True) if count]
        unreadable = self._share_unreadable() if bad else ()
        return Decision(reasons[-1] if reasons else None, due > 0, unreadable)

    def _share_unreadable(self) -> tuple[Unreadable, ...]:
        """Return the new unreadable images of all ranks, each once, on every rank."""
        mine = sorted(set(self._new) - self._known)
        self._new.clear()
        lengths = torch.zeros(self._comm.size, dtype=torch.float64)
        lengths[self._comm.rank] = len(mine)
        self._comm.start_all_reduce_sum(lengths, "bad_images").wait()
        found: dict[Unreadable, None] = {}
        for rank in lengths.nonzero().flatten().tolist():
            found |= dict.fromkeys(self._comm.broadcast_object(mine, rank))
        new = tuple(image for image in found if image not in self._known)
        self._known.update(new)
        if self._comm.rank == 0:
            for line, evaluation in new:
                warn(f"{line}: {'not evaluated' if evaluation else 'another takes its place'}")
        for evaluation, count in self._num_images.items():
            bad = [line for line, of_evaluation in self._known if of_evaluation == evaluation]
            if len(bad) > self._max_bad_fraction * count:
                example = next((line for line, e in new if e == evaluation), bad[0])
                raise UserError(
                    f"data.max_bad_fraction: {len(bad)} of {count:,} "
                    f"{'test' if evaluation else 'training'} images cannot be read, such as "
                    f"{example}; allowed: {self._max_bad_fraction:g} of them"
                )
        return new
