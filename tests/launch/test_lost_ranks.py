"""Ranks that stop taking part end the job, with a line that names them."""

import os
import signal
import subprocess

import psutil
import pytest
from commands import HANG_GUARD, family_of, ranks_under, start, wait_for_step, warm_python
from test_image_folder import make_folder

from hvd_lars.launchers.local import launcher_environment, local_command

LONG = [
    "train.duration=100000 steps", "train.eval_every=100000 steps", "train.log_every=1 steps",
    "checkpoint.every=100000 steps",
]  # fmt: skip


def end_of(process, family):
    """What the job printed, once it has ended and left no process behind."""
    output, _ = process.communicate(timeout=HANG_GUARD)
    assert process.returncode not in (0, 75), output
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], output
    return output


@pytest.mark.parametrize(
    ("launcher", "backend", "killed"),
    [("mpirun", "horovod", 0), ("mpirun", "mpi", 1), ("horovodrun --gloo", "horovod", 1)],
)
def test_a_killed_process_ends_the_job(tmp_path, launcher, backend, killed):
    run = tmp_path / "run"
    process = start(
        launcher, 2, ["train", "digits", f"run.dir={run}", f"comm.backend={backend}", *LONG]
    )
    wait_for_step(process, run, 3)
    family = family_of(process)
    ranks_under(process)[killed].kill()
    end_of(process, family)


@pytest.mark.parametrize(
    ("launcher", "backend", "stopped"),
    [("mpirun", "horovod", 1), ("mpirun", "mpi", 0), ("horovodrun --gloo", "horovod", 1)],
)
def test_a_stopped_process_ends_the_job(tmp_path, launcher, backend, stopped):
    run = tmp_path / "run"
    options = [f"run.dir={run}", f"comm.backend={backend}", "run.rank_timeout=5", *LONG]
    process = start(launcher, 2, ["train", "digits", *options])
    wait_for_step(process, run, 3)
    family = family_of(process)
    victim = ranks_under(process)[stopped]
    victim.send_signal(signal.SIGSTOP)
    output = end_of(process, family)
    assert "no heartbeat for 5 s (run.rank_timeout) from:" in output
    assert f"rank {stopped} (host " in output
    assert f"pid {victim.pid}): " in output
    assert "steps done" in output
    assert "in state T" in output


def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path):
    """A file that never answers, as on a file server that is gone."""
    images, run = make_folder(tmp_path / "images", size=(40, 40)), tmp_path / "run"
    data = f"data={{name: imagefolder, root: {images}, image_size: 32, workers: 0}}"
    options = [data, "model.name=resnet18_cifar", "train.global_batch=4", f"run.dir={run}"]
    options += ["run.stall_timeout=5", "schedule.warmup_duration=2 steps", *LONG]
    process = start("mpirun", 2, ["train", "digits", *options])
    wait_for_step(process, run, 0)
    os.mkfifo(tmp_path / "hangs")
    os.replace(tmp_path / "hangs", sorted((images / "train").glob("*/*"))[0])
    output = end_of(process, family_of(process))
    assert "no rank made progress for 5 s (run.stall_timeout)" in output
    assert output.count("steps done, then in data") == 1  # the other rank waits
    assert "hvd_lars/data/image_folder.py" in output


SUBMITS = """
import os, signal, sys, time, torch
import horovod.torch as hvd
hvd.init()
pids = hvd.allgather(torch.tensor([os.getpid()]), name="pids").tolist()
if hvd.rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    for count in range(10**9):
        hvd.allreduce_async_(torch.ones(10), name=f"tensor {count}", op=hvd.Sum)
        if count % 20 == 0:
            time.sleep(0.0005)
except Exception as error:
    print("ended:", type(error).__name__, flush=True)
    os.kill(pids[1], signal.SIGKILL)
    os._exit(3)
"""


def test_a_rank_that_submits_tensors_while_horovod_gives_up_does_not_hang(tmp_path):
    """Horovod's thread frees them under a lock, for which it takes the GIL of the one that waits.

    It hung every time before launch/horovod_edits.py let the GIL go.
    """
    program = tmp_path / "submits.py"
    program.write_text(SUBMITS)
    command = local_command("horovodrun --gloo", 2, warm_python(str(program)))
    command[2:2] = ["--gloo-timeout-seconds", "5", "--network-interfaces", "lo"]
    done = subprocess.run(
        command, env=launcher_environment(), capture_output=True, text=True, timeout=HANG_GUARD
    )
    assert "ended: HorovodInternalError" in done.stdout, done.stdout + done.stderr
