"""The command as a user starts it, and what a run wrote."""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import warm

from hvd_lars.launchers.local import launcher_environment, local_command

HANG_GUARD = 1800


def warm_python(*arguments):
    """Return a command that does as this Python, without importing torch anew."""
    if not warm.Server.all:
        warm.Server(launcher_environment())
    return warm.python(warm.Server.all[0], *arguments)


def hvd_lars(*arguments, cwd=None):
    """Run the command alone; returns (exit code, output)."""
    result = subprocess.run(
        warm_python("-m", "hvd_lars", *arguments),
        env=launcher_environment(),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_GUARD,
        check=False,
    )
    return result.returncode, result.stdout


def made_once(tmp_path_factory, name, make):
    """A folder that ``make`` fills, once for all processes that run tests."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / f"shared-{name}"
    with (root / f"shared-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draft = root / f"shared-{name}.draft"
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            make(draft)
            draft.rename(folder)
    return folder


def records_of(folder, kind):
    # Without a line that is being written.
    lines = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


started = []  # what a test that fails has to leave to others to end


def start_command(command):
    process = subprocess.Popen(
        command,
        env=launcher_environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started.append(process)
    return process


def start(launcher, ranks, arguments):
    program = warm_python("-m", "hvd_lars", *arguments)
    return start_command(local_command(launcher, ranks, program) if launcher else program)


def wait_for_step(process, folder, step, checkpoint=None):
    """Until the run tells of ``step``, and ``checkpoint`` stands, which is written beside."""
    deadline = time.monotonic() + HANG_GUARD
    while time.monotonic() < deadline and process.poll() is None:
        try:
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            if last["step"] >= step and (
                checkpoint is None or (folder / f"checkpoints/step-{checkpoint:08d}").is_dir()
            ):
                return
        except (OSError, ValueError, IndexError):
            pass
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came: {process.communicate()[0]}")


def kill_everything(process):
    """SIGKILL to the launcher and every rank at once."""
    victims = [*family_of(process), process]
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.communicate(timeout=HANG_GUARD)
    for victim in victims:  # Open MPI's: a later launcher with the same pid would trip over it
        shutil.rmtree(Path(tempfile.gettempdir()) / f"ompi.{victim.pid}", ignore_errors=True)


def rank_of(process):
    """The rank that a launcher gave a process; None for another, or one that is gone."""
    try:
        if "hvd_lars" not in process.cmdline():
            return None
        variables = process.environ()
    except psutil.Error:
        return None
    found = variables.get("HOROVOD_RANK") or variables.get("OMPI_COMM_WORLD_RANK")
    return None if found is None else int(found)


def family_of(process):
    """All processes that a launcher started, and those that they started."""
    children = psutil.Process(process.pid).children(recursive=True)
    forks = [fork for child in children if (fork := warm.fork_of(child)) is not child]
    found = [*children, *forks]
    for fork in forks:
        with suppress(psutil.NoSuchProcess):
            found += fork.children(recursive=True)
    return found


def ranks_under(process):
    """The job's processes by rank, without those that a rank started."""
    family = psutil.Process(process.pid).children(recursive=True)
    found = {}
    for member in family:
        with suppress(psutil.NoSuchProcess):
            rank = rank_of(member)
            if rank is not None and rank_of(member.parent()) is None:
                found[rank] = warm.fork_of(member)
    return found
