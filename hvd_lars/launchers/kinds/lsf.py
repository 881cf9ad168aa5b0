"""Ranks by LSF."""

from __future__ import annotations

from hvd_lars.errors import UserError
from hvd_lars.launchers.start import Request, Start, script


def start(request: Request) -> Start:
    """Return the submission of launch/lsf.sh."""
    request.refuse_hosts("as the scheduler chooses it")
    request.refuse_blanks()
    if request.ranks is not None:
        raise UserError(
            "-np: launch/lsf.sh asks for as many ranks as its header says; give bsub's -nnodes "
            "with --print-only, or edit it"
        )
    config, *options = request.without_resume()
    variables = {"CONFIG": config} | ({"OPTIONS": " ".join(options)} if options else {})
    return Start(["bsub"], variables, script("lsf.sh"))
