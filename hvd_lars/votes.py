"""What ranks tell each other beside gradients: requests to stop, bad images, checkpoints due.

They ride on an all-reduce that a step makes anyway.  Imports stopping, comm.base and errors.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hvd_lars.comm.base import Communicator
from hvd_lars.errors import UserError
from hvd_lars.stopping import REASONS, StopRequests


@dataclass(frozen=True)
class Outcome:
    """What the ranks agreed on, the same on all.

    Attributes:
        stop: why they stop; None to go on.
        keep: a checkpoint is due by the clock.
        replaced: lines about images that no rank had met before.
    """

    stop: str | None
    keep: bool
    replaced: tuple[str, ...]


@final
class Votes:
    """One rank's part; every method but ``cast`` and ``kept`` is collective.

    Args:
        comm: the ranks.
        stops: requests to stop that this rank hears.
        replaced: lines about unreadable images, which the data source appends and ``count`` takes.
        num_images: in the data set, and
        max_bad_fraction: of them may be unreadable.
        keep_every: seconds between checkpoints, by rank 0's clock.
    """

    def __init__(
        self,
        comm: Communicator,
        stops: StopRequests | None = None,
        replaced: list[str] | None = None,
        num_images: int = 1,
        max_bad_fraction: float = 1.0,
        keep_every: float = math.inf,
    ) -> None:
        self.stops = stops or StopRequests()
        self._comm, self._new = comm, [] if replaced is None else replaced
        self._num_images, self._max_bad_fraction = num_images, max_bad_fraction
        self._known: set[str] = set()
        self._keep_every = keep_every if comm.rank == 0 else math.inf
        self.kept()

    def kept(self) -> None:
        """A checkpoint was made: the clock begins anew."""
        self._kept_at = time.monotonic()

    def cast(self) -> Tensor:
        """(n,) float64 for a sum over the ranks."""
        due = time.monotonic() - self._kept_at >= self._keep_every
        rest = torch.tensor([float(due), float(any(line not in self._known for line in self._new))])
        return torch.cat([self.stops.votes(), rest.double()])

    def count(self, counted: Tensor | None = None) -> Outcome:
        """What came of it; ``counted`` is the sum of the ranks' votes where it is there already.

        Raises:
            UserError: on every rank, more images cannot be read than may be.
        """
        if counted is None:
            counted = self.cast()
            self._comm.start_all_reduce_sum(counted, "votes").wait()
        *asked, due, bad = counted.tolist()
        why = [reason for reason, votes in zip(REASONS, asked, strict=True) if votes]
        replaced = self._tell_each_other() if bad else ()
        return Outcome(why[-1] if why else None, due > 0, replaced)

    def _tell_each_other(self) -> tuple[str, ...]:
        """Every rank's new lines on every rank, each once."""
        mine = sorted(set(self._new) - self._known)
        self._new.clear()
        lengths = torch.zeros(self._comm.size, dtype=torch.float64)
        lengths[self._comm.rank] = len(mine)
        self._comm.start_all_reduce_sum(lengths, "bad_images").wait()
        found: dict[str, None] = {}
        for rank in lengths.nonzero().flatten().tolist():
            found |= dict.fromkeys(self._comm.broadcast_object(mine, rank))
        replaced = tuple(line for line in found if line not in self._known)
        self._known.update(replaced)
        if len(self._known) > self._max_bad_fraction * self._num_images:
            raise UserError(
                f"data.max_bad_fraction: {len(self._known)} of {self._num_images:,} images cannot "
                f"be read, such as {next(iter(found))}; allowed: {self._max_bad_fraction:g} of them"
            )
        return replaced
