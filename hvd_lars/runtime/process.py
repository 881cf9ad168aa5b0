"""What a process needs before it does anything, wherever it runs."""

from __future__ import annotations

import codecs
import io
import os
import pwd
import sys
from typing import TextIO, cast

# What we print that terminals in ASCII or Latin-1 have no sign for.
_PLAIN = {
    "×": "x", "–": "-", "—": "-", "…": "...", "≤": "<=", "≥": ">=", "→": "->", "·": ".",
    **dict(zip("▁▂▃▄▅▆▇█", "_.-=+*#@", strict=True)),
}  # fmt: skip


def prepare() -> None:
    """Make standard streams and the user's name things that a library may ask for.

    A stream that is closed is opened on nothing: else the next file that is opened would take its
    number, and receive what is printed.  What a terminal's encoding has no sign for is printed in
    ASCII.  A user id that the system does not know (``docker run --user``, OpenShift) is
    given a name in the environment, where torch looks for it first.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(descriptor)
    sys.stdin = sys.stdin or _nothing("r")
    sys.stdout = sys.stdout or _nothing("w")
    sys.stderr = sys.stderr or _nothing("w")
    codecs.register_error("hvd_lars.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="hvd_lars.plain")
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"uid-{os.getuid()}"


def _nothing(mode: str) -> TextIO:
    return cast(TextIO, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (it stays open)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Python's hook for a character that an encoding does not have: another text for it."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    plain = "".join(_PLAIN.get(sign) or ascii(sign)[1:-1] for sign in text)
    return plain, error.end


def flush_output() -> str | None:
    """Flush standard output; why that failed, None also where its reader has gone.

    After a failure nothing more is written, so that the interpreter's end does not fail as well.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except (OSError, ValueError) as error:
        _discard_output()
        return getattr(error, "strerror", None) or str(error)
    return None


def _discard_output() -> None:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)
