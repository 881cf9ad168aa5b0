"""The right command for where one is: this machine, hosts, a scheduler's queue.

The commands are those of the scripts in launch/, which work without this package, too.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hvd_lars.errors import UserError
from hvd_lars.launchers.local import launcher_environment, local_command

KINDS = ("local", "horovodrun", "openmpi", "mpich", "slurm", "pbs", "lsf", "kubernetes")
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Start:
    """A command, what it finds in its environment besides, and on its standard input.

    ``stdin`` is a file, or the text itself.
    """

    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    stdin: Path | str | None = None

    def line(self) -> str:
        """As one would type it."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        words += [shlex.quote(word) for word in self.command]
        if isinstance(self.stdin, Path):
            words += ["<", shlex.quote(str(self.stdin))]
        elif self.stdin is not None:
            words += ["<<'EOF'\n" + self.stdin + "EOF"]
        return " ".join(words)


def script(name: str) -> Path:
    """A file of launch/: inside a wheel, or beside the package in a checkout."""
    inside = _PACKAGE / "launch"
    return (inside if inside.is_dir() else _PACKAGE.parent / "launch") / name


def start_of(
    kind: str,
    training: Sequence[str],
    ranks: int | None,
    hosts: str | None,
    nic: str | None,
    environment: Mapping[str, str],
) -> Start:
    """How to start ``hvd-lars train *training``.

    Args:
        kind: one of ``KINDS``.
        training: CONFIG, overrides and options of train.
        ranks: how many; what hosts or allocation have slots for, if None.
        hosts: ``a:4,b:4``; those of the allocation, or this machine, if None.
        nic: interface that all traffic keeps to.
        environment: a scheduler's variables are looked for in it.

    Raises:
        UserError: options and kind do not go together.
    """
    for option, value in (("--hosts", hosts), ("--nic", nic)):
        if kind in ("local", "kubernetes") and value:
            raise UserError(f"{option}: --on {kind} has no use for it")
    variables = {
        name: value
        for name, value in (("HOSTS", hosts), ("NP", ranks and str(ranks)), ("NIC", nic))
        if value
    }
    if kind in ("horovodrun", "kubernetes") and not any(w.startswith("run.dir=") for w in training):
        # What is started again must find its run; that of an earlier start is another.
        root = "/runs" if kind == "kubernetes" else "runs"
        name = f"{Path(training[0]).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        training = [*training, f"run.dir={root}/{name}"]
    if kind == "local":
        return Start(local_command("mpirun", ranks or 2, ["hvd-lars", "train", *training]))
    if kind == "horovodrun":
        if ranks:
            raise UserError("-np: horovodrun takes all slots; say --hosts a:2,b:2")
        return Start(["bash", str(script("horovodrun.sh")), *training], variables)
    if kind in ("openmpi", "mpich"):
        return Start(["bash", str(script("mpirun.sh")), *training], variables)
    if hosts or nic:
        raise UserError(f"--hosts, --nic: --on {kind} leaves both to the scheduler")
    if kind == "slurm":
        return _slurm(training, ranks, environment)
    if kind == "kubernetes":
        return Start(["kubectl", "apply", "-f", "-"], {}, _mpijob(training, ranks))
    config, options = training[0], [word for word in training[1:] if word != "--resume"]
    variables = {"CONFIG": config, "OPTIONS": " ".join(options)}
    if any(" " in word or "," in word for word in training):
        raise UserError(
            f"--on {kind}: a value with a blank or a comma does not get through its variables; "
            f"put it into the config (durations may be written 5epochs)"
        )
    if kind == "pbs":
        size = [] if ranks is None else ["-l", f"select={ranks}:ncpus=8:mpiprocs=1:ngpus=1"]
        # For when the script submits itself again.
        variables |= {"SCRIPTS": str(script("pbs.sh").parent), "QSUB": " ".join(size)}
        given = ",".join(f"{name}={value}" for name, value in variables.items() if value)
        return Start(["qsub", *size, "-v", given, str(script("pbs.sh"))])
    return Start(["bsub"], {k: v for k, v in variables.items() if v}, script("lsf.sh"))


def _slurm(training: Sequence[str], ranks: int | None, environment: Mapping[str, str]) -> Start:
    """A step of the allocation that this is inside of, else a job."""
    size = [] if ranks is None else [f"--ntasks={ranks}"]
    if "SLURM_JOB_ID" in environment:
        kind = environment.get("MPI_TYPE", "pmix")
        options = [f"--mpi={kind}", "--cpu-bind=none", "--kill-on-bad-exit=1"]
        return Start(["srun", *options, *size, "hvd-lars", "train", *training])
    training = [word for word in training if word != "--resume"]  # the script says it
    return Start(["sbatch", *size, str(script("slurm.sbatch")), *training])


def _mpijob(training: Sequence[str], ranks: int | None) -> str:
    """launch/mpijob.yaml for this training, with as many workers as the ranks need."""
    job = yaml.safe_load(script("mpijob.yaml").read_text(encoding="utf-8"))
    slots, replicas = job["spec"]["slotsPerWorker"], job["spec"]["mpiReplicaSpecs"]
    if ranks is not None:
        if ranks % slots and ranks > slots:
            raise UserError(f"-np: found {ranks}; a worker has {slots} slots: a multiple of it")
        job["spec"]["slotsPerWorker"] = min(slots, ranks)
        replicas["Worker"]["replicas"] = max(1, ranks // slots)
        [worker] = replicas["Worker"]["template"]["spec"]["containers"]
        worker["resources"]["limits"]["nvidia.com/gpu"] = min(slots, ranks)
    ranks = job["spec"]["slotsPerWorker"] * replicas["Worker"]["replicas"]
    [launcher] = replicas["Launcher"]["template"]["spec"]["containers"]
    resume = [] if "--resume" in training else ["--resume"]
    launcher["args"], launcher["env"] = [*training, *resume], [{"name": "NP", "value": str(ranks)}]
    return yaml.safe_dump(job, sort_keys=False)


def submit(start: Start, print_only: bool) -> int:
    """Run it, or print it; returns its exit code.

    Raises:
        UserError: the launcher is not on this machine.
    """
    environment = launcher_environment() | start.variables
    if print_only:
        print(_resolved(start, environment))
        return 0
    try:
        if start.stdin is None:
            os.execvpe(start.command[0], start.command, environment)  # signals reach it directly
        text = start.stdin.read_text() if isinstance(start.stdin, Path) else start.stdin
        done = subprocess.run(start.command, env=environment, input=text, text=True, check=False)
        return done.returncode
    except FileNotFoundError:
        raise UserError(f"{start.command[0]}: no such program on this machine") from None


def _resolved(start: Start, environment: Mapping[str, str]) -> str:
    """The line; of a script that only puts a command together, that command."""
    if start.command[0] != "bash":
        return start.line()
    result = subprocess.run(
        start.command,
        env={**environment, "PRINT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise UserError(result.stderr.strip() or f"{start.command[1]} failed")
    return shlex.join(shlex.split(result.stdout))
