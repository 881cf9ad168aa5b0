"""Which ranks are alive and get on, by what they say."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

_PAUSED = 5.0  # seconds; a watcher that itself slept this long was suspended with all the others


class Place(NamedTuple):
    """Where a rank is: steps that are done, what it does, and a number that grows with it."""

    step: int
    part: str
    ticks: int


@dataclass
class Rank:
    """What the watcher knows of another rank; times are the watcher's own, in seconds."""

    host: str
    pid: int
    place: Place
    heard: float
    moved: float
    stack: str = ""
    waits: bool = False  # its main thread is in a collective


@final
class Judge:
    """Which ranks are lost; no threads and no sockets, and the time is told to it.

    Args:
        rank_timeout: seconds without a sign of life.
        stall_timeout: seconds in which no rank gets on.
    """

    def __init__(self, rank_timeout: float, stall_timeout: float, now: float) -> None:
        self.rank_timeout, self.stall_timeout = rank_timeout, stall_timeout
        self.ranks: dict[int, Rank] = {}
        self._looked = now

    def hear(self, rank: int, host: str, pid: int, place: Place, now: float) -> Rank:
        """Take a sign of life."""
        known = self.ranks.get(rank)
        if known is None:
            known = self.ranks[rank] = Rank(host, pid, place, now, now)
        if place.ticks != known.place.ticks:
            known.moved = now
        known.place, known.heard = place, now
        return known

    def look(self, now: float) -> tuple[list[int], bool]:
        """Ranks that are silent, and whether all stand still; to be asked every second or so."""
        if now - self._looked > _PAUSED:
            for rank in self.ranks.values():
                rank.heard = rank.moved = now
        self._looked = now
        silent = [r for r, rank in self.ranks.items() if now - rank.heard > self.rank_timeout]
        moved = max((rank.moved for rank in self.ranks.values()), default=now)
        return sorted(silent), now - moved > self.stall_timeout


def describe(rank: int, known: Rank) -> str:
    """A rank's line: who and where it is, its last step, and its stack where it sent one."""
    what = f"  rank {rank} (host {known.host}, pid {known.pid}): {known.place.step} steps done, "
    what += f"then in {known.place.part or 'between parts'}{_state_of(known)}"
    return what + "".join(f"\n    {line}" for line in known.stack.splitlines())


def process_state(pid: int) -> str | None:
    """What the system says of a process on this machine: R, S, D, T …; None: it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    states = [line.split()[1] for line in text.splitlines() if line.startswith("State:")]
    return None if states[:1] in ([], ["Z"], ["X"]) else states[0]


def _state_of(known: Rank) -> str:
    if known.host != socket.gethostname():
        return ""
    state = process_state(known.pid)
    if state is None:
        return "; the process is gone"
    return f"; the process is in state {state}{' (stopped)' if state == 'T' else ''}"
