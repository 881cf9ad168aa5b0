"""The time of a step, by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

PARTS = ("data", "forward", "backward", "communication", "optimizer")


@final
class Stopwatch:
    """Seconds by part, each second in one part: a part that begins inside another pauses it.

    Args:
        settle: called at every change of part; on a GPU, ``torch.cuda.synchronize`` measures
            device time, at the cost of the overlap with the host.
    """

    def __init__(self, settle: Callable[[], object] | None = None) -> None:
        self._settle = settle
        self._running: list[str] = []
        self.changes = 0  # changes of part since the beginning
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._since = time.perf_counter()

    @property
    def current(self) -> str:
        """The running part; empty between parts."""
        return self._running[-1] if self._running else ""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``, one of ``PARTS``."""
        self._change()
        self._running.append(name)
        try:
            yield
        finally:
            self._change()
            self._running.pop()

    def _change(self) -> None:
        if self._settle is not None:
            self._settle()
        self.changes += 1
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
