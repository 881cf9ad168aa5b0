"""What one sees of a run: the bar, quiet, a profile, the page, in a browser where there is one."""

import json
import subprocess

import pytest
from commands import HANG_GUARD, hvd_lars, warm_python

from hvd_lars.launchers.local import run_here, run_in_terminal

SHORT = ["train.duration=40 steps", "schedule.warmup_duration=10 steps",
         "train.eval_every=20 steps"]  # fmt: skip


def test_a_bar_in_a_terminal(tmp_path):
    program = warm_python("-m", "hvd_lars", "train", "digits", f"run.dir={tmp_path / 'run'}")
    code, shown = run_in_terminal([*program, *SHORT], columns=120)
    assert code == 0, shown
    last = shown.rpartition("epoch ")[2]
    assert last.startswith("4.00")
    for what in ("100 %", "loss ", "top-1 0.", "lr ", "images/s", "waits "):
        assert what in last, shown
    assert "done in" in shown


def test_quiet(tmp_path):
    code, output = hvd_lars("train", "digits", "--quiet", f"run.dir={tmp_path / 'run'}", *SHORT)
    assert code == 0, output
    assert len(output.splitlines()) == 2
    assert (tmp_path / "run/metrics.jsonl").stat().st_size > 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over two ranks with a profile and TensorBoard."""
    folder = tmp_path_factory.mktemp("seen") / "run"
    options = ["train.profile=steps 5-6", "run.loggers=[tensorboard]"]
    program = warm_python("-m", "hvd_lars", "train", "digits", f"run.dir={folder}", *SHORT)
    result = run_here("mpirun", 2, [*program, *options], HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    return folder


def test_a_profile_of_some_steps(run):
    for rank in (0, 1):
        trace = json.loads((run / f"profile/steps-5-6/torch-rank-{rank}.json").read_text())
        names = [event.get("name", "") for event in trace["traceEvents"]]
        assert sum(name.startswith("Optimizer.step") for name in names) == 2
    text = (run / "profile/steps-5-6/horovod.json").read_text()
    assert "ALLREDUCE" in text
    assert list((run / "tensorboard").iterdir())


def test_layers_are_recorded_once_an_epoch(run):
    records = [json.loads(line) for line in (run / "layers.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 20, 30, 40]
    assert len(records[0]["trust_ratio"]) == 16


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "report.html"
    code, output = hvd_lars("report", run, "-o", page)
    assert code == 0, output
    assert output == f"{page}: 1 run\n"
    return page


@pytest.mark.part("Chromium")
def test_a_browser_has_nothing_to_complain_of(page, tmp_path):
    for width, scheme in ((1200, "light"), (390, "dark")):
        picture = tmp_path / f"{width}.png"
        shown = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             "--hide-scrollbars", f"--window-size={width},2400", f"--screenshot={picture}",
             *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []),
             page.as_uri()],
            capture_output=True, text=True, timeout=HANG_GUARD, check=False,
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        assert "CONSOLE" not in shown.stderr
        assert picture.stat().st_size > 10_000


def test_a_folder_that_holds_no_run_is_one_line(tmp_path):
    code, output = hvd_lars("report", tmp_path)
    assert code == 2
    assert output == f"hvd-lars: {tmp_path}: not a run folder: no config.yaml in it\n"


def test_a_profile_of_no_steps_is_one_line():
    code, output = hvd_lars("train", "digits", "train.profile=steps 6-5")
    assert code == 2
    assert "profile is 'steps 6-5'; the first step is after the last" in output
