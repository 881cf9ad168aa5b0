"""A job's standard error: what all ranks say stands once, other lines carry their rank.

Imports nothing of hvd_lars.
"""

from __future__ import annotations

import atexit
import sys
import warnings
import zlib
from collections.abc import Iterable
from typing import Any, TextIO, cast, final


@final
class RankErrors:
    """Standard error of one rank, in place of ``sys.stderr``.

    Rank 0 speaks as ever.  Another rank's lines come at once, each after ``rank N:``; its Python
    warnings wait until :meth:`settle` knows whether rank 0 gave the same ones.  They are shown in
    any case before whatever else the rank says, and when it leaves.

    Args:
        stream: where it all goes.
        rank: whose lines they are.
        hold: warnings wait; False in a process that nobody asks to settle.
    """

    def __init__(self, stream: TextIO, rank: int, hold: bool = True) -> None:
        self.rank, self._stream, self._hold = rank, stream, hold
        self._held: list[str] = []
        self._digest = 0
        self._at_start = True

    def __getattr__(self, name: str) -> Any:
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
        self._digest = zlib.crc32(text.encode(errors="replace"), self._digest)
        self._held.append(text)
        if self.rank == 0 or not self._hold:
            self.release()

    def digest(self) -> int:
        """A number below 2³² for the warnings since the last settling; 0 for none."""
        return self._digest

    def settle(self, same: bool) -> None:
        """Show the warnings that wait, or forget them where rank 0 gave the ``same``."""
        if same:
            self._held.clear()
        self.release()
        self._digest = 0

    def release(self) -> None:
        """Show the warnings that wait."""
        held, self._held = self._held, []
        for text in held:
            self._write(text)

    def _write(self, text: str) -> int:
        if self.rank == 0:
            return self._stream.write(text)
        own = f"rank {self.rank}: "
        for line in text.splitlines(keepends=True):
            if self._at_start and not line.startswith(own):
                self._stream.write(own)
            self._stream.write(line)
            self._at_start = line.endswith("\n")
        return len(text)


def speak_as(rank: int, hold: bool = True) -> None:
    """From here on this process's standard error is rank ``rank``'s; may be called again.

    ``hold``: as of :class:`RankErrors`.
    """
    now = sys.stderr
    if isinstance(now, RankErrors):
        now.rank = rank
        return
    errors = RankErrors(now, rank, hold)
    sys.stderr = cast(TextIO, errors)
    warnings.showwarning = errors.warn
    atexit.register(errors.release)


def voice() -> RankErrors | None:
    """What :func:`speak_as` put in place of standard error."""
    return sys.stderr if isinstance(sys.stderr, RankErrors) else None
