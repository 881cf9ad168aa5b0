"""The same images unpacked and in archives train alike: same losses, evaluation and identity."""

import pytest
from commands import HANG_GUARD, hvd_lars, records_of
from test_archives import archive
from test_image_folder import make_folder

from hvd_lars.launchers.local import run_here, this_python

OPTIONS = [
    "model.name=resnet18_cifar", "train.global_batch=6", "train.duration=4 steps",
    "train.log_every=1 steps", "train.eval_every=4 steps", "checkpoint.every=4 steps",
    "schedule.warmup_duration=1 steps", "schedule.base_lr=0.5",
]  # fmt: skip


def test_over_two_ranks(tmp_path):
    folder = make_folder(tmp_path / "images")
    archives = archive(folder, tmp_path / "archives")
    found = {}
    for name, root in (("imagefolder", folder), ("imagenet", archives)):
        data = f"data={{name: {name}, root: {root}, image_size: 16, eval_resize: 20}}"
        arguments = [
            "train",
            "digits",
            data,
            "data.workers=1",
            f"run.dir={tmp_path / 'run' / name}",
        ]
        program = this_python("-m", "hvd_lars", *arguments, *OPTIONS)
        result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stdout
        rows = records_of(tmp_path / "run" / name, "train")
        rows += records_of(tmp_path / "run" / name, "eval")
        found[name] = [(row["step"], row["loss"], row.get("top1")) for row in rows]
    assert len(found["imagenet"]) == 5
    assert found["imagenet"] == found["imagefolder"]


@pytest.mark.parametrize("further", [[], ["data.augment.flip=false"]])
def test_a_run_goes_on_from_the_archives_of_its_folder(tmp_path, further):
    folder = make_folder(tmp_path / "images")
    archives = archive(folder, tmp_path / "archives")
    shape = "image_size: 16, eval_resize: 20, workers: 0"
    run = f"run.dir={tmp_path / 'run'}"
    data = f"data={{name: imagefolder, root: {folder}, {shape}}}"
    code, output = hvd_lars("train", "digits", data, run, *OPTIONS, "train.duration=4 steps")
    assert code == 0, output
    data = f"data={{name: imagenet, root: {archives}, {shape}}}"
    arguments = [data, run, "--resume", *OPTIONS, *further, "train.duration=6 steps"]
    code, output = hvd_lars("train", "digits", *arguments)
    assert code == 0, output
    assert records_of(tmp_path / "run", "train")[-1]["step"] == 6
