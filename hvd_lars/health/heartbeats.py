"""Detection of lost and stalled ranks by their heartbeats."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

_PAUSED = 5.0  # seconds; if this process slept that long, the whole job was suspended


class Position(NamedTuple):
    """A rank's progress: steps done, the current part, and a count that grows with progress."""

    step: int
    part: str
    ticks: int


@dataclass
class Rank:
    """The last heartbeat of a rank; times in seconds by the watching rank's clock."""

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
        rank_timeout: seconds without a heartbeat after which a rank is silent.
        stall_timeout: seconds without progress of any rank.
    """

    def __init__(self, rank_timeout: float, stall_timeout: float, now: float) -> None:
        self.rank_timeout, self.stall_timeout = rank_timeout, stall_timeout
        self.ranks: dict[int, Rank] = {}
        self._checked = now

    def received(self, rank: int, host: str, pid: int, position: Position, now: float) -> Rank:
        """Record a heartbeat and return its rank's entry."""
        known = self.ranks.get(rank)
        if known is None:
            known = self.ranks[rank] = Rank(host, pid, position, now, now)
        if position.ticks != known.position.ticks:
            known.moved = now
        known.position, known.heard = position, now
        return known

    def check(self, now: float) -> tuple[list[int], bool]:
        """Return the silent ranks, and whether no rank makes progress; call about every second."""
        if now - self._checked > _PAUSED:
            for rank in self.ranks.values():
                rank.heard = rank.moved = now
        self._checked = now
        silent = [r for r, rank in self.ranks.items() if now - rank.heard > self.rank_timeout]
        moved = max((rank.moved for rank in self.ranks.values()), default=now)
        return sorted(silent), now - moved > self.stall_timeout


def describe(rank: int, known: Rank) -> str:
    """Return a rank's line: host, process, position, and its stack if it sent one."""
    what = f"  rank {rank} (host {known.host}, pid {known.pid}): {known.position.step} steps done, "
    what += f"then in {known.position.part or 'between parts'}{_state_of(known)}"
    return what + "".join(f"\n    {line}" for line in known.stack.splitlines())


def process_state(pid: int) -> str | None:
    """Return the state of a process on this machine (R, S, D, T …), or None if it has ended."""
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
