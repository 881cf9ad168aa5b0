"""Lengths of training given in epochs, steps, samples or minutes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_FORM = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(epoch|step|sample|minute)s?\s*")


@dataclass(frozen=True)
class Duration:
    """``value`` epochs, steps, samples or minutes, as the YAML says: ``5 epochs``."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: object, minutes: bool = False) -> Duration:
        """Read ``"2.5 epochs"``, also minutes where allowed; ValueError says what is."""
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
        """The form that :meth:`parse` reads."""
        value = int(self.value) if self.value == int(self.value) else self.value
        return f"{value} {self.unit}"

    def steps(self, steps_per_epoch: int, global_batch: int) -> int:
        """The nearest number of optimizer steps; of minutes there is none: ValueError."""
        if self.unit == "minutes":
            raise ValueError(f"{self} is no number of steps")
        if self.unit == "epochs":
            return round(self.value * steps_per_epoch)
        return round(self.value / global_batch) if self.unit == "samples" else int(self.value)


@dataclass(frozen=True)
class Intervals:
    """Steps of the run, and between what is done in it.

    Attributes:
        total: of the whole run.
        evaluate: between evaluations.
        log: between log lines.
        checkpoint: between checkpoints.
        layers: between records of all layers' norms; 0 for none.
        verify: between comparisons of the ranks' parameters; 0 for none.
        snapshot: between snapshots in memory, in a job whose ranks come and go.
        checkpoint_seconds: between checkpoints, where those are by the clock.
    """

    total: int
    evaluate: int
    log: int
    checkpoint: int
    layers: int = 0
    verify: int = 0
    snapshot: int = 20
    checkpoint_seconds: float = math.inf
