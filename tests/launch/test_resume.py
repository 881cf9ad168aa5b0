"""Runs that are killed, stopped, damaged and resumed, as a user would."""

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from commands import (
    HANG_GUARD,
    family_of,
    hvd_lars,
    kill_everything,
    records_of,
    start,
    wait_for_step,
    warm_python,
)
from safetensors.torch import load_file
from test_image_folder import make_folder

from hvd_lars.launchers.local import launcher_environment, local_command, run_here

STEPS = [
    "train.duration=20 steps", "schedule.warmup_duration=2 steps", "train.log_every=3 steps",
    "train.eval_every=5 steps", "checkpoint.every=7 steps", "checkpoint.keep_last=9",
]  # fmt: skip


def training(folder, *options):
    """The command of a run of 20 steps whose checkpoints stand in the middle of everything."""
    return ["train", "digits", f"run.dir={folder}", *STEPS, *options]


def what_was_measured(folder):
    """Records without clock times, and without events, which tell of the interruption."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if "second" not in key}
        for record in records
        if record["kind"] != "event"
    ]


def state_after(folder, step=20):
    return load_file(folder / f"checkpoints/step-{step:08d}/state.safetensors")


def assert_same_bits(folder, other, evaluations=4):
    assert what_was_measured(folder) == what_was_measured(other)
    assert len(what_was_measured(folder)) == 7 + evaluations
    wanted, found = state_after(folder), state_after(other)
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not wanted[name].equal(found[name])] == []


IMAGES = (
    "data={name: imagefolder, root: FOLDER, image_size: 32, eval_resize: 64, workers: 1, "
    "augment: {mixup: 0.2, trivial_augment: true}}"
)
WINDOWS = ["train.global_batch=6", "train.micro_batch=2", "schedule.base_lr=0.01"]
CASES = {
    "lars": [],
    "sharded, update": ["optimizer.placement=sharded", "optimizer.lr_position=update"],
    "sgd, nesterov, fp16": ["optimizer={name: sgd, nesterov: true}", "schedule.base_lr=0.1",
                            "train.precision=fp16", "train.global_batch=64"],
    "images, windows, normalisation, average": [
        IMAGES.replace("32", "16").replace("workers: 1", "workers: 0"),
        "model={name: resnet18_cifar, ema_decay: 0.9}", *WINDOWS
    ],
    # An evaluation starts processes that load images.
    "dropout": [IMAGES, "model.name=squeezenet1_1", "train.eval_every=10 steps", *WINDOWS],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, case):
    images = make_folder(tmp_path / "images", size=(40, 40))
    options = [text.replace("FOLDER", str(images)) for text in CASES[case]]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    program = warm_python("-m", "hvd_lars", *training(whole, *options))
    result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    process = start("mpirun", 2, training(killed, *options))
    wait_for_step(process, killed, 9, checkpoint=7)
    kill_everything(process)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # a kill may tear the last line
    for path in (killed / "checkpoints").glob("step-*"):
        if path.name != "step-00000007":  # a slow machine's kill may come later
            shutil.rmtree(path)
    program = warm_python("-m", "hvd_lars", *training(killed, *options), "--resume")
    result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    assert "resuming after step 7" in result.stdout
    assert_same_bits(whole, killed, evaluations=2 if case == "dropout" else 4)


def test_other_numbers_of_ranks_take_the_run_over(tmp_path):
    """4, 3 and 2 ranks for a third each see the same samples and end where 1 does."""
    run, gentle = tmp_path / "run", ["schedule.base_lr=0.5"]  # 32 would amplify rounding
    for ranks, kept in ((4, 7), (3, 14), (2, 20)):
        program = warm_python("-m", "hvd_lars", *training(run, *gentle), "--resume")
        result = run_here("mpirun", ranks, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stdout
        for path in (run / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > kept:
                shutil.rmtree(path)
    code, output = hvd_lars(*training(tmp_path / "alone", *gentle))
    assert code == 0, output
    wanted, found = state_after(tmp_path / "alone"), state_after(run)
    names = [name for name in wanted if name.startswith("model/")]
    both = [torch.cat([state[name].flatten() for name in names]) for state in (wanted, found)]
    assert (both[0] - both[1]).norm() < 1e-5 * both[0].norm()
    losses = [[r["loss"] for r in records_of(f, "train")] for f in (tmp_path / "alone", run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


LONG = ["train.duration=100000 steps", "train.eval_every=100000 steps", "train.log_every=1 steps"]


@pytest.mark.parametrize(
    ("launcher", "how", "code"),
    [
        (None, "SIGTERM", 75),
        (None, "SIGINT", 75),
        (None, "SIGHUP", 75),
        ("mpirun", "SIGUSR1", 75),
        ("horovodrun", "SIGUSR1", 75),
        ("mpirun", "STOP file", 0),
        ("mpirun", "run.max_hours", 75),
    ],
)
def test_a_request_to_stop_ends_in_a_checkpoint(tmp_path, launcher, how, code):
    run = tmp_path / "run"
    options = [*LONG, *(["run.max_hours=0.002"] if how == "run.max_hours" else [])]
    process = start(launcher, 2, training(run, *options))
    wait_for_step(process, run, 3)
    if how.startswith("SIG"):
        process.send_signal(getattr(signal, how))
    elif how == "STOP file":
        (run / "STOP").touch()
    output, _ = process.communicate(timeout=HANG_GUARD)
    step = records_of(run, "event")[-1]["step"]
    assert records_of(run, "event")[-1]["reason"] == how, output
    assert (run / f"checkpoints/step-{step:08d}/manifest.json").is_file()
    assert (run / "checkpoints/latest").read_text().strip() == f"step-{step:08d}"
    assert f"stopped by {how} after step {step}" in output
    assert process.returncode == code, output
    # … from which the run goes on, though the request's file is still there.
    again = training(run, *LONG[1:], f"train.duration={step + 2} steps", "--resume")
    result, output = hvd_lars(*again)
    assert result == 0, output
    assert f"resuming after step {step}" in output
    result, output = hvd_lars(*again)
    assert result == 0, output
    assert "nothing is left to do" in output


KEEPING = ["checkpoint.every=2 steps"]  # later on the command line than STEPS


def assert_it_goes_on(run):
    """From a checkpoint of step 2 or later."""
    kept = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????"))
    code, output = hvd_lars(
        *training(run, *LONG[1:], f"train.duration={kept + 2} steps"), "--resume"
    )
    assert code == 0, output
    assert f"resuming after step {kept}" in output
    assert kept >= 2


@pytest.mark.parametrize("launcher", [None, "mpirun", "horovodrun", "horovodrun --gloo"])
def test_the_end_of_a_terminal_ends_in_a_checkpoint(tmp_path, launcher):
    """A terminal hangs up, as when ssh ends; launchers turn that into SIGTERM.

    Open MPI 5 kills its ranks 0.2 s after SIGTERM, so their last checkpoint may be an earlier one.
    """
    run = tmp_path / "run"
    program = warm_python("-m", "hvd_lars", *training(run, *LONG, *KEEPING))
    command = local_command(launcher, 2, program) if launcher else program
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored under nohup
        environment = launcher_environment() | {"OMP_NUM_THREADS": "1"}
        os.execvpe(command[0], command, environment)
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + HANG_GUARD
    log = run / "metrics.jsonl"
    while not log.exists() or not (run / "checkpoints/latest").exists():
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = family_of(psutil.Process(pid))
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert psutil.wait_procs(family, timeout=HANG_GUARD)[1] == []
    if launcher is None:
        assert records_of(run, "event")[-1]["reason"] == "SIGHUP"
        assert os.waitstatus_to_exitcode(status) == 75
    assert_it_goes_on(run)


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_a_launcher_that_is_terminated_leaves_nobody_behind(tmp_path, launcher):
    """Horovod as released ends a shell in between, and leaves mpirun and the ranks running."""
    run = tmp_path / "run"
    process = start(launcher, 2, training(run, *LONG, *KEEPING))
    wait_for_step(process, run, 3, checkpoint=2)
    family = family_of(process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANG_GUARD)
    assert psutil.wait_procs(family, timeout=HANG_GUARD)[1] == []
    assert process.returncode != 0
    assert_it_goes_on(run)


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    code, output = hvd_lars(*training(folder))
    assert code == 0, output
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """A run folder of one's own that holds a finished run."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))


@pytest.mark.parametrize("how", ["truncated", "flipped", "no manifest", "progress", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(finished, how):
    newest = finished / "checkpoints/step-00000020"
    tensors = newest / "state.safetensors"
    if how == "truncated":
        os.truncate(tensors, 1000)
    elif how == "flipped":
        data = bytearray(tensors.read_bytes())
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif how == "no manifest":
        (newest / "manifest.json").unlink()
    elif how == "progress":
        (newest / "progress.json").write_text('{"step": "x"}')
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    code, output = hvd_lars(*training(finished), "--resume")
    assert code == 0, output
    assert "checkpoints/step-00000020" in output and "damaged" in output
    assert "resuming after step 14" in output
    assert what_was_measured(finished)[-1]["step"] == 20


def test_another_run_starts_from_a_checkpoint(finished, tmp_path):
    other = tmp_path / "other"
    source = finished / "checkpoints/step-00000014"
    code, output = hvd_lars(*training(other), "--resume-from", source)
    assert code == 0, output
    assert "resuming after step 14" in output
    wanted, found = state_after(finished), state_after(other)
    assert all(wanted[name].equal(found[name]) for name in wanted)
    assert what_was_measured(other)[0]["step"] == 15
    # A scheduler starts the same command again: the run goes on where it is.
    code, output = hvd_lars(*training(other), "--resume-from", source, "--resume")
    assert code == 0, output
    assert "nothing is left to do" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume: run.dir is not set; add run.dir="),
        (["--resume-from", "/no/such"], "--resume-from: /no/such: no such run folder"),
        (["run.dir=RUN"], "holds a run already; name another folder, or --resume it"),
        (["run.dir=RUN", "--resume", "CONFIG"], "schedule.base_lr: found 3.0, the run has 32.0"),
        (["run.dir=RUN", "--resume", "SEED"], "run.seed: found 7, the run has 0"),
        (["run.dir=RUN", "--resume", "ALL DAMAGED"], "damaged"),
        (["run.dir=RUN", "--resume", "run.seed=7", "ALL DAMAGED"], "damaged"),
        (["run.dir=NEW", "--resume-from", "EMPTY"], "no checkpoint (a folder step-N) in it"),
        (["run.dir=NEW", "--resume-from", "RUN", "ALL DAMAGED"], "damaged"),
        (["run.dir=NEW", "--resume-from", "RUN", "model.name=resnet5"], "model.name: found"),
        (
            ["run.dir=NEW", "--resume-from", "RUN", "model.name=glyphs_alexnet"],
            "glyphs_alexnet does not take the",
        ),
        (["run.dir=NEW", "--resume-from", "RUN", "data.copies=6"], "data: differs from"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(finished, tmp_path, options, message):
    config = "digits"
    if options[-1] in ("CONFIG", "SEED"):
        change = "s/base_lr: .*/base_lr: 3.0/" if options[-1] == "CONFIG" else "s/seed: .*/seed: 7/"
        shown = subprocess.run(
            ["sed", change, finished / "config.yaml"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (tmp_path / "other.yaml").write_text(shown.stdout)
        config, options = str(tmp_path / "other.yaml"), options[:-1]
    elif options[-1] == "ALL DAMAGED":
        for path in (finished / "checkpoints").glob("step-*/manifest.json"):
            path.write_text("{}")
        options = options[:-1]
    (tmp_path / "empty").mkdir()
    for name, path in (("RUN", finished), ("NEW", tmp_path / "new"), ("EMPTY", tmp_path / "empty")):
        options = [text.replace(name, str(path)) for text in options]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, output = hvd_lars("train", config, *STEPS, *options)
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output
    # Nothing is written before everything is checked.
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
