"""Ranks by SLURM."""

from __future__ import annotations

import re

from hvd_lars.launchers.start import Request, Start, script


def start(request: Request) -> Start:
    """Return a step of the current allocation, or a new job outside one."""
    request.refuse_hosts("as the scheduler chooses it")
    size = [] if request.ranks is None else [f"--ntasks={request.ranks}"]
    if "SLURM_JOB_ID" in request.environment:
        kind = request.environment.get("MPI_TYPE", "pmix")
        options = [f"--mpi={kind}", "--cpu-bind=none", "--kill-on-bad-exit=1"]
        return Start(["srun", *options, *size, "hvd-lars", "train", *request.training])
    path = script("slurm.sbatch")
    if request.ranks is not None:
        per_node = re.search(r"--ntasks-per-node=(\d+)", path.read_text())
        assert per_node is not None
        size = [f"--nodes={-(-request.ranks // int(per_node.group(1)))}", *size]
    return Start(["sbatch", *size, str(path), *request.without_resume()])
