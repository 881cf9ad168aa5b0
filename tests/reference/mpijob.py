"""What Kubernetes accepts as an MPIJob, v2beta1.

Fields, types and allowed values are those of kubeflow/mpi-operator: its CRD (``manifests/base``),
its API types (``pkg/apis/kubeflow/v2beta1``: ``launcherCreationPolicy`` of 0.5,
``runLauncherAsWorker`` of 0.6) and what its validation asks beyond the CRD (one launcher, a worker
at least).  Nothing else is allowed, as ``kubectl apply`` asks the server by default.  The pods are
left to Kubernetes' own schemas.
"""

import jsonschema
import kubernetes_validate

KUBERNETES = ("1.27", "1.37")  # where strict answers of the server began, and the newest known


def closed(required=(), **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def number(least, most=2**31 - 1):
    return {"type": "integer", "minimum": least, "maximum": most}


def replica(least, most):
    return closed(
        ["template"],
        replicas=number(least, most),
        restartPolicy={"enum": ["Never", "OnFailure"]},
        template={"type": "object"},
    )


SPEC = closed(
    ["mpiReplicaSpecs"],
    slotsPerWorker=number(1),
    runLauncherAsWorker={"type": "boolean"},
    launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
    sshAuthMountPath={"type": "string", "minLength": 1},
    mpiImplementation={"enum": ["OpenMPI", "Intel", "MPICH"]},
    runPolicy=closed(
        cleanPodPolicy={"enum": ["None", "Running", "All"]},
        ttlSecondsAfterFinished=number(0),
        activeDeadlineSeconds=number(0, 2**63 - 1),
        backoffLimit=number(0),
        suspend={"type": "boolean"},
        managedBy={"type": "string"},
        schedulingPolicy=closed(
            minAvailable=number(0),
            queue={"type": "string"},
            minResources={"type": "object"},
            priorityClass={"type": "string"},
            scheduleTimeoutSeconds=number(0),
        ),
    ),
    mpiReplicaSpecs=closed(["Launcher"], Launcher=replica(1, 1), Worker=replica(1, 2**31 - 1)),
)
MPIJOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "kubeflow.org/v2beta1"},
    kind={"const": "MPIJob"},
    # A DNS label, short enough for "-worker-999" behind it.
    metadata=closed(["name"], name={"pattern": "^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$"}),
    spec=SPEC,
)


def validate(job):
    """Raise jsonschema.ValidationError where Kubernetes would refuse ``job``."""
    jsonschema.validate(job, MPIJOB)
    for role, replicas in job["spec"]["mpiReplicaSpecs"].items():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": role.lower()}}
        for version in KUBERNETES:
            kubernetes_validate.validate(
                pod | {"template": replicas["template"]}, version, strict=True
            )
