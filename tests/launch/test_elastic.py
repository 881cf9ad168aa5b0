"""Workers that are killed, stopped and added while a job under Horovod's elastic driver goes on."""

import signal
import time

import psutil
import pytest
import torch
from commands import (
    HANG_GUARD,
    family_of,
    hvd_lars,
    ranks_under,
    records_of,
    start_command,
    wait_for_step,
    warm_python,
)
from safetensors.torch import load_file

from hvd_lars.launchers.local import find_program

# The rate of a step does not depend on the run's length, which the test does not know.
OPTIONS = [
    "train.duration=100000 steps", "schedule.policy=multistep", "schedule.base_lr=0.1",
    "schedule.milestones=['20 steps', '40 steps', '60 steps']", "schedule.factor=0.8",
    "schedule.warmup_duration=10 steps", "train.log_every=1 steps",
    "train.eval_every=100000 steps", "checkpoint.every=100000 steps", "train.global_batch=128",
]  # fmt: skip
COMMIT = 20


class Job:
    """An elastic job whose every worker has a "host" of its own, an alias of this machine."""

    def __init__(self, folder, *options, names=("localhost", "127.0.0.1")):
        self.run, self.hosts = folder / "run", folder / "hosts"
        self.set_hosts(*names)
        discover = folder / "discover.sh"
        discover.write_text(f"#!/bin/sh\ncat {self.hosts}\n")
        discover.chmod(0o755)
        command = [find_program("horovodrun"), "--gloo", "--network-interfaces", "lo"]
        command += [
            "-np",
            str(len(names)),
            "--min-np",
            "1",
            "--max-np",
            "3",
            "--gloo-timeout-seconds",
            "10",
        ]
        command += ["--blacklist-cooldown-range", "1", "3"]
        command += ["--host-discovery-script", str(discover)]
        command += warm_python("-m", "hvd_lars", "train", "digits", f"run.dir={self.run}")
        command += [*OPTIONS, f"checkpoint.commit_every={COMMIT}", *options]
        self.process = start_command(command)

    def set_hosts(self, *names):
        self.hosts.write_text("".join(f"{name}:1\n" for name in names))

    def sizes(self):
        """World size of every attempt so far, and the step that it began after."""
        events = records_of(self.run, "event") if (self.run / "metrics.jsonl").exists() else []
        return [(e["world_size"], e["step"]) for e in events if e["event"] in ("start", "resume")]

    def wait_for_attempt(self, number, size):
        """Until at least so many attempts began, the last of them with ``size`` workers.

        A lost worker may be back so soon that the others never went on without it.
        """
        deadline = time.monotonic() + HANG_GUARD
        while time.monotonic() < deadline and self.process.poll() is None:
            found = self.sizes()
            if len(found) >= number and found[-1][0] == size:
                wait_for_step(self.process, self.run, found[-1][1] + 2)
                return found[-1][1]
            time.sleep(0.05)
        raise AssertionError(f"attempt {number} never came: {self.process.communicate()[0]}")

    def last_step(self):
        return records_of(self.run, "train")[-1]["step"]

    def stop(self):
        family = family_of(self.process)
        (self.run / "STOP").touch()
        output, _ = self.process.communicate(timeout=HANG_GUARD)
        assert self.process.returncode == 0, output
        assert psutil.wait_procs(family, timeout=60)[1] == [], output
        return output


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_workers_are_lost_and_join_and_the_run_is_what_it_would_have_been(tmp_path, placement):
    job = Job(tmp_path, f"optimizer.placement={placement}")
    wait_for_step(job.process, job.run, COMMIT + 5)
    before = job.last_step()
    victim = sorted(ranks_under(job.process).items())[placement == "sharded"][1]
    victim.send_signal(signal.SIGKILL)
    went_on = job.wait_for_attempt(2, 2)  # the driver starts another in its place
    assert went_on % COMMIT == 0
    assert went_on > before - COMMIT
    job.set_hosts("localhost", "127.0.0.1", "127.1")
    joined_at = job.last_step()
    assert job.wait_for_attempt(3, 3) >= joined_at - COMMIT
    output = job.stop()
    assert [size for size, _ in job.sizes()] in ([2, 1, 2, 3], [2, 2, 3])
    steps = job.last_step()
    assert [r["step"] for r in records_of(job.run, "train")] == list(range(1, steps + 1)), output

    # One process, undisturbed, to the same step.
    alone = tmp_path / "alone"
    code, output = hvd_lars(
        "train", "digits", f"run.dir={alone}", *OPTIONS, f"train.duration={steps} steps"
    )
    assert code == 0, output
    rates = [[r["lr"] for r in records_of(folder, "train")] for folder in (alone, job.run)]
    assert rates[0] == rates[1]
    found, wanted = (
        load_file(folder / f"checkpoints/step-{steps:08d}/state.safetensors")
        for folder in (job.run, alone)
    )
    assert found.keys() == wanted.keys()
    both = [torch.cat([t.flatten() for t in s.values()]) for s in (found, wanted)]
    assert (both[0] - both[1]).norm() < 1e-3 * both[1].norm()


def test_a_worker_alone_is_joined_by_one_that_is_stopped_killed_and_replaced(tmp_path):
    job = Job(tmp_path, names=("localhost",))
    wait_for_step(job.process, job.run, COMMIT + 5)
    job.set_hosts("localhost", "127.0.0.1")
    job.wait_for_attempt(2, 2)
    ranks_under(job.process)[1].send_signal(signal.SIGSTOP)
    job.wait_for_attempt(3, 2)
    output = job.stop()
    assert "stopped (SIGSTOP) while the others had to leave:" in output
    assert "rank 1 (host " in output
    assert "killed, for others to take over" in output
