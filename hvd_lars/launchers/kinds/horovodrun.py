"""Ranks on hosts by ``horovodrun``."""

from __future__ import annotations

from hvd_lars.errors import UserError
from hvd_lars.launchers.start import Request, Start, script


def start(request: Request) -> Start:
    """Return the start of launch/horovodrun.sh."""
    if request.ranks:
        raise UserError(
            "-np: not allowed with --on horovodrun, which uses every slot of its hosts; use "
            "--hosts localhost:4, or a:2,b:2"
        )
    training = request.with_run_folder("runs").training
    return Start(["bash", str(script("horovodrun.sh")), *training], request.variables())
