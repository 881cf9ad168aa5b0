"""What ranks tell each other beside gradients: requests to stop, bad images, checkpoints due.

They ride on an all-reduce that a step makes anyway.
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
class Outcome:
    """What the ranks agreed on, the same on all.

    Attributes:
        stop: why they stop; None to go on.
        keep: a checkpoint is due by the clock.
        unreadable: images that no rank had met before.
    """

    stop: str | None
    keep: bool
    unreadable: tuple[Unreadable, ...]


@final
class Votes:
    """One rank's part; every method but ``cast`` and ``kept`` is collective.

    Args:
        comm: the ranks.
        stops: requests to stop that this rank hears.
        unreadable: images that cannot be read, which the data source appends and ``count`` takes.
        num_train, num_eval: images to train and to evaluate on, and
        max_bad_fraction: of either may be unreadable.
        keep_every: seconds between checkpoints, by rank 0's clock.
    """

    def __init__(
        self,
        comm: Communicator,
        stops: StopRequests | None = None,
        unreadable: list[Unreadable] | None = None,
        num_train: int = 1,
        num_eval: int = 1,
        max_bad_fraction: float = 1.0,
        keep_every: float = math.inf,
    ) -> None:
        self.stops = stops or StopRequests()
        self._comm, self._new = comm, [] if unreadable is None else unreadable
        self._num_images = {False: num_train, True: num_eval}  # whether of evaluation
        self._max_bad_fraction = max_bad_fraction
        self._known: set[Unreadable] = set()
        self._keep_every = keep_every if comm.rank == 0 else math.inf
        self.kept()

    def kept(self) -> None:
        """A checkpoint was made: the clock begins anew."""
        self._kept_at = time.monotonic()

    def cast(self) -> Tensor:
        """(n,) float64 for a sum over the ranks."""
        due = time.monotonic() - self._kept_at >= self._keep_every
        rest = torch.tensor(
            [float(due), float(any(image not in self._known for image in self._new))]
        )
        return torch.cat([self.stops.votes(), rest.double()])

    def count(self, counted: Tensor | None = None) -> Outcome:
        """What came of it; ``counted`` is the sum of the ranks' votes where it is there already.

        Rank 0 names each image that cannot be read, once.

        Raises:
            UserError: on every rank, more images cannot be read than may be.
        """
        if counted is None:
            counted = self.cast()
            self._comm.start_all_reduce_sum(counted, "votes").wait()
        *asked, due, bad = counted.tolist()
        why = [reason for reason, votes in zip(REASONS, asked, strict=True) if votes]
        unreadable = self._tell_each_other() if bad else ()
        return Outcome(why[-1] if why else None, due > 0, unreadable)

    def _tell_each_other(self) -> tuple[Unreadable, ...]:
        """Every rank's new images on every rank, each once."""
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
