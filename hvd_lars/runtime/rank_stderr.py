"""A job's standard error: what all ranks say stands once, other lines carry their rank."""

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
    """One that was given since the last comparison."""

    text: str
    shown: bool


@final
class RankErrors:
    """Standard error of one rank; in place of ``sys.stderr`` on others than rank 0.

    Rank 0 speaks as ever.  Another rank's lines come at once, each after ``rank N:``; its Python
    warnings wait until :meth:`settle` knows which of them rank 0 gave, too.  They are shown in
    any case before whatever else the rank says, and when it leaves in good order.

    Args:
        stream: where it all goes.
        rank: whose lines they are.
        hold: warnings wait; False in a process that nobody asks to settle.
    """

    def __init__(self, stream: TextIO, rank: int, hold: bool = True) -> None:
        self._stream, self.rank, self._hold = stream, rank, hold
        self._given: list[_Warning] = []
        self._sampled = 0
        self._at_start = True

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # a copy that is being made
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, each line of another rank than 0 with its rank."""
        self.release()
        return self._write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As a file's."""
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
        """Take a warning; in place of ``warnings.showwarning``."""
        text = warnings.formatwarning(message, category, filename, lineno, line)
        if file is not None:
            file.write(text)
            return
        self._given.append(_Warning(text, shown=False))
        if self.rank == 0 or not self._hold:
            self.release()

    def sample(self) -> int:
        """A number below 2³² for the warnings that :meth:`settle` will be about; 0 for none."""
        self._sampled = len(self._given)
        return zlib.crc32("\0".join(self.sampled()).encode(errors="replace"))

    def sampled(self) -> list[str]:
        """The warnings of the last sample."""
        return [warning.text for warning in self._given[: self._sampled]]

    def settle(self, said: Collection[str]) -> None:
        """Show those of the last sample that wait and are not among what rank 0 ``said``."""
        sampled = self._given[: self._sampled]
        del self._given[: self._sampled]
        self._sampled = 0
        self._show([warning for warning in sampled if warning.text not in said])

    def release(self) -> None:
        """Show the warnings that wait."""
        self._show(self._given)
        if not self._hold:
            self._given.clear()

    def become(self, rank: int) -> None:
        """Be another rank from here on."""
        if rank != self.rank:
            self.release()
            self._given.clear()
            self.rank, self._sampled = rank, 0

    def _show(self, given: Iterable[_Warning]) -> None:
        for warning in given:
            if not warning.shown:
                warning.shown = True
                with suppress(OSError):  # as Python: whoever reads it has gone, its disk is full
                    if self.rank:
                        self._write(warning.text)
                    else:  # through what stands in for standard error, such as a progress bar
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


_voice: RankErrors | None = None


def speak_as(rank: int, hold: bool = True) -> None:
    """From here on this process's standard error is rank ``rank``'s; may be called again.

    ``hold``: as of :class:`RankErrors`.
    """
    global _voice
    if _voice is None:
        if sys.stderr is None:  # closed
            return
        _voice = RankErrors(sys.stderr, rank, hold)
        warnings.showwarning = _voice.warn
        atexit.register(_voice.release)
    _voice.become(rank)
    if rank > 0:
        sys.stderr = cast(TextIO, _voice)


def voice() -> RankErrors | None:
    """This process's standard error, once :func:`speak_as` was called."""
    return _voice
