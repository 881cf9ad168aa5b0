"""Requests to stop a run, on which ranks agree (agreement.py) before any of them acts.

A request reaches one rank (a signal, a file, the clock); if that rank stopped alone, the others
would wait in a collective.  So the ranks' requests are summed with every step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import final

import torch
from torch import Tensor

STOP_FILE = "STOP file"
REQUEUE_FILE = "STOP file that says requeue"
PRUNED = "pruning"
# Of several simultaneous requests, the last in this order is reported.
REASONS = (
    PRUNED,
    STOP_FILE,
    REQUEUE_FILE,
    "run.max_hours",
    "SIGUSR1",
    "SIGHUP",
    "SIGINT",
    "SIGTERM",
)
_SIGNALS = {
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGHUP: "SIGHUP",
    signal.SIGINT: "SIGINT",
    signal.SIGTERM: "SIGTERM",
}
_LOOK_EVERY = 1.0  # seconds between checks of the file system
_WRITTEN_IN = 0.2  # seconds in which ``echo requeue > STOP`` fills the file that it makes


def _request_in(stop_file: Path) -> str:
    try:
        if not (text := stop_file.read_bytes()):
            time.sleep(_WRITTEN_IN)
            text = stop_file.read_bytes()
    except OSError:  # a dangling link is a request too
        return STOP_FILE
    return REQUEUE_FILE if text.startswith(b"requeue") else STOP_FILE


@final
class StopRequests:
    """Requests to stop that reached this rank.

    Args:
        stop_file: requests a stop by its existence, or a requeue if it contains "requeue"; None
            on ranks that do not look for it.
        max_seconds: seconds from now until a request; infinity for none.
    """

    def __init__(self, stop_file: Path | None = None, max_seconds: float = float("inf")) -> None:
        self._stop_file, self._deadline = stop_file, time.monotonic() + max_seconds
        self._next_look = 0.0
        self._asked: set[str] = set()

    @classmethod
    def within(cls, hours: float | None) -> StopRequests:
        """Return requests with a limit of ``hours`` from now; None for no limit."""
        return cls(max_seconds=float("inf") if hours is None else hours * 3600.0)

    def with_file(self, stop_file: Path | None) -> StopRequests:
        """Return a twin with another file, for a process whose rank changed.

        Both share their requests and deadline.
        """
        twin = StopRequests(stop_file)
        twin._deadline, twin._asked = self._deadline, self._asked
        return twin

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM, SIGUSR1, Ctrl-C and the end of a terminal (SIGHUP) as requests inside.

        A second Ctrl-C interrupts.  SIGHUP stays ignored if it already is, as under nohup.
        """
        numbers = set(_SIGNALS)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        """Request a stop; ``reason`` is one of REASONS."""
        self._asked.add(reason)

    def withdraw(self, reason: str) -> None:
        """Take a request back, if there is one."""
        self._asked.discard(reason)

    def requests(self) -> Tensor:
        """Return this rank's requests, (len(REASONS),) float64, to be summed over the ranks."""
        now = time.monotonic()
        if now >= self._deadline:
            self._asked.add("run.max_hours")
        if self._stop_file is not None and now >= self._next_look:
            self._next_look = now + _LOOK_EVERY
            if os.path.lexists(self._stop_file):
                self._asked.add(_request_in(self._stop_file))
        return torch.tensor([float(reason in self._asked) for reason in REASONS]).double()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and "SIGINT" in self._asked:
            raise KeyboardInterrupt
        self._asked.add(_SIGNALS[signal.Signals(number)])
