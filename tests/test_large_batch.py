"""benchmarks/large_batch.py goes on from the file of its results."""

import json
import subprocess
from pathlib import Path

import pytest
from commands import warm_python

BENCHMARK = Path(__file__).parents[1] / "benchmarks/large_batch.py"
STUDY = ["digits", "--trials=1", "--seeds=1", "--methods=SGD", "--batches", "512", "1024"]


def run(folder, *arguments):
    """Run the study in a folder of its own, which a next call does not find."""
    return subprocess.run(
        [*warm_python(BENCHMARK), *STUDY, "--folder", folder, "-o", folder.parent / "rows.json",
         *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The text of a study of two epochs."""
    base = tmp_path_factory.mktemp("study")
    done = run(base / "first", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    return (base / "rows.json").read_text()


@pytest.fixture
def rows(study, tmp_path):
    """A file of its rows but the last."""
    result = json.loads(study)
    del result["rows"][-1]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(result))
    return path


def cells(path):
    return [(row["batch"], row["method"]) for row in json.loads(path.read_text())["rows"]]


def test_it_runs_what_the_file_lacks(rows):
    before = cells(rows)
    assert before == [(512, "SGD"), (1024, "SGD"), (1024, "sqrt")]
    done = run(rows.parent / "second", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert cells(rows) == [*before, (1024, "linear")]
    known, *_, last = json.loads(rows.read_text())["rows"]
    assert last["params"]["schedule.base_lr"] == 2.0 * known["params"]["schedule.base_lr"]
    made = {path.name for path in (rows.parent / "second").glob("*/*")}
    assert made == {"b1024-linear"}


def test_another_study_does_not_go_into_the_file(rows):
    text = rows.read_text()
    done = run(rows.parent / "third", "--epochs", "3")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{rows}: holds another study: epochs is 2, here 3; name another file with -o"
    ]
    assert rows.read_text() == text
