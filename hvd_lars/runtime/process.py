"""Set-up that a process needs before anything else, on any machine."""

from __future__ import annotations

import codecs
import io
import os
import pwd
import sys
from typing import TextIO, cast

# Replacements for printed characters that ASCII or Latin-1 terminals lack.
_PLAIN = {
    "×": "x", "–": "-", "—": "-", "…": "...", "≤": "<=", "≥": ">=", "→": "->", "·": ".",
    **dict(zip("▁▂▃▄▅▆▇█", "_.-=+*#@", strict=True)),
}  # fmt: skip


def prepare() -> None:
    """Make sure that the standard streams and a user name exist, as libraries expect.

    A closed stream is opened on /dev/null: otherwise the next opened file would take its descriptor
    and receive the output.  Characters missing in a terminal's encoding are printed in ASCII.  A
    user id unknown to the system (``docker run --user``, OpenShift) gets a name in the environment,
    where torch looks first.
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
    """Return a replacement for a character that an encoding lacks; Python's error handler."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    plain = "".join(_PLAIN.get(sign) or ascii(sign)[1:-1] for sign in text)
    return plain, error.end


def flush_output() -> str | None:
    """Flush standard output; return why that failed, or None, also if its reader has gone.

    After a failure nothing more is written, so that the interpreter's exit does not fail as well.
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
