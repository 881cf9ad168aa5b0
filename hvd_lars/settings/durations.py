"""Lengths of training given in epochs, steps, samples or minutes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_FORM = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(epoch|step|sample|minute)s?\s*")


@dataclass(frozen=True)
class Duration:
    """``value`` epochs, steps, samples or minutes, written in YAML as ``5 epochs``."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: object, minutes: bool = False) -> Duration:
        """Parse ``"2.5 epochs"``, or minutes if allowed; ValueError lists the allowed forms."""
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        try:
            if match is None:
                raise ValueError
            value = float(match.group(1))
            if match.group(2) == "minute" and not minutes:
                raise ValueError
            if not math.isfinite(value) or (
                match.group(2) in ("step", "sample") and value != int(value)
            ):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{text!r} is not a duration; write it as '5 epochs', '600 steps' or "
                f"'1.28e6 samples'" + (", or '30 minutes'" if minutes else "")
            ) from None
        return cls(value, match.group(2) + "s")

    def __str__(self) -> str:
        """Return the form that :meth:`parse` reads."""
        value = int(self.value) if self.value == int(self.value) else self.value
        return f"{value} {self.unit}"

    def steps(self, steps_per_epoch: int, global_batch: int) -> int:
        """Return the nearest number of optimizer steps; ValueError for minutes."""
        if self.unit == "minutes":
            raise ValueError(f"{self} cannot be converted to steps")
        if self.unit == "epochs":
            return round(self.value * steps_per_epoch)
        return round(self.value / global_batch) if self.unit == "samples" else int(self.value)


@dataclass(frozen=True)
class Intervals:
    """Steps of the run, and steps between its periodic actions.

    Attributes:
        total: steps of the whole run.
        evaluate: steps between evaluations.
        log: steps between log lines.
        checkpoint: steps between checkpoints.
        layers: steps between records of all layers' norms; 0 for none.
        verify: steps between comparisons of the ranks' parameters; 0 for none.
        snapshot: steps between snapshots in memory, in an elastic job.
        checkpoint_seconds: seconds between checkpoints; infinite unless they go by the clock.
    """

    total: int
    evaluate: int
    log: int
    checkpoint: int
    layers: int = 0
    verify: int = 0
    snapshot: int = 20
    checkpoint_seconds: float = math.inf

    def pauses_at(self, step: int) -> bool:
        """Return whether one of the actions but snapshots follows ``step``."""
        every = self.evaluate, self.log, self.checkpoint, self.verify, self.layers
        return step == self.total or any(steps and step % steps == 0 for steps in every)
