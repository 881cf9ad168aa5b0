"""Ranks on hosts by ``horovodrun``."""

from __future__ import annotations

from hvd_lars.errors import UserError
from hvd_lars.launchers.start import Request, Start, script


def start(request: Request) -> Start:
    """Return the start of launch/horovodrun.sh."""
    if request.ranks:
        raise UserError("-np: horovodrun takes all slots of its hosts; use --hosts a:2,b:2")
    training = request.with_run_folder("runs").training
    return Start(["bash", str(script("horovodrun.sh")), *training], request.variables())
