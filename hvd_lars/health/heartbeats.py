"""Which ranks are alive and make progress, by their heartbeats."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

_PAUSED = 5.0  # seconds; a watcher that itself slept this long was suspended with all the others


class Position(NamedTuple):
    """How far a rank is: steps done, the part of a step, and a number that grows with progress."""

    step: int
    part: str
    ticks: int


@dataclass
class Rank:
    """The last heartbeat of a rank; times are by the watching rank's clock, in seconds."""

    host: str
    pid: int
    position: Position
    heard: float
    moved: float
    stack: str = ""
    waits: bool = False  # its main thread is in a collective


@final
class Heartbeats:
    """Finds lost ranks; has no threads, sockets or clock of its own.

    Args:
        rank_timeout: seconds without a heartbeat.
        stall_timeout: seconds in which no rank makes progress.
    """

    def __init__(self, rank_timeout: float, stall_timeout: float, now: float) -> None:
        self.rank_timeout, self.stall_timeout = rank_timeout, stall_timeout
        self.ranks: dict[int, Rank] = {}
        self._checked = now

    def received(self, rank: int, host: str, pid: int, position: Position, now: float) -> Rank:
        """Take a heartbeat."""
        known = self.ranks.get(rank)
        if known is None:
            known = self.ranks[rank] = Rank(host, pid, position, now, now)
        if position.ticks != known.position.ticks:
            known.moved = now
        known.position, known.heard = position, now
        return known

    def check(self, now: float) -> tuple[list[int], bool]:
        """Ranks that are silent, and whether no rank makes progress; call it every second or so."""
        if now - self._checked > _PAUSED:
            for rank in self.ranks.values():
                rank.heard = rank.moved = now
        self._checked = now
        silent = [r for r, rank in self.ranks.items() if now - rank.heard > self.rank_timeout]
        moved = max((rank.moved for rank in self.ranks.values()), default=now)
        return sorted(silent), now - moved > self.stall_timeout


def describe(rank: int, known: Rank) -> str:
    """A rank's line: who and where it is, its last step, and its stack where it sent one."""
    what = f"  rank {rank} (host {known.host}, pid {known.pid}): {known.position.step} steps done, "
    what += f"then in {known.position.part or 'between parts'}{_state_of(known)}"
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
