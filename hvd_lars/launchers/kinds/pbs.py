"""Ranks by PBS."""

from __future__ import annotations

from hvd_lars.launchers.start import Request, Start, script


def start(request: Request) -> Start:
    """Return the submission of launch/pbs.sh."""
    request.refuse_hosts("as the scheduler chooses it")
    request.refuse_blanks()
    config, *options = request.without_resume()
    size = []
    if request.ranks is not None:
        size = ["-l", f"select={request.ranks}:ncpus=8:mpiprocs=1:ngpus=1"]
    variables = {
        "CONFIG": config,
        "OPTIONS": " ".join(options),
        # Used when the script resubmits itself.
        "SCRIPTS": str(script("pbs.sh").parent),
        "QSUB": " ".join(size),
    }
    given = ",".join(f"{name}={value}" for name, value in variables.items() if value)
    return Start(["qsub", *size, "-v", given, str(script("pbs.sh"))])
