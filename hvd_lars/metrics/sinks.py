"""Sinks for the records of a run: a file of JSON lines, the terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, final

from hvd_lars.metrics.evaluation import METRICS
from hvd_lars.runtime.terminal import tell, warn


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with null for NaN and infinities, which JSON lacks, at any depth."""
    return {key: _finite(value) for key, value in record.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return finite(value)
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sink(Protocol):
    """Takes one record at a time; lives on rank 0."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record: its ``kind`` is ``train``, ``eval``, ``event`` or ``layers``."""
        ...

    def close(self) -> None:
        """End the sink; no record follows."""
        ...


@final
class JsonLines:
    """Appends records of the given ``kinds``, one JSON object per line.

    Non-finite numbers become null, and ``unix_seconds``, the time of writing, is added.  On a full
    disk, lines wait in memory until there is room; no line is ever written in part.
    """

    def __init__(self, path: Path, kinds: Collection[str]) -> None:
        self._kinds = kinds
        self._path, self._file = path, path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._waiting = b""

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record, or keep it until there is room."""
        if record["kind"] not in self._kinds:
            return
        stamped = finite(record) | {"unix_seconds": round(time.time(), 3)}
        line = json.dumps(stamped, allow_nan=False).encode() + b"\n"
        problem = self._append(self._waiting + line)
        if problem is not None and not self._waiting:
            self._warn(f"{problem}; training continues, and its records wait for room")
        self._waiting = b"" if problem is None else self._waiting + line

    def close(self) -> None:
        """Close the file."""
        if self._waiting and (problem := self._append(self._waiting)) is not None:
            lost = self._waiting.count(b"\n")
            self._warn(f"{problem}; {lost:,} records are lost")
        self._file.close()

    def _append(self, data: bytes) -> str | None:
        """Write all of the data or nothing; return why nothing was written, or None."""
        try:
            if self._file.write(data) == len(data):
                self._size += len(data)
                return None
            problem = "no space left on the device"
        except OSError as error:
            problem = error.strerror or str(error)
        with suppress(OSError):
            self._file.truncate(self._size)
        return problem

    def _warn(self, what: str) -> None:
        warn(f"{self._path}: cannot be written: {what}")


@final
class Console:
    """Prints one line of text per record on standard output."""

    def __init__(self, total_steps: int) -> None:
        self._width = len(str(total_steps))
        self._total = total_steps

    def write(self, record: Mapping[str, Any]) -> None:
        """Print the record, if it is of training or evaluation."""
        place = f"step {record.get('step', 0):>{self._width}}/{self._total}"
        if record["kind"] == "train":
            tell(
                f"{place}  epoch {record['epoch']:6.2f}  loss {record['loss']:.4f}  "
                f"lr {record['lr']:<8.4g}  {record['images_per_second']:,.0f} images/s"
            )
        elif record["kind"] == "eval":
            values = [f"{metric.label} {record[name]:.4f}" for name, metric in METRICS.items()]
            if "ema_top1" in record:
                values.append(f"average's top-1 {record['ema_top1']:.4f}")
            tell(f"{place}  epoch {record['epoch']:6.2f}  {'  '.join(values)}")

    def close(self) -> None:
        """Do nothing."""
