"""Machines that lack what others have: a user's name, a terminal, memory, a host's name."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from commands import HANG_GUARD, records_of
from test_image_folder import make_folder

from hvd_lars.launchers.local import launcher_environment, local_command, this_python

PYTHON = sys.executable
SHORT = ["train.duration=2 steps", "schedule.warmup_duration=1 steps"]
COMMAND = [PYTHON, "-m", "hvd_lars"]


def shell(script, environment=None, **options):
    """Run a script of the shell with ``hvd-lars`` as a function; its result."""
    options = {"capture_output": True, "text": True, "timeout": HANG_GUARD} | options
    function = f'hvd-lars() {{ {shlex.join(COMMAND)} "$@"; }}\n'
    environment = launcher_environment() if environment is None else environment
    return subprocess.run(["bash", "-c", function + script], env=environment, **options)


def unshared(kind):
    """Skip where this user may not make a namespace."""
    done = subprocess.run(["unshare", f"--{kind}", "true"], capture_output=True)
    if done.returncode:
        pytest.skip(f"no namespace of its own: {done.stderr.decode().strip()}")


def readable(path):
    """Whether any user may run what is there."""
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in (path, *path.parents))


@pytest.fixture
def nobody(tmp_path):
    """The start of a command as a user whom the system does not know, with no home."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root may become another user")
    if not readable(Path(PYTHON).resolve().parent) or not readable(Path(PYTHON).parent):
        pytest.skip("other users may not run this Python")
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(folder.stat().st_mode | 0o005)
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    return [*user, *COMMAND]


def test_a_user_without_a_name_or_home_trains_evaluates_and_checks(nobody, tmp_path):
    """docker run --user, OpenShift: torch asks for the user's name."""
    environment = {"PATH": launcher_environment()["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    model = ["data.name=synthetic", "model.name=resnet18", "train.global_batch=8", *SHORT]
    for arguments in (
        ["check", "digits", *model], ["train", "digits", "run.dir=run", *model], ["eval", "run"]
    ):  # fmt: skip
        done = subprocess.run([*nobody, *arguments], **options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    for arguments, key in (
        (["check", "~/mine.yaml"], "CONFIG: ~/mine.yaml"),
        (["train", "digits", "run.dir=~/run"], "run.dir: ~/run"),
        (["check", "digits", "data={name: imagefolder, root: ~/x}"], "data.root: ~/x"),
        (["check", "digits", "data={name: cifar10, root: ~/x}"], "data.root: ~/x"),
    ):
        done = subprocess.run([*nobody, *arguments], **options)
        assert done.returncode == 2, done.stderr
        assert f"{key}: this user has no home folder; set HOME, or write" in done.stderr
        assert len(done.stderr.splitlines()) == 1


IMAGES = "data={{name: imagefolder, root: {}, image_size: 224, eval_resize: 224, workers: 2}}"
LARGE = ["train.global_batch=32", "train.micro_batch=32", "model.name=squeezenet1_1"]


@pytest.fixture
def images(tmp_path):
    return make_folder(tmp_path / "images", train=16, val=2)


def test_shared_memory_that_is_too_small_is_one_line(images, tmp_path):
    unshared("mount")
    arguments = shlex.join([IMAGES.format(images), *LARGE, *SHORT, f"run.dir={tmp_path / 'run'}"])
    script = f"""
mount -t tmpfs -o size=2m tmpfs /dev/shm
hvd-lars train digits {arguments}; echo code $?
hvd-lars doctor --no-ranks digits {arguments} | grep -e shared -e /dev/shm -e verdict
"""
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c",
         f'hvd-lars() {{ {shlex.join(COMMAND)} "$@"; }}\n{script}'],
        env=launcher_environment(), capture_output=True, text=True, timeout=HANG_GUARD,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(
        "hvd-lars: data.workers: a process that loads images has no room in shared memory: "
        "/dev/shm has "
    )
    assert "code 2" in done.stdout
    # Two batches a worker and the one in use; 512 evaluated at once are the larger ones.
    needed = 3 * 224 * 224 * 512 * 5
    assert f"2 MB free in /dev/shm; digits on 1 rank: {needed / 1e6:,.0f} MB" in done.stdout
    assert "needs 385 MB of /dev/shm, 2 are free: docker run --shm-size=1g" in done.stdout
    assert "verdict: no fault found; no ranks started" in done.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loading_process_that_is_killed_is_one_line(images, tmp_path, ranks):
    options = [*LARGE, "train.duration=9000 steps", "train.log_every=1 steps", *SHORT[1:]]
    options += ["train.eval_every=9000 steps", "checkpoint.every=9000 steps"]
    program = [*COMMAND, "train", "digits", IMAGES.format(images), *options]
    program += [f"run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        local_command("mpirun", ranks, program) if ranks > 1 else program,
        env=launcher_environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + HANG_GUARD
    while not (tmp_path / "run/metrics.jsonl").exists() or not records_of(
        tmp_path / "run", "train"
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [p for p in family if "forkserver" in str(p.parent().cmdline())]
    workers[-1].kill()
    _, errors = process.communicate(timeout=HANG_GUARD)
    assert process.returncode not in (0, 2), errors
    assert "a process that loads images (one of data.workers=2) " in errors
    assert "out of memory? use fewer data.workers" in errors
    assert "Traceback" not in errors
    assert "leaked" not in errors
    if ranks == 1:
        assert len(errors.splitlines()) == 1, errors


def test_a_reader_that_leaves_is_no_error(tmp_path):
    done = shell("hvd-lars check digits digits-sgd-b32 | head -n 1; echo ${PIPESTATUS[0]}")
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "141")
    done = shell("hvd-lars check digits | true; hvd-lars --help | true; hvd-lars schema | true")
    assert done.stderr == ""
    done = shell("hvd-lars train nosuch 2> /dev/full; echo $?")
    assert done.stdout == "2\n"
    done = shell("hvd-lars check digits > /dev/full; echo $?")
    assert done.stdout == "2\n"
    assert done.stderr == "hvd-lars: standard output cannot be written: No space left on device\n"


def test_standard_streams_that_are_closed(tmp_path):
    """The first file that is opened must not take a stream's number."""
    script = f"hvd-lars train digits run.dir={tmp_path / 'run'} {shlex.join(SHORT)} >&- 2>&- <&-"
    done = shell(f"{script}; echo $?")
    assert done.stdout == "0\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints", "config.yaml", "data.json", "environment.json", "layers.jsonl",
        "metrics.jsonl",
    }  # fmt: skip
    assert len(records_of(tmp_path / "run", "eval")) == 1
    done = shell(f"hvd-lars eval {tmp_path / 'run'} >&-; hvd-lars check digits >&-; echo $?")
    assert (done.stdout, done.stderr) == ("0\n", "")
    done = shell("hvd-lars check digits train.global_batch=0 2>&-; echo $?")
    assert done.stdout == "2\n"
    done = shell(f"hvd-lars eval {tmp_path / 'run'} > /dev/full; echo $?")
    assert done.stdout == "2\n"
    assert done.stderr == "hvd-lars: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "2 x micro-batch"), ("latin-1", "2 × micro-batch")]
)
def test_terminals_of_other_encodings(encoding, shown):
    plain = {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    done = shell("hvd-lars check digits", launcher_environment() | plain, encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert "__..-=++*##@@@@##***+++===----....._____________  poly" in done.stdout
    done = shell("hvd-lars check nö▁", launcher_environment() | plain, encoding=encoding)
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_gloo_on_a_host_whose_name_does_not_resolve_is_named_before_it_crashes(tmp_path):
    unshared("uts")
    program = [*COMMAND, "train", "digits", f"run.dir={tmp_path / 'run'}", *SHORT]
    command = shlex.join(local_command("horovodrun --gloo", 2, program))
    script = f"hostname no-such-host.invalid; {command}"
    done = subprocess.run(
        ["unshare", "--uts", "bash", "-c", script],
        env=launcher_environment(), capture_output=True, text=True, timeout=HANG_GUARD,
    )  # fmt: skip
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "this host's own name no-such-host.invalid does not resolve" in text
    assert "add a line `127.0.0.1 no-such-host.invalid` to /etc/hosts" in text
    assert "Segmentation fault" not in text
    command = shlex.join(local_command("mpirun", 2, program))
    done = subprocess.run(
        ["unshare", "--uts", "bash", "-c", f"hostname no-such-host.invalid; {command}"],
        env=launcher_environment(), capture_output=True, text=True, timeout=HANG_GUARD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_this_pythons_command_is_what_was_tested():
    assert this_python("-m", "hvd_lars") == COMMAND
