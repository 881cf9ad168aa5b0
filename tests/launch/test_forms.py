"""The same images in every form train alike: same losses, evaluation and identity."""

import json
import shutil
from pathlib import Path

import forms
import pytest
from commands import HANG_GUARD, hvd_lars, records_of, warm_python
from test_image_folder import make_folder

from hvd_lars.launchers.local import run_here

OPTIONS = [
    "model.name=resnet18_cifar", "train.global_batch=6", "train.duration=2 steps",
    "train.log_every=1 steps", "train.eval_every=2 steps", "checkpoint.every=4 steps",
    "schedule.warmup_duration=1 steps", "schedule.base_lr=0.5",
]  # fmt: skip
SHAPE = "image_size: 16, eval_resize: 20, workers: 0"
FORMS = {
    "folder": shutil.copytree,
    "archives": forms.archives,
    "tfrecord": forms.tfrecords,
    "arrow": forms.arrow,
    "recordio": forms.recordio,
    "zip": forms.zipped,
    "kaggle": forms.kaggle,
    "tiny": forms.tiny,
    "places": forms.places,
}
# One start of two ranks trains on each data set in turn.
TRAIN_EACH = """
import json, os, sys
from argparse import Namespace
from hvd_lars.cli.train import train
from hvd_lars.comm import connect, detect_launch
from hvd_lars.config.file import load_config
runs, options = map(json.loads, sys.argv[1:])
comm, launch = connect("auto"), detect_launch(os.environ)
none = Namespace(resume=False, resume_from=None, overrides=[])
for data, run in runs:
    config = load_config("digits", [data, f"run.dir={run}", *options])
    assert train(none, config, comm, launch) == 0
comm.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("images") / "images")
    forms.number_val(folder)
    return folder


def test_over_two_ranks(folder, tmp_path):
    """Every form, and shards packed from the folder and from Parquet."""
    roots = {name: write(folder, tmp_path / name) for name, write in FORMS.items()}
    forms.parquet(folder, tmp_path / "parquet")
    for name in ("folder", "parquet"):
        roots[f"packed {name}"] = target = tmp_path / f"{name}-shards"
        code, output = hvd_lars("pack", tmp_path / name, target, "--verify")
        assert code == 0, output
    runs = {name: str(tmp_path / "runs" / root.name) for name, root in roots.items()}
    asked = [(f"data={{root: {root}, {SHAPE}}}", runs[name]) for name, root in roots.items()]
    program = warm_python("-c", TRAIN_EACH, json.dumps(asked), json.dumps(OPTIONS))
    result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    found = {}
    for name, run in runs.items():
        rows = records_of(Path(run), "train") + records_of(Path(run), "eval")
        found[name] = [(row["step"], row["loss"], row.get("top1")) for row in rows]
    assert len(found["folder"]) == 3
    assert all(losses == found["folder"] for losses in found.values()), found


@pytest.mark.parametrize("further", [[], ["data.augment.flip=false"]])
def test_a_run_goes_on_from_the_archives_of_its_folder(folder, tmp_path, further):
    archives = forms.archives(folder, tmp_path / "archives")
    run = f"run.dir={tmp_path / 'run'}"
    data = f"data={{name: imagefolder, root: {folder}, {SHAPE}}}"
    code, output = hvd_lars("train", "digits", data, run, *OPTIONS, "train.duration=4 steps")
    assert code == 0, output
    data = f"data={{name: imagenet, root: {archives}, {SHAPE}}}"
    arguments = [data, run, "--resume", *OPTIONS, *further, "train.duration=6 steps"]
    code, output = hvd_lars("train", "digits", *arguments)
    assert code == 0, output
    assert records_of(tmp_path / "run", "train")[-1]["step"] == 6
