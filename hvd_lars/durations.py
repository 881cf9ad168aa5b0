"""Lengths of training given in epochs, steps or samples; imports nothing of hvd_lars."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_FORM = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(epoch|step|sample)s?\s*")


@dataclass(frozen=True)
class Duration:
    """``value`` epochs, steps or samples, as the YAML says: ``5 epochs``, ``600 steps``."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read ``"2.5 epochs"``; ValueError says what is allowed."""
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        try:
            if match is None:
                raise ValueError
            value = float(match.group(1))
            if not math.isfinite(value) or (match.group(2) != "epoch" and value != int(value)):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{text!r} is not a duration; write it as '5 epochs', '600 steps' or "
                f"'1.28e6 samples'"
            ) from None
        return cls(value, match.group(2) + "s")

    def __str__(self) -> str:
        """The form that :meth:`parse` reads."""
        value = int(self.value) if self.value == int(self.value) else self.value
        return f"{value} {self.unit}"

    def steps(self, steps_per_epoch: int, global_batch: int) -> int:
        """The nearest number of optimizer steps."""
        if self.unit == "epochs":
            return round(self.value * steps_per_epoch)
        return round(self.value / global_batch) if self.unit == "samples" else int(self.value)


@dataclass(frozen=True)
class Intervals:
    """Lengths in steps: of the run, and between evaluations, log lines and checkpoints."""

    total: int
    evaluate: int
    log: int
    checkpoint: int
