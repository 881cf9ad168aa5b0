"""Ranks by SLURM."""

from __future__ import annotations

from hvd_lars.launchers.start import Request, Start, script


def start(request: Request) -> Start:
    """Return a step of the current allocation, or a new job outside one."""
    request.refuse_hosts("as the scheduler chooses it")
    size = [] if request.ranks is None else [f"--ntasks={request.ranks}"]
    if "SLURM_JOB_ID" in request.environment:
        kind = request.environment.get("MPI_TYPE", "pmix")
        options = [f"--mpi={kind}", "--cpu-bind=none", "--kill-on-bad-exit=1"]
        return Start(["srun", *options, *size, "hvd-lars", "train", *request.training])
    return Start(["sbatch", *size, str(script("slurm.sbatch")), *request.without_resume()])
