"""launch/*.sh: what they would run, and how they pass signals and codes on."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import HANG_GUARD, records_of, wait_for_step

from hvd_lars.launchers.local import launcher_environment

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(
    [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", LAUNCH.parent / "tests/openmpi4.sh"]
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert len(script.read_text().splitlines()) < 70


def program(folder, name, text):
    """A stand-in for a program of a machine that is not here."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


VERSIONS = {
    "open mpi 4": "mpirun (Open MPI) 4.1.4",
    "open mpi 5": "mpirun (Open MPI) 5.0.11",
    "mpich": "HYDRA build details:\n    Version: 4.3.2",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.13",
}
ROOT = ["--allow-run-as-root"] if os.geteuid() == 0 else []
PASSED_ON = ["-x", "HOROVOD_CYCLE_TIME", "-x", "PATH"]
OPEN_MPI = ["-np", "6", "-H", "a:3,b:3", "--bind-to", "none", "--map-by", "slot"]
ETHERNET = ["-mca", "btl_tcp_if_include", "eth0", "-x", "NCCL_SOCKET_IFNAME=eth0"]
HYDRA = ["-np", "6", "-ppn", "3", "-hosts", "a,b", "-iface", "eth0"]
HYDRA += ["-genv", "NCCL_SOCKET_IFNAME", "eth0"]
EXPECTED = {
    "open mpi 4": [
        *OPEN_MPI, "-mca", "pml", "ob1", "-mca", "btl", "^openib", *ETHERNET, *ROOT, *PASSED_ON,
    ],
    "open mpi 5": [*OPEN_MPI, *ETHERNET, *ROOT, *PASSED_ON],
    "mpich": [*HYDRA, "-bind-to", "none"],
    "intel": [*HYDRA, "-genv", "I_MPI_PIN", "off"],
}  # fmt: skip


def printed(script, *arguments, **variables):
    """What a script prints that it would run, as a shell reads it."""
    found = subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env=variables | {"PRINT": "1", "NIC": "eth0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return shlex.split(found.stdout)


@pytest.mark.parametrize("kind", VERSIONS)
def test_mpirun_sh_tells_the_implementations_apart(tmp_path, kind):
    program(tmp_path, "mpirun", f"echo '{VERSIONS[kind]}'")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOSTS": "a:3,b:3"}
    environment |= {"HOROVOD_CYCLE_TIME": "1", "SECRET_TOKEN": "x"}
    found = printed("mpirun.sh", "c.yaml", "run.name=two words", **environment)
    train = ["hvd-lars", "train", "c.yaml", "run.name=two words"]
    assert found == ["mpirun", *EXPECTED[kind], *train]


@pytest.mark.parametrize("kind", ["open mpi 4", "open mpi 5"])
def test_mpirun_sh_takes_the_hosts_of_the_mpi_operator(tmp_path, kind):
    program(tmp_path, "mpirun", f"echo '{VERSIONS[kind]}'")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NP": "8"}
    environment |= {"OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile"}
    found = printed("mpirun.sh", "c.yaml", **environment)
    assert found[:5] == ["mpirun", "-np", "8", "--hostfile", "/etc/mpi/hostfile"]


def test_horovodrun_sh_prints_its_command():
    found = printed("horovodrun.sh", "c.yaml", "run.dir=r", HOSTS="a:4,b:2", PATH="/usr/bin:/bin")
    assert found == [
        str(LAUNCH / "supervise"), "--hosts", "a:4,b:2", "--",
        "horovodrun", "-np", "{np}", "-H", "{hosts}", "--network-interfaces", "eth0",
        "hvd-lars", "train", "c.yaml", "run.dir=r", "--resume",
    ]  # fmt: skip


def test_horovodrun_sh_takes_the_hosts_of_an_allocation(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("b\na\nb\na\n")
    program(tmp_path, "scontrol", '[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"')
    pbs = {"PBS_NODEFILE": str(nodes)}
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "4"}
    for variables, hosts in ((pbs, "a:2,b:2"), (slurm, "n1:4,n2:4"), ({}, "localhost:2")):
        path = f"{tmp_path}:/usr/bin:/bin"
        found = printed("horovodrun.sh", "c.yaml", "run.dir=r", PATH=path, **variables)
        assert found[1:3] == ["--hosts", hosts]


@pytest.mark.parametrize("script", ["slurm.sbatch", "pbs.sh", "lsf.sh"])
@pytest.mark.parametrize("own", [True, False])
def test_schedulers_scripts_take_the_configs_run_folder(tmp_path, script, own):
    """Else each job has a folder of its own."""
    base = Path(__file__).parents[2] / "configs/digits.yaml"
    ours = f"extends: {base}\nrun: {{dir: {'runs/mine' if own else 'null'}}}\n"
    (tmp_path / "my.yaml").write_text(ours)
    for name in ("srun", "jsrun", "mpirun"):
        program(tmp_path, name, f'echo "{name} $*"')
    config = str(tmp_path / "my.yaml")
    (tmp_path / "nodes").write_text("a\n")
    variables = {"CONFIG": config, "OPTIONS": "run.seed=3", "PBS_NODEFILE": str(tmp_path / "nodes")}
    variables |= {f"{name}_JOBID": "7" for name in ("PBS", "LSB")} | {"SLURM_JOB_ID": "7"}
    variables |= {"PBS_O_WORKDIR": str(LAUNCH.parent), "PRINT": "1", "LSB_MCPU_HOSTS": "a 42"}
    slurm = script == "slurm.sbatch"
    given = ["--resume-from", "runs/a", config, "--quiet", "run.seed=3"] if slurm else []
    found = subprocess.run(
        ["bash", LAUNCH / script, *given],
        env=launcher_environment()
        | {"PATH": f"{tmp_path}:{launcher_environment()['PATH']}"}
        | variables,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    folder = "runs/mine" if own else f"runs/{script[: script.index('.')]}-7"
    words = ["--resume-from", "runs/a", config, "--quiet"] if slurm else [config]
    hours = " run.max_hours=23.8" if script == "pbs.sh" else ""
    wanted = f"train {' '.join(words)} run.seed=3 run.dir={folder}{hours} --resume"
    assert wanted in found.stdout, found.stderr
    assert found.returncode == 0


@pytest.mark.parametrize(
    ("code", "before", "after", "requeued"),
    [
        (1, "SIGUSR1", None, False),  # the stop was an earlier job's: this one failed at its start
        (2, "SIGUSR1", None, False),
        (143, "SIGUSR1", "SIGTERM", True),
        (143, None, "STOP file that says requeue", True),
        (143, None, "STOP file", False),
        (75, None, None, True),
        (0, None, "finished", False),
    ],
)
def test_a_job_is_requeued_if_it_stopped_on_request(tmp_path, code, before, after, requeued):
    run = tmp_path / "run"
    run.mkdir()

    def line(reason, second):
        event = {"kind": "event", "step": 3, "event": "stop", "reason": reason}
        return json.dumps(event | {"unix_seconds": second}) + "\n"

    (run / "metrics.jsonl").write_text("" if before is None else line(before, 1))
    (tmp_path / "more").write_text("" if after is None else line(after, 2))
    program(tmp_path, "srun", f'cat "{tmp_path}/more" >>"{run}/metrics.jsonl"; exit {code}')
    program(tmp_path, "scontrol", f'echo "$*" >"{tmp_path}/asked"')
    found = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "digits", f"run.dir={run}"],
        env=launcher_environment()
        | {"PATH": f"{tmp_path}:{launcher_environment()['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if requeued else "")
    assert found.returncode == (0 if requeued else code), found.stderr


def test_pbs_sh_keeps_the_configs_hours(tmp_path):
    program(tmp_path, "mpirun", 'echo "mpirun $*"')
    (tmp_path / "nodes").write_text("a\n")
    variables = {"CONFIG": "digits", "OPTIONS": "run.max_hours=5", "PBS_JOBID": "7", "PRINT": "1"}
    variables |= {"PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_O_WORKDIR": str(LAUNCH.parent)}
    for hours, wanted in (("", "5.0"), ("2", "2")):
        found = subprocess.run(
            ["bash", LAUNCH / "pbs.sh"],
            env=launcher_environment()
            | {"PATH": f"{tmp_path}:{launcher_environment()['PATH']}", "HOURS": hours}
            | variables,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert f" run.max_hours={wanted} --resume" in found.stdout, found.stderr


@pytest.mark.parametrize("name", ["mpirun.sh", "horovodrun.sh"])
def test_scripts_say_how_they_are_used(name):
    found = subprocess.run(["bash", LAUNCH / name], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "CONFIG" in found.stderr
    assert "set -euo" not in found.stderr


@pytest.mark.parametrize(("script", "name", "code"), [("slurm.sbatch", "srun", 0),
                                                      ("lsf.sh", "jsrun", 75)])  # fmt: skip
def test_a_request_that_ranks_at_their_start_die_of_is_one_too(tmp_path, script, name, code):
    program(tmp_path, name, f'touch "{tmp_path}/started"; exec sleep 600')
    program(tmp_path, "scontrol", 'echo "scontrol $*"')
    variables = {"CONFIG": "digits", "RUN": str(tmp_path / "run"), "LSB_JOBID": "7"}
    variables |= {"SLURM_JOB_ID": "7", "LSB_MCPU_HOSTS": "a 42"}
    process = subprocess.Popen(
        ["bash", LAUNCH / script, *(["digits"] if script == "slurm.sbatch" else [])],
        env=launcher_environment()
        | {"PATH": f"{tmp_path}:{launcher_environment()['PATH']}"}
        | variables,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=HANG_GUARD)
    assert process.returncode == code
    assert ("scontrol requeue 7" in output) == (script == "slurm.sbatch")


def test_pbs_sh_finds_the_programs_of_where_qsub_ran(tmp_path):
    (tmp_path / "nodes").write_text("a\n")
    variables = {"PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_JOBID": "7", "CONFIG": "digits"}
    variables |= {"PBS_O_WORKDIR": str(LAUNCH.parent), "PRINT": "1", "PATH": "/usr/bin:/bin"}
    variables |= {"HOME": str(tmp_path), "PBS_O_PATH": launcher_environment()["PATH"]}
    found = subprocess.run(
        ["bash", LAUNCH / "pbs.sh"], env=variables, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "train digits" in found.stdout


# A run that lasts; values with blanks do not go through a scheduler's variables.
LONG = "train.duration=10000epochs train.log_every=1steps train.eval_every=10000epochs"


def start(script, tmp_path, **environment):
    """Train under a script of a scheduler; its own programs are stand-ins around mpirun."""
    return subprocess.Popen(
        ["bash", LAUNCH / script],
        env=launcher_environment()
        | {"PATH": f"{tmp_path}:{launcher_environment()['PATH']}", "OMP_NUM_THREADS": "1"}
        | {"CONFIG": "digits", "RUN": str(tmp_path / "run"), "OPTIONS": LONG, **environment},
        cwd=LAUNCH.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def stopped(process, run, code):
    wait_for_step(process, run, 3)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=HANG_GUARD)
    assert process.returncode == code, output
    assert psutil.wait_procs(family, timeout=10)[1] == [], output
    assert records_of(run, "event")[-1]["reason"] == "SIGUSR1"
    return output


# mpirun with more ranks than cores, as the schedulers' own would be on a machine of this size.
CROWDED = """\
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
exec {real} "$@"
"""
JSRUN = """\
while [ "$1" != hvd-lars ]; do [ "$1" != -n ] || n=$2; shift; done
NP=$n exec bash {launch}/mpirun.sh "${{@:3}}"
"""


@pytest.fixture
def crowded_mpirun(tmp_path):
    real = shutil.which("mpirun", path=launcher_environment()["PATH"])
    program(tmp_path, "mpirun", CROWDED.format(real=real))


@pytest.mark.usefixtures("crowded_mpirun")
def test_pbs_sh_keeps_a_checkpoint_and_submits_itself_again(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("localhost\nlocalhost\n")
    program(tmp_path, "qsub", 'echo "qsub $*: $CONFIG $RUN $HOURS"')
    variables = {"PBS_NODEFILE": str(nodes), "PBS_JOBID": "7.server", "HOURS": "2"}
    variables["QSUB"] = "-q gpu"
    process = start("pbs.sh", tmp_path, PBS_O_WORKDIR=str(LAUNCH.parent), **variables)
    output = stopped(process, tmp_path / "run", 0)
    assert "digits: 2 ranks on horovod" in output
    names = "CONFIG,SETUP,OPTIONS,HOURS,RUN,QSUB,SCRIPTS"
    submitted = f"qsub -q gpu -v {names} launch/pbs.sh: digits {tmp_path}/run 2"
    assert submitted in output


@pytest.mark.usefixtures("crowded_mpirun")
def test_lsf_sh_keeps_a_checkpoint_and_ends_with_the_code_that_requeues(tmp_path):
    program(tmp_path, "jsrun", JSRUN.format(launch=LAUNCH))
    variables = {"LSB_MCPU_HOSTS": "batch1 1 node1 42 node2 42", "LSB_JOBID": "7"}
    process = start("lsf.sh", tmp_path, GPUS_PER_NODE="1", **variables)
    output = stopped(process, tmp_path / "run", 75)
    assert "digits: 2 ranks on horovod" in output
    assert '#BSUB -Q "75"' in (LAUNCH / "lsf.sh").read_text()
