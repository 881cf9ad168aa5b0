"""launch/slurm.sbatch on a real SLURM of one node, where its programs are installed.

Debian: apt-get install slurmctld slurmd slurm-client munge libpmix-dev; as root.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from commands import HANG_GUARD, records_of

from hvd_lars.launchers.local import launcher_environment

SCRIPT = Path(__file__).parents[2] / "launch/slurm.sbatch"

pytestmark = pytest.mark.part("SLURM")

CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={port2}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def running():
    """Names of all processes; psutil leaves out those that end meanwhile."""
    return {process.info["name"] for process in psutil.process_iter(["name"])}


@pytest.fixture
def slurm():
    """The environment of commands of a SLURM that runs, and is ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hvd_lars-slurm-"))  # a socket's path must be short
    folder.chmod(0o755)
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    port, port2 = free_ports(2)
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=socket.gethostname(), folder=folder, port=port, port2=port2, cores=os.cpu_count()
        )
    )
    environment = launcher_environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
    environment |= {"OMP_NUM_THREADS": "1"}
    munged = ["munged", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"]
    munged += [f"--seed-file={folder}/seed"]
    for command in (munged, ["slurmctld", "-L", f"{folder}/ctld.log"], ["slurmd", "-L",
                    f"{folder}/d.log"]):  # fmt: skip
        subprocess.run(command, env=environment, check=True, capture_output=True)
    yield environment
    subprocess.run(["scancel", "-u", "root"], env=environment, check=False)
    time.sleep(2)
    daemons = [
        psutil.Process(int((folder / f"{name}.pid").read_text()))
        for name in ("slurmd", "slurmctld", "munged")
    ]
    for daemon in daemons:
        daemon.send_signal(signal.SIGTERM)
        if psutil.wait_procs([daemon], timeout=30)[1]:
            daemon.kill()
    shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition, what):
    deadline = time.monotonic() + HANG_GUARD
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def test_a_job_is_preempted_requeued_and_goes_on(slurm, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"

    def text():
        return log.read_text() if log.exists() else ""

    def slurm_says(*command):
        return subprocess.run(
            command, env=slurm, capture_output=True, text=True, check=True
        ).stdout  # fmt: skip

    options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = slurm_says(
        "sbatch", "--parsable", *options, "--time=20", f"--output={log}", str(SCRIPT), "digits",
        f"run.dir={run}", "train.duration=100000 steps", "train.eval_every=100000 steps",
        "checkpoint.every=100000 steps",
    ).strip()  # fmt: skip
    wait_until(lambda: " 30/100000 " in text(), text)
    slurm_says("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: "Requeue=1 Restarts=1" in slurm_says("scontrol", "show", "job", job), text)
    assert "stopped by SIGUSR1 after step" in text()
    # SLURM waits two minutes before it starts a requeued job; what the old step holds must be free.
    wait_until(lambda: "slurmstepd" not in running(), text)
    slurm_says("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: "resuming after step" in text(), text)
    stopped, resumed = [e["step"] for e in records_of(run, "event") if e["event"] != "start"][-2:]
    (run / "STOP").touch()
    wait_until(lambda: "stopped by STOP file" in text(), text)
    wait_until(lambda: "JobState=COMPLETED" in slurm_says("scontrol", "show", "job", job), text)
    found = [(e["event"], e["step"]) for e in records_of(run, "event")]
    assert [name for name, _ in found if name in ("start", "resume", "stop")] == [
        "start", "stop", "resume", "stop",
    ]  # fmt: skip
    assert stopped > 0
    assert resumed == max(step for name, step in found if name == "resume")
