"""A job's standard error: warnings of all ranks are shown once, other lines carry their rank."""

from __future__ import annotations

import atexit
import sys
import warnings
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO, cast, final


@dataclass
class _Warning:
    """A warning given since the last comparison with rank 0."""

    text: str
    shown: bool


@final
class RankStderr:
    """Standard error of one rank; replaces ``sys.stderr`` on ranks other than 0.

    Rank 0 writes unchanged.  The other ranks' lines are written at once, each after ``rank N:``;
    their Python warnings are held until :meth:`settle` drops those that rank 0 gave too.  Held
    warnings are shown in any case before other output of the rank, and at an orderly exit.

    Args:
        stream: receives the output.
        rank: this rank.
        hold: hold warnings; False in a process where :meth:`settle` is never called.
    """

    def __init__(self, stream: TextIO, rank: int, hold: bool = True) -> None:
        self._stream, self.rank, self._hold = stream, rank, hold
        self._given: list[_Warning] = []
        self._sampled = 0
        self._at_start = True

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; each line of a rank other than 0 carries its rank."""
        self.release()
        return self._write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, like a file."""
        self.write("".join(lines))

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Take a warning; replaces ``warnings.showwarning``."""
        text = warnings.formatwarning(message, category, filename, lineno, line)
        if file is not None:
            file.write(text)
            return
        self._given.append(_Warning(text, shown=False))
        if self.rank == 0 or not self._hold:
            self.release()

    def sample(self) -> int:
        """Return a hash below 2³² of the warnings that :meth:`settle` will cover; 0 for none."""
        self._sampled = len(self._given)
        return zlib.crc32("\0".join(self.sampled()).encode(errors="replace"))

    def sampled(self) -> list[str]:
        """Return the warnings of the last sample."""
        return [warning.text for warning in self._given[: self._sampled]]

    def settle(self, said: Collection[str]) -> None:
        """Show the held warnings of the last sample that are not in ``said``, rank 0's."""
        sampled = self._given[: self._sampled]
        del self._given[: self._sampled]
        self._sampled = 0
        self._show([warning for warning in sampled if warning.text not in said])

    def release(self) -> None:
        """Show the held warnings."""
        self._show(self._given)
        if not self._hold:
            self._given.clear()

    def become(self, rank: int) -> None:
        """Change this process's rank."""
        if rank != self.rank:
            self.release()
            self._given.clear()
            self.rank, self._sampled = rank, 0

    def _show(self, given: Iterable[_Warning]) -> None:
        for warning in given:
            if not warning.shown:
                warning.shown = True
                with suppress(OSError):  # as Python does: the reader has gone, or the disk is full
                    if self.rank:
                        self._write(warning.text)
                    else:  # through a replacement of standard error, such as a progress bar's
                        sys.stderr.write(warning.text)

    def _write(self, text: str) -> int:
        if self.rank == 0:
            return self._stream.write(text)
        own = f"rank {self.rank}: "
        for line in text.splitlines(keepends=True):
            if self._at_start and line != "\r" and not line.startswith(own):
                self._stream.write(own)
            self._stream.write(line)
            self._at_start = line.endswith(("\n", "\r"))  # a progress bar's \r
        return len(text)


_own_stderr: RankStderr | None = None


def label_stderr(rank: int, hold: bool = True) -> None:
    """Make this process's standard error that of rank ``rank``; may be called again.

    ``hold`` is as in :class:`RankStderr`.
    """
    global _own_stderr
    if _own_stderr is None:
        if sys.stderr is None:  # closed
            return
        _own_stderr = RankStderr(sys.stderr, rank, hold)
        warnings.showwarning = _own_stderr.warn
        atexit.register(_own_stderr.release)
    _own_stderr.become(rank)
    if rank > 0:
        sys.stderr = cast(TextIO, _own_stderr)


def own_stderr() -> RankStderr | None:
    """Return this process's rank stderr; None before :func:`label_stderr`."""
    return _own_stderr
