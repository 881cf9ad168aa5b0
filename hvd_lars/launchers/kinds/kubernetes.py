"""Ranks by Kubernetes' MPI operator."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from hvd_lars.errors import UserError
from hvd_lars.launchers.start import Request, Start, script


def start(request: Request) -> Start:
    """Return the creation of an MPIJob from launch/mpijob.yaml."""
    request.refuse_hosts("whose operator chooses the hosts")
    training = request.with_run_folder("/runs").training
    return Start(["kubectl", "apply", "-f", "-"], {}, _mpijob(training, request.ranks))


def _mpijob(training: Sequence[str], ranks: int | None) -> str:
    """Return launch/mpijob.yaml for this training, with as many workers as the ranks need."""
    job = yaml.safe_load(script("mpijob.yaml").read_text(encoding="utf-8"))
    slots, replicas = job["spec"]["slotsPerWorker"], job["spec"]["mpiReplicaSpecs"]
    if ranks is not None:
        if ranks % slots and ranks > slots:
            raise UserError(f"-np: found {ranks}; allowed: up to {slots}, or a multiple of {slots}")
        job["spec"]["slotsPerWorker"] = min(slots, ranks)
        replicas["Worker"]["replicas"] = max(1, ranks // slots)
        [worker] = replicas["Worker"]["template"]["spec"]["containers"]
        worker["resources"]["limits"]["nvidia.com/gpu"] = min(slots, ranks)
    ranks = job["spec"]["slotsPerWorker"] * replicas["Worker"]["replicas"]
    [launcher] = replicas["Launcher"]["template"]["spec"]["containers"]
    resume = [] if "--resume" in training else ["--resume"]
    launcher["args"], launcher["env"] = [*training, *resume], [{"name": "NP", "value": str(ranks)}]
    return yaml.safe_dump(job, sort_keys=False)
