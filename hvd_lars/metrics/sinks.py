"""Where records of a run go: a file of JSON lines, the terminal; imports nothing of hvd_lars."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, final


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null for what JSON has no number for: NaN and the infinities."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


class Sink(Protocol):
    """Takes one record at a time; lives on rank 0."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record: ``kind`` is ``train``, ``eval`` or ``event``, values are global."""
        ...

    def close(self) -> None:
        """No record follows."""
        ...


@final
class JsonLines:
    """Appends one JSON object a line and flushes it; a number that is not finite becomes null.

    ``unix_seconds``, when it was written, is added to every record.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record."""
        stamped = finite(record) | {"unix_seconds": round(time.time(), 3)}
        self._file.write(json.dumps(stamped, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@final
class Console:
    """One line of text a record on standard output."""

    def __init__(self, total_steps: int) -> None:
        self._width = len(str(total_steps))
        self._total = total_steps

    def write(self, record: Mapping[str, Any]) -> None:
        """Print the record; events that only matter to programs are left out."""
        place = f"step {record.get('step', 0):>{self._width}}/{self._total}"
        if record["kind"] == "train":
            print(
                f"{place}  epoch {record['epoch']:6.2f}  loss {record['loss']:.4f}  "
                f"lr {record['lr']:<8.4g}  {record['images_per_second']:,.0f} images/s",
                flush=True,
            )
        elif record["kind"] == "eval":
            print(
                f"{place}  epoch {record['epoch']:6.2f}  test loss {record['loss']:.4f}  "
                f"top-1 {record['top1']:.4f}  top-5 {record['top5']:.4f}"
                + (f"  average's top-1 {record['ema_top1']:.4f}" if "ema_top1" in record else ""),
                flush=True,
            )

    def close(self) -> None:
        """Nothing is held."""
