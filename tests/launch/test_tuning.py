"""A study over two ranks that is stopped, killed and resumed."""

import signal
import time

from commands import HANG_GUARD, kill_everything, ranks_under, start, warm_python

from hvd_lars.launchers.local import run_here
from hvd_lars.tuning.study import read_trials

SPACE = "{schedule.base_lr: {log: [4.0, 40.0]}, schedule.poly_power: {choices: [1.0, 2.0]}}"


def tuning(folder):
    return [
        "tune", "digits", f"run.dir={folder}", "train.duration=12 steps",
        "schedule.warmup_duration=2 steps", "train.eval_every=3 steps", "checkpoint.every=2 steps",
        f"tune={{space: {SPACE}, trials: 3, duration: 8 steps, first: 2, reduction: 2}}",
    ]  # fmt: skip


def wait_until(process, found):
    deadline = time.monotonic() + HANG_GUARD
    while not found():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_study_stopped_and_killed_ends_as_one_left_alone(tmp_path):
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    program = warm_python("-m", "hvd_lars", *tuning(alone))
    done = run_here("mpirun", 2, program, timeout=HANG_GUARD)
    assert done.returncode == 0, done.stdout
    wanted = read_trials(alone)
    assert len(wanted) == 3

    process = start("mpirun", 2, tuning(broken))
    checkpoints = broken / "trials/0000/seed-0/checkpoints"
    wait_until(process, lambda: any(checkpoints.glob("step-*")))
    ranks_under(process)[1].send_signal(signal.SIGTERM)
    output = process.communicate(timeout=HANG_GUARD)[0]
    assert process.returncode == 75, output
    assert "stopped by SIGTERM after 0 trials; --resume" in output

    process = start("mpirun", 2, [*tuning(broken), "--resume"])
    folder = broken / "trials/0001/seed-0/metrics.jsonl"
    wait_until(process, lambda: folder.is_file() and b"eval" in folder.read_bytes())
    kill_everything(process)
    done = run_here(
        "mpirun", 2, warm_python("-m", "hvd_lars", *tuning(broken), "--resume"), timeout=HANG_GUARD
    )
    assert done.returncode == 0, done.stdout
    assert read_trials(broken) == wanted
    assert "trial 1 of 3" not in done.stdout
    found = [(folder / "best.yaml").read_text() for folder in (alone, broken)]
    assert found[0] == found[1]
