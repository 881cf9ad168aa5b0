"""launch/supervise: jobs that fail are started again from their checkpoints, under any launcher."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from commands import (
    HANG_GUARD,
    family_of,
    ranks_under,
    records_of,
    start_command,
    wait_for_step,
    warm_python,
)

from hvd_lars.launchers.local import local_command

SUPERVISE = str(Path(__file__).parents[2] / "launch/supervise")
ENDLESS = ["train.duration=100000 steps"]


def training():
    options = ["train.log_every=1 steps", "train.eval_every=100000 steps"]
    return warm_python(
        "-m", "hvd_lars", "train", "digits", "--resume", *options, "checkpoint.every=10 steps"
    )


def supervise(options, command):
    return start_command([sys.executable, SUPERVISE, "--backoff", "0.2", *options, "--", *command])


def end_of(process, code):
    family = family_of(process)
    output, _ = process.communicate(timeout=HANG_GUARD)
    assert process.returncode == code, output
    assert psutil.wait_procs(family, timeout=10)[1] == [], output
    return output


def under(launcher, ranks="2"):
    """The launcher's command for {np} ranks."""
    command = local_command(launcher, 7, training())
    return [ranks if part == "7" else part for part in command]


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun --gloo"])
def test_a_killed_job_goes_on_until_it_is_done(tmp_path, launcher):
    run = tmp_path / "run"
    command = [*under(launcher), f"run.dir={run}", "train.duration=60 steps"]
    process = supervise([], command)
    wait_for_step(process, run, 15, checkpoint=10)
    for victim in ranks_under(process).values():
        victim.kill()
    output = end_of(process, 0)
    assert "newest checkpoint: step " in output
    assert "failure 1 of 5 in a row; on in 0.2 s" in output
    steps = [record["step"] for record in records_of(run, "train")]
    assert steps == list(range(1, 61))
    resumed = [e["step"] for e in records_of(run, "event") if e["event"] == "resume"]
    assert len(resumed) == 1
    assert resumed[0] % 10 == 0


@pytest.mark.parametrize(
    ("launcher", "number"),
    [("mpirun", signal.SIGTERM), ("horovodrun --gloo", signal.SIGUSR1), ("", signal.SIGINT)],
)
def test_a_signal_becomes_a_checkpoint_and_code_75_under_every_launcher(tmp_path, launcher, number):
    run = tmp_path / "run"
    command = under(launcher) if launcher else training()
    process = supervise([], [*command, *ENDLESS, f"run.dir={run}"])
    wait_for_step(process, run, 3)
    process.send_signal(number)
    output = end_of(process, 75)
    assert f"{number.name}: asking the ranks to keep a checkpoint and stop" in output
    stop = records_of(run, "event")[-1]
    assert stop["reason"] == "STOP file that says requeue"
    assert (run / f"checkpoints/step-{stop['step']:08d}/manifest.json").is_file()


def test_lost_hosts_are_left_out_and_those_that_come_back_taken(tmp_path):
    run, hosts, discover = tmp_path / "run", tmp_path / "hosts", tmp_path / "discover"
    hosts.write_text("localhost:2\n")
    discover.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discover.chmod(0o755)
    options = ["--host-discovery-script", str(discover)]
    process = supervise(options, [*under("mpirun", "{np}"), *ENDLESS, f"run.dir={run}"])
    sizes = []
    for number, (text, size) in enumerate([("localhost:1", 2), ("localhost:3", 1), ("", 3)]):
        while len(sizes) <= number:
            wait_for_step(process, run, 1)
            events = records_of(run, "event")
            sizes = [e["world_size"] for e in events if e["event"] in ("start", "resume")]
        assert sizes[-1] == size
        wait_for_step(process, run, records_of(run, "event")[-1]["step"] + 2)
        hosts.write_text(text or "localhost:1")
        if text:
            # One rank alone has no launcher's variables, but it is the launcher's child, too.
            for victim in ranks_under(process).values():
                victim.kill()
    (run / "STOP").touch()
    end_of(process, 0)


def test_it_gives_up_after_attempts_without_progress(tmp_path):
    broken = [sys.executable, "-c", "raise SystemExit(3)", "run.dir=/no/such", "--resume"]
    output = end_of(supervise(["--attempts", "3"], broken), 1)
    assert "ended with code 3; given up after 3 attempts without a new checkpoint" in output
    assert [line.rpartition("on in ")[2] for line in output.splitlines() if "on in" in line] == [
        "0.2 s",
        "0.4 s",
    ]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("localhost slots=2", "localhost:2"),
        ("localhost\t slots=2 max_slots=4  # of one line", "localhost:2"),
        ("localhost:2", "localhost:2"),
        ("localhost", "localhost:1"),
    ],
)
def test_hosts_are_read_as_mpirun_writes_them(tmp_path, line, found):
    (tmp_path / "hosts").write_text(f"# ours\n\n{line}\n")
    command = ["echo", "on", "{hosts}", f"run.dir={tmp_path}", "--resume"]
    assert f"on {found} run.dir" in end_of(
        supervise(["--hostfile", str(tmp_path / "hosts")], command), 0
    )


@pytest.mark.parametrize("line", ["a b", "a:x", "a slots=x", ":2"])
def test_a_host_that_is_none_is_named(tmp_path, line):
    (tmp_path / "hosts").write_text(line + "\n")
    command = ["echo", "{hosts}", f"run.dir={tmp_path}", "--resume"]
    output = end_of(supervise(["--hostfile", str(tmp_path / "hosts")], command), 2)
    assert f"hosts: found {line!r}; a host is NAME, NAME:SLOTS or NAME slots=N" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--hostfile", "/no"], "--hostfile: /no:"), (["--host-discovery-script", "/no"], "/no: ")],
)
def test_hosts_that_nobody_can_name_now_may_be_named_later(tmp_path, options, message):
    command = ["{np}", f"run.dir={tmp_path}", "--resume"]
    output = end_of(supervise([*options, "--attempts", "2"], command), 1)
    assert output.count(message) == 2
    assert "fewer than 1 slots; given up after 2 attempts" in output


@pytest.mark.parametrize(("text", "code"), [("", 0), ("requeue", 75)])
def test_a_stop_file_between_two_attempts_is_heard(tmp_path, text, code):
    broken = [sys.executable, "-c", "raise SystemExit(3)", f"run.dir={tmp_path}", "--resume"]
    process = supervise(["--backoff", "100"], broken)
    while "on in 100 s" not in process.stdout.readline():
        pass
    (tmp_path / "STOP").write_text(text)
    assert "STOP file between two attempts" in end_of(process, code)


def test_a_mistake_in_the_config_is_not_tried_again(tmp_path):
    output = end_of(
        supervise([], [*training(), f"run.dir={tmp_path / 'run'}", "train.nothing=1"]), 2
    )
    assert "unknown key" in output
    assert "attempts" not in output


def test_a_job_that_records_nothing_is_ended_with_all_its_processes(tmp_path):
    asleep = [
        sys.executable, "-c",
        "import subprocess, sys, time;"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True); time.sleep(600)",
        f"run.dir={tmp_path}", "--resume",
    ]  # fmt: skip
    output = end_of(supervise(["--stall", "1", "--attempts", "1"], asleep), 1)
    assert "nothing was recorded for 1 s (--stall): ended; given up after 1 attempts" in output


@pytest.mark.parametrize(
    ("options", "command", "message"),
    [
        ([], ["true"], "COMMAND must name run.dir=DIR and --resume"),
        ([], ["/no/such/program", "run.dir=x", "--resume"], "cannot be started"),
        (["--hosts", "a:x"], ["{np}", "run.dir=x", "--resume"], "--hosts: found 'a:x'; a host is"),
        (
            [],
            ["{np}", "run.dir=x", "--resume"],
            "COMMAND uses {np} or {hosts}, but no hosts are given",
        ),
        (["--attempts", "0"], ["true", "run.dir=x", "--resume"], "--attempts: found 0; must be 1"),
    ],
)
def test_mistakes_are_one_line(options, command, message):
    output = end_of(supervise(options, command), 2)
    assert message in output
    assert "Traceback" not in output


def test_nothing_goes_through_a_shell(tmp_path):
    """Values of a config reach the launcher as they are."""
    trap = tmp_path / "trap"
    value = f"run.name={{$(touch {trap})}}; touch {trap} #"
    echo = [sys.executable, "-c", "import sys; print(sys.argv)", value, "run.dir=x", "--resume"]
    output = end_of(supervise([], echo), 0)
    assert value in output
    assert not os.path.lexists(trap)
