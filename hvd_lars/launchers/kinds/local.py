"""Ranks on this machine."""

from __future__ import annotations

from hvd_lars.launchers.local import local_command
from hvd_lars.launchers.start import Request, Start


def start(request: Request) -> Start:
    """Return the start of ``mpirun``, with two ranks if no number is given."""
    request.refuse_hosts("which starts ranks on this machine only")
    program = ["hvd-lars", "train", *request.training]
    return Start(local_command("mpirun", request.ranks or 2, program))
