"""A user's mistake ends every rank with code 2 and one clear line; nothing hangs or is left."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import warm_python

from hvd_lars.launchers.local import run_here
from launch.test_training import HANG_GUARD, hvd_lars

CORRUPT = "train: {duration: [\n"


@pytest.fixture
def mistakes(tmp_path):
    """Arguments by mistake, and what the line must say."""
    corrupt = tmp_path / "corrupt.yaml"
    corrupt.write_text(CORRUPT)
    file = tmp_path / "file"
    file.write_text("in the way")
    return {
        "missing config": (["no/such.yaml"], "no/such.yaml: no such file, nor a bundled config"),
        "wrong key": (
            ["digits", "train.globl_batch=64"],
            "train.globl_batch: unknown key; did you mean global_batch?",
        ),
        "batch of 0": (
            ["digits", "train.global_batch=0"],
            "train.global_batch: found 0; must be greater than or equal to 1",
        ),
        "unwritable run folder": (
            ["digits", f"run.dir={file}/run"],
            f"run.dir: {file}/run cannot be written: Not a directory",
        ),
        "corrupt YAML": ([str(corrupt)], f"{corrupt}: line 2, column 1: not valid YAML"),
        "batch beyond the data": (
            ["digits", "train.global_batch=20000"],
            "train.global_batch: found 20000; must be at most 10,764",
        ),
        "unknown model": (["digits", "model.name=resnet5"], "model.name: found 'resnet5'; nearest"),
        "world size": (["digits", "run.expect_world_size=7"], "run.expect_world_size is 7, but"),
        "model and data": (
            ["digits", "model.name=resnet18"],
            "model.name: resnet18 does not take the 1×8×8 images of the data",
        ),
    }


NAMES = [
    "missing config",
    "wrong key",
    "batch of 0",
    "unwritable run folder",
    "corrupt YAML",
    "batch beyond the data",
    "unknown model",
    "world size",
    "model and data",
]


@pytest.mark.parametrize("name", NAMES)
def test_alone(mistakes, name):
    arguments, message = mistakes[name]
    code, output = hvd_lars("train", *arguments)
    assert code == 2, output
    assert output.startswith("hvd-lars: ")
    assert message in output
    assert len(output.splitlines()) == 1, output


def run_with_codes(launcher, arguments, tmp_path, environment=None):
    """Run over 2 ranks in shells that write each rank's own exit code to a file.

    The shells outlive the launcher's SIGTERM by long enough to write it.
    """
    command = shlex.join(warm_python("-m", "hvd_lars", "train", *arguments))
    rank = "${OMPI_COMM_WORLD_RANK:-$HOROVOD_RANK}"
    script = f"trap '' TERM; {command}; code=$?; echo $code > {tmp_path}/code.{rank}; exit $code"
    result = run_here(launcher, 2, ["sh", "-c", script], HANG_GUARD, environment)
    codes = [path.read_text().strip() for path in sorted(tmp_path.glob("code.*"))]
    return result, codes


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_under_mpirun(mistakes, name, tmp_path):
    arguments, message = mistakes[name]
    for _ in range(3):  # on a loaded machine the second rank may be killed before it is told
        result, codes = run_with_codes("mpirun", arguments, tmp_path)
        assert result.returncode == 2, result.stdout
        lines = [line for line in result.stdout.splitlines() if "hvd-lars: " in line]
        assert all(message in line for line in lines), result.stdout
        assert [line for line in lines if "rank 1: " not in line] == lines[:1], result.stdout
        assert "Traceback" not in result.stdout
        assert set(codes) == {"2"}
        if len(codes) == 2:
            return
    pytest.fail("rank 1 never left by itself")


@pytest.mark.parametrize("launcher", ["horovodrun", "horovodrun --gloo"])
@pytest.mark.parametrize("name", ["wrong key", "unwritable run folder"])
def test_two_ranks_under_horovodrun(mistakes, name, launcher, tmp_path):
    arguments, message = mistakes[name]
    result, codes = run_with_codes(launcher, arguments, tmp_path)
    assert result.returncode != 0
    assert message in result.stdout
    assert codes[0] == "2"


@pytest.mark.parametrize("name", ["missing config", "batch of 0"])
def test_both_ranks_leave_with_2_where_no_launcher_ends_them(mistakes, name):
    """The shells here exit with 0, so mpirun ends nobody: the second rank speaks for itself.

    (After MPI has started, mpirun ends the job of a rank that leaves, whatever its code.)
    """
    arguments, message = mistakes[name]
    command = shlex.join(warm_python("-m", "hvd_lars", "train", *arguments))
    result = run_here("mpirun", 2, ["sh", "-c", f"{command}; echo code=$?"], HANG_GUARD)
    assert re.findall(r"code=(\d+)", result.stdout) == ["2", "2"]
    assert result.stdout.count(message) == 2
    assert "rank 1: hvd-lars: " in result.stdout


def test_n_solo_runs_are_refused(tmp_path):
    environment = {"HOROVOD_CONTROLLER": "gloo"}
    result, codes = run_with_codes("mpirun", ["digits"], tmp_path, environment)
    assert result.returncode == 2
    assert "HOROVOD_CONTROLLER=gloo makes each of them a job of its own" in result.stdout
    result, _ = run_with_codes("mpirun", ["digits", "comm.backend=local"], tmp_path)
    assert "each would train alone" in result.stdout
    result, _ = run_with_codes("horovodrun --gloo", ["digits", "comm.backend=mpi"], tmp_path)
    assert "each would see itself alone" in result.stdout


def test_a_rank_that_raises_ends_the_others(tmp_path):
    """An exception that is nobody's mistake: a traceback with its rank, code 1, no hang."""
    program = tmp_path / "broken.py"
    program.write_text("""
import sys
from hvd_lars.train import trainer
step = trainer.Trainer.train_step
def breaks(self, batches):
    if self.state.progress.step == 3 and self.comm.rank == 1:
        raise ArithmeticError("broken on purpose")
    return step(self, batches)
trainer.Trainer.train_step = breaks
from hvd_lars.cli import main
main(["train", "digits", "run.dir=" + sys.argv[1]])
""")
    for launcher in ("mpirun", "horovodrun --gloo"):
        folder = str(tmp_path / launcher.replace(" ", ""))
        result = run_here(launcher, 2, [sys.executable, str(program), folder], HANG_GUARD)
        assert result.returncode not in (0, 124), result.stdout
        assert "rank 1: Traceback" in result.stdout
        assert "ArithmeticError: broken on purpose" in result.stdout


def test_a_run_folder_is_never_written_over(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("precious\n")
    code, output = hvd_lars("train", "digits", f"run.dir={folder}")
    assert code == 2
    assert "holds a run already; name another folder" in output
    assert (folder / "metrics.jsonl").read_text() == "precious\n"
    assert os.listdir(folder) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "/no/such/run"], "/no/such/run: not a run folder: no such folder"),
        (["check", "digits", "--ranks", "0"], "--ranks: found 0; must be 1 or more"),
        (
            ["check", "digits", "train.duration=0.01 epochs"],
            "0.01 epochs; must be at least one",
        ),
        (["check", "digits", "schedule.warmup_duration=30 epochs"], "the whole run has 200"),
        (["schema", "-o", "/no/such/file"], "/no/such/file: cannot be written: No such file"),
    ],
)
def test_other_commands(arguments, message):
    code, output = hvd_lars(*arguments)
    assert code == 2
    assert message in output
    assert len(output.splitlines()) == 1, output


def test_check_prints_the_plan():
    code, output = hvd_lars("check", "digits", "--ranks", "3", "train.micro_batch=100")
    assert code == 0
    plan = dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines())
    assert plan["steps"] == "200 of 1,024 samples, 10 an epoch"
    assert plan["accumulation"] == "4 × micro-batch of up to 86"
    assert plan["ranks"] == "3, each up to 342 samples a step"
    wanted = "start 0, after warmup 32, middle 14.2222, last step 0.00142222"
    assert plan["learning rate"] == wanted


def test_the_schema_command_writes_defaults_as_the_yaml_does(tmp_path):
    code, output = hvd_lars("schema", "-o", tmp_path / "schema.json")
    assert code == 0, output
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert schema["$defs"]["Train"]["properties"]["eval_every"]["default"] == "1 epochs"


def test_it_trains_on_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-m", "hvd_lars", "train", "digits", f"run.dir={tmp_path / 'run'}"]
        + ["train.duration=2 steps", "schedule.warmup_duration=1 steps"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/environment.json").read_text())["commit"] is None


def test_ctrl_c_is_one_line():
    """Before training, that is: in training it asks for a stop (test_resume.py)."""
    waiting = (
        "import os, signal, sys, types, hvd_lars.cli\n"
        "command = sys.modules['hvd_lars.cli.main']\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "wait = types.SimpleNamespace(run=lambda _: os.kill(os.getpid(), signal.SIGINT))\n"
        "command.TOOLS['check'] = wait\n"
        "command.main(['check', 'digits'])"
    )
    done = subprocess.run([sys.executable, "-c", waiting], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "hvd-lars: interrupted\n"


STALL = """
import os, time
from hvd_lars.comm import connect
comm = connect("horovod")
import torch
assert os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] == os.environ.get("WANTED", "1800")
comm.barrier()
if comm.rank == 1 and "WANTED" in os.environ:
    time.sleep(600)
comm.start_all_reduce_sum(torch.ones(3), "x").wait()
comm.close()
"""


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun --gloo"])
def test_a_rank_that_stops_taking_part_ends_the_job(launcher):
    program = warm_python("-c", STALL)
    assert run_here(launcher, 2, program, HANG_GUARD).returncode == 0
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3"}
    result = run_here(launcher, 2, program, HANG_GUARD, limits | {"WANTED": "3"})
    assert result.returncode != 0
    assert "Missing ranks:" in result.stdout or "stall" in result.stdout.lower(), result.stdout


SHORT = ["train.duration=4 steps", "schedule.warmup_duration=2 steps", "train.global_batch=128"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("done") / "run"
    code, output = hvd_lars("train", "digits", f"run.dir={folder}", *SHORT)
    assert code == 0, output
    return folder


def refused(*arguments, cwd=None):
    code, output = hvd_lars(*arguments, cwd=cwd)
    assert code == 2, output
    [line] = output.splitlines()
    return line


def test_a_folder_whose_run_goes_on_is_not_taken_over(done, tmp_path):
    """The first lost its records to the second, and both ended well."""
    folder = shutil.copytree(done, tmp_path / "run")
    path = folder / "environment.json"
    with subprocess.Popen(["sleep", "600"]) as other:  # as the other run's first rank
        facts = json.loads(path.read_text())
        began = int(Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19])
        path.write_text(json.dumps(facts | {"pid": other.pid, "process_began": began}))
        before = (folder / "metrics.jsonl").read_bytes()
        again = [
            "train",
            "digits",
            f"run.dir={folder}",
            *SHORT,
            "train.duration=6 steps",
            "--resume",
        ]
        line = refused(*again)
        assert f"run.dir: {folder} is in use: its run is process {other.pid}" in line
        assert (folder / "metrics.jsonl").read_bytes() == before
        other.kill()
    code, output = hvd_lars(*again)
    assert code == 0, output


def test_a_study_is_not_a_run(done, tmp_path):
    folder = shutil.copytree(done, tmp_path / "study")
    (folder / "journal.log").touch()
    line = refused("train", "digits", f"run.dir={folder}", *SHORT, "--resume")
    assert f"run.dir: {folder} holds a study of tune, not a run" in line


def test_a_config_above_the_run_folder_is_another_ones(done, tmp_path):
    (tmp_path / "config.yaml").write_text("defaults: [db]")
    code, output = hvd_lars("train", "digits", "run.dir=runs/a", *SHORT, "--resume", cwd=tmp_path)
    assert code == 0, output


def test_a_run_that_was_moved_is_resumed_where_it_is(done, tmp_path):
    folder = shutil.copytree(done, tmp_path / "moved")
    before = sorted((done / "checkpoints").iterdir())
    arguments = ["train", str(folder / "config.yaml"), "--resume", "train.duration=6 steps"]
    line = refused(*arguments)
    assert f"run.dir: found {done} in {folder / 'config.yaml'}, whose run is in {folder}" in line
    code, output = hvd_lars(*arguments, f"run.dir={folder}")
    assert code == 0, output
    assert f"run folder {folder}, resuming after step 4" in output
    assert sorted((done / "checkpoints").iterdir()) == before


def test_damaged_checkpoints_are_no_weights_to_start_from(done, tmp_path):
    folder = shutil.copytree(done, tmp_path / "damaged")
    for file in (folder / "checkpoints").glob("step-*/state.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    options = [f"run.dir={tmp_path / 'new'}", f"model.init_from={folder}", *SHORT]
    assert "damaged: does not match manifest.json" in refused("train", "digits", *options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("record", ['{"step": 3, "kind": "train"}', '{"step": 3, "kind": "eval"}'])
def test_a_record_without_its_keys_is_named(done, tmp_path, record):
    folder = shutil.copytree(done, tmp_path / "odd")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], record, *lines[1:], ""]))
    line = refused("report", str(folder), "-o", str(tmp_path / "x.html"))
    assert f"{folder / 'metrics.jsonl'}: line 2 is not a record" in line
