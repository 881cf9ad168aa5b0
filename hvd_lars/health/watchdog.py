"""A watchdog for lost ranks, which collectives cannot distinguish from slow ones.

Every rank sends a heartbeat datagram per second to rank 0, and rank 0 answers.  A stopped process
(SIGSTOP, a hung machine) sends none; a rank that waits for ever sends heartbeats without progress.
Either ends the job with a line that names the ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, final

import torch

from hvd_lars.comm.base import Communicator
from hvd_lars.health.heartbeats import Heartbeats, Position, describe, process_state
from hvd_lars.optim.distributed.placement import Placement
from hvd_lars.runtime.terminal import warn

_BEAT = 1.0  # seconds; longer if rank 0 would receive more than 256 datagrams a second
_MEETING = 5.0  # seconds to wait for the first datagrams, which take milliseconds
_SIOCGIFADDR = 0x8915  # Linux ioctl: the address of an interface
_STACKS_AFTER = 3.0  # seconds for ranks to send their stacks


@final
class Watchdog:
    """Ends the job when a rank is lost; :meth:`watching` is collective at its beginning.

    Args:
        comm: the ranks.
        position: returns this rank's position; called from a thread.
        rank_timeout: seconds without a heartbeat from a rank's process.
        stall_timeout: seconds without progress of any rank.
        replaceable: in an elastic job, where the others continue without a rank whose process
            ends: only kill lost ranks on this machine.
        section: prefix of the two timeouts' keys in messages.
    """

    def __init__(
        self,
        comm: Communicator,
        position: Callable[[], Position],
        rank_timeout: float,
        stall_timeout: float,
        replaceable: bool = False,
        section: str = "run.",
    ) -> None:
        self._section = section
        self._comm, self._position, self._replaceable = comm, position, replaceable
        self._heartbeats = Heartbeats(rank_timeout, stall_timeout, time.monotonic())
        self._over, self._met = threading.Event(), threading.Event()
        self._leaving = False
        self._main = threading.main_thread().ident
        self._beat = min(max(_BEAT, comm.size / 256), rank_timeout / 4)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside; do nothing with a single rank."""
        if self._comm.size == 1:
            yield
            return
        host = self._comm.broadcast_object(socket.gethostname())
        same = torch.tensor(float(host == socket.gethostname()))
        self._comm.start_all_reduce_sum(same, "watchdog").wait()
        one_host = int(same.item()) == self._comm.size
        link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        link.bind(("127.0.0.1" if one_host else "", 0))
        link.settimeout(_BEAT / 10)
        addresses = [] if self._comm.rank else _addresses(one_host)
        mine = (addresses, link.getsockname()[1], secrets.token_hex(16))
        addresses, port, token = self._comm.broadcast_object(mine)
        targets = [] if self._comm.rank == 0 else [(address, port) for address in addresses]
        thread = threading.Thread(target=self._work, args=(link, targets, token), daemon=True)
        thread.start()
        self._met.wait(_MEETING)
        try:
            yield
        except BaseException:
            self._leaving = True  # the thread first makes sure that no rank is left behind
            if self._replaceable:
                thread.join(self._heartbeats.rank_timeout + _MEETING)
            raise
        finally:
            self._over.set()
            thread.join()
            link.close()

    def _work(self, link: socket.socket, targets: list[tuple[str, int]], token: str) -> None:
        """Send and receive heartbeats and look for lost ranks until the run is over."""
        peers: dict[int, tuple[str, int]] = {}
        next_beat, alarm, warned = 0.0, float("inf"), False
        started = time.monotonic()
        while not self._over.is_set():
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + (self._beat if self._met.is_set() else _BEAT / 10)
                wanted = alarm < float("inf")
                beat = self._heartbeat(token, wanted)
                for target in targets or list(peers.values()):
                    _send(link, target, beat)
            answer = _receive(link, token)
            if answer is not None:
                beat, target = answer
                alarm = self._take(beat, target, peers, alarm)
                if targets:
                    targets = [target]  # the address of rank 0 that is reachable from here
            now = time.monotonic()
            if self._leaving and self._is_last(now):
                break
            self._note_own(now)
            expected = 1 if targets else self._comm.size - 1
            heard = len(self._heartbeats.ranks) - (not targets)
            if heard >= expected:
                self._met.set()
            elif not warned and not self._met.is_set() and now > started + _MEETING:
                warned = True
                self._warn(expected - heard)
            silent, stalled = self._heartbeats.check(now)
            if silent:
                self._end(silent)
            elif stalled and self._comm.rank == 0:  # only rank 0 hears all ranks
                alarm = min(alarm, now)  # ask for stacks first
                if now > alarm + _STACKS_AFTER:
                    self._end([])
        for target in targets or peers.values():
            for _ in range(3):
                _send(link, target, self._heartbeat(token, False))

    def _is_last(self, now: float) -> bool:
        """Return whether no other rank on this machine is still in the failed attempt.

        A stopped process does not notice the failure, and Horovod's driver would wait for it.
        """
        mine = socket.gethostname()
        here = {
            r: k
            for r, k in self._heartbeats.ranks.items()
            if k.host == mine and k.pid != os.getpid()
        }
        for rank, known in here.items():
            if (state := process_state(known.pid)) is None:
                self._heartbeats.ranks.pop(rank)
            elif state == "T":
                self._replace([rank], "stopped (SIGSTOP) while the others had to leave:")
        return not here

    def _note_own(self, now: float) -> None:
        if self._comm.rank == 0:
            self._heartbeats.received(0, socket.gethostname(), os.getpid(), self._position(), now)

    def _heartbeat(self, token: str, alarm: bool) -> dict[str, Any]:
        """Return this rank's heartbeat, with its stack if rank 0 has asked for it."""
        beat: dict[str, Any] = {
            "token": token, "rank": self._comm.rank, "host": socket.gethostname(),
            "pid": os.getpid(), "position": self._position(),
        }  # fmt: skip
        if self._leaving or self._over.is_set():
            beat["bye"] = True
        elif alarm and self._comm.rank == 0:
            beat["alarm"] = True
        elif alarm:
            beat["stack"], beat["waits"] = self._stack()
        return beat

    def _take(
        self,
        beat: dict[str, Any],
        target: tuple[str, int],
        peers: dict[int, tuple[str, int]],
        alarm: float,
    ) -> float:
        rank = int(beat["rank"])
        if beat.get("bye"):
            self._heartbeats.ranks.pop(rank, None)  # it may still wait for our own good-bye
            return alarm
        now = time.monotonic()
        known = self._heartbeats.received(
            rank, beat["host"], beat["pid"], Position(*beat["position"]), now
        )
        known.stack, known.waits = beat.get("stack", ""), beat.get("waits", False)
        if self._comm.rank == 0:
            peers[rank] = target
        elif beat.get("alarm"):
            return min(alarm, now)
        return alarm

    def _stack(self) -> tuple[str, bool]:
        """Return the main thread's innermost frames, and whether it waits for other ranks."""
        frame = sys._current_frames().get(self._main or 0)
        found = traceback.extract_stack(frame)
        waits = any("hvd_lars/comm/" in entry.filename for entry in found)
        lines = [f"{e.filename}:{e.lineno} {e.name}" for e in found[-8:]]
        return "\n".join(lines), waits

    def _warn(self, missing: int) -> None:
        who = f"{missing} ranks" if self._comm.rank == 0 else "rank 0"
        warn(
            f"rank {self._comm.rank} receives no heartbeats from {who}: allow UDP between the "
            f"hosts, or only {self._comm.backend} itself can detect a rank that hangs"
        )

    def _end(self, silent: list[int]) -> None:
        """Report the lost ranks and end the job, or only them if they can be replaced."""
        if self._comm.rank != 0:  # rank 0 is lost: the first rank to wake reports and ends the job
            time.sleep(min(0.5 * self._comm.rank, 10.0))
            if self._over.is_set():
                return
        known = self._heartbeats.ranks
        if silent:
            seconds = self._heartbeats.rank_timeout
            self._replace(
                silent, f"no heartbeat for {seconds:g} s ({self._section}rank_timeout) from:"
            )
            return
        known[0].stack, known[0].waits = self._stack()
        lost = [rank for rank in sorted(known) if not known[rank].waits]
        who = "not in a collective, so the others wait for:"
        if not lost:
            lost, who = sorted(known), "each waits for the others, at another point of the program:"
        seconds = self._heartbeats.stall_timeout
        line = f"no rank made progress for {seconds:g} s ({self._section}stall_timeout)"
        self._replace(lost[:8], f"{line}\n{who}")

    def _replace(self, lost: list[int], why: str) -> None:
        """End the job, or kill lost ranks on this machine if others can take over."""
        known = self._heartbeats.ranks
        reason = "\n".join([why, *(describe(rank, known[rank]) for rank in lost)])
        if not self._replaceable:
            self._comm.abort(reason)
        here = [rank for rank in lost if known[rank].host == socket.gethostname()]
        end = "killed, for others to take over" if here else "on another machine: left to Horovod"
        warn(f"{reason}\n  {end}")
        for rank in lost:  # reported once
            pid = known.pop(rank).pid
            if rank in here:
                with suppress(OSError):  # it has already ended
                    os.kill(pid, signal.SIGKILL)


@contextmanager
def watching(
    comm: Communicator,
    placement: Placement,
    rank_timeout: float = 120.0,
    stall_timeout: float = 1800.0,
) -> Iterator[None]:
    """End the job, with a line that names the ranks, when one of them is lost inside.

    For custom training loops.  A rank is lost if it stops, waits for ever, or takes more steps than
    the others.  Collective at its beginning and end.

    Args:
        comm: the ranks.
        placement: the placement whose steps are counted.
        rank_timeout: seconds without a heartbeat from a rank's process.
        stall_timeout: seconds without progress of any rank; must exceed any normal wait.
    """
    gradients, ended = placement.gradients, False

    def position() -> Position:
        doing = "the end of its loop" if ended else gradients.watch.current or "its own code"
        return Position(gradients.steps, doing, gradients.watch.changes)

    with Watchdog(comm, position, rank_timeout, stall_timeout, section="").watching():
        yield
        ended = True
        comm.barrier()


def _addresses(one_host: bool) -> list[str]:
    """Return addresses at which other ranks may reach this machine, likeliest first."""
    if one_host:
        return ["127.0.0.1"]
    found = [str(entry[4][0]) for entry in _resolve(socket.gethostname())]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                asked = struct.pack("256s", interface.encode()[:15])
                found.append(socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, asked)[20:24]))
    return list(dict.fromkeys(address for address in found if not address.startswith("127.")))


def _resolve(host: str) -> list[Any]:
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_DGRAM)
    except OSError:
        return []


def _send(link: socket.socket, target: tuple[str, int], beat: dict[str, Any]) -> None:
    with suppress(OSError):  # the network may be down for a while; only silence counts
        link.sendto(json.dumps(beat).encode(), target)


def _receive(link: socket.socket, token: str) -> tuple[dict[str, Any], tuple[str, int]] | None:
    """Return the next heartbeat of this job's ranks; None after a tenth of a beat without one."""
    try:
        data, sender = link.recvfrom(65_535)
        beat = json.loads(data)
    except (OSError, ValueError):
        return None
    if not isinstance(beat, dict) or beat.get("token") != token:
        return None
    return beat, sender
