"""What was read is what is measured, and a run knows the data that it saw."""

import json
import os
import shutil

import pytest
from commands import HANG_GUARD, hvd_lars, records_of, warm_python
from test_image_folder import make_folder

from hvd_lars.launchers.local import run_here


def training(images, run, *options):
    """Three classes of 40×30; six images a step, four test images a rank and pass."""
    return [
        "train", "digits", f"run.dir={run}", "model.name=squeezenet1_1",
        f"data={{name: imagefolder, root: {images}, image_size: 48, eval_resize: 48, workers: 0}}",
        "train.global_batch=6", "train.micro_batch=6", "train.eval_batch=4",
        "schedule.base_lr=0.01", "schedule.warmup_duration=1 steps", "train.duration=4 steps",
        "train.log_every=1 steps", "train.eval_every=2 steps", "checkpoint.every=2 steps", *options,
    ]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    return make_folder(tmp_path / "images", train=8, val=4)


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("seen")
    images = make_folder(root / "images", train=8, val=4)
    code, output = hvd_lars(*training(images, root / "run"))
    assert code == 0, output
    return root / "run"


@pytest.fixture
def run(run_once, images, tmp_path):
    """A run folder of one's own, of the same images, which a test may change."""
    shutil.copytree(run_once, tmp_path / "run")
    return tmp_path / "run"


def over_two_ranks(arguments):
    program = warm_python("-m", "hvd_lars", *map(str, arguments))
    result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    return result.returncode, result.stdout


def damage(images, kept):
    """All test images but ``kept`` become unreadable; their paths."""
    broken = sorted(path for path in images.glob("val/*/*") if path != kept)
    for path in broken:
        path.write_bytes(b"no image")
    return broken


@pytest.mark.parametrize("ranks", [1, 2])
def test_eval_of_a_set_that_is_damaged_says_so_and_measures_the_rest(run, images, ranks):
    start = over_two_ranks if ranks == 2 else lambda arguments: hvd_lars(*arguments)
    kept = images / "val/bee/1.png"
    broken = damage(images, kept)
    here = f"data.root={images}"
    code, output = start(["eval", run, here])
    assert code == 2, output
    message = "data.max_bad_fraction: 11 of 12 test images cannot be read, such as "
    assert output.count(message) == 1 or ranks == 2  # rank 1 may say it, too
    for path in broken:
        assert output.count(f"{path}: not a readable image: of no known format: not eval") == 1
    assert '"top1"' not in output
    assert "Traceback" not in output
    code, output = start(["eval", run, here, "data.max_bad_fraction=1.0"])
    assert code == 0, output
    found = json.loads(output[output.index("{") : output.index("}") + 1])
    assert found["num_samples"] == 1
    assert found["top1"] in (0.0, 1.0)
    kept.write_bytes(b"")
    code, output = start(["eval", run, here, "data.max_bad_fraction=1.0"])
    assert code == 2, output
    assert "none of the 12 test images can be read" in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_in_training_counts_what_was_read(images, tmp_path, ranks):
    start = over_two_ranks if ranks == 2 else lambda arguments: hvd_lars(*arguments)
    for path in (images / "val/ant/0.JPEG", images / "val/cat/3.png"):
        path.write_bytes(b"no image")
    code, output = start(training(images, tmp_path / "run", "data.max_bad_fraction=0.2"))
    assert code == 0, output
    assert output.count("of no known format: not evaluated") == 2  # though evaluated twice
    assert "on 10 images" in output
    assert [r["num_samples"] for r in records_of(tmp_path / "run", "eval")] == [10, 10]
    events = [r for r in records_of(tmp_path / "run", "event") if r["event"] == "not_evaluated"]
    assert sorted(event["image"].split(":")[0] for event in events) == [
        f"{images}/val/ant/0.JPEG", f"{images}/val/cat/3.png"
    ]  # fmt: skip
    code, output = start(training(images, tmp_path / "other", "data.max_bad_fraction=0.15"))
    assert code == 2, output
    assert "data.max_bad_fraction: 2 of 12 test images cannot be read" in output
    # What was trained until then is kept.
    assert (tmp_path / "other/checkpoints/step-00000002/manifest.json").is_file()


def grow(images):
    for name in ("ant", "bee", "cat"):
        for i in range(12):
            shutil.copy(images / f"train/{name}/1.png", images / f"train/{name}/more{i}.png")


def rename(images):
    for split in ("train", "val"):
        os.rename(images / split / "ant", images / split / "zebra")


def exchange(images):
    (images / "train/bee/1.png").rename(images / "train/bee/01.png")


CHANGES = {
    "more images": (grow, "24 images in train then, 60 now"),
    "a class renamed": (
        rename, "gone: class ant; new: class zebra; label 0 was ant and is bee"
    ),
    "an image renamed": (exchange, "other images in train, or in another order"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_other_data_is_refused_unless_it_is_wanted(run, images, change):
    change, message = CHANGES[change]
    change(images)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = training(images, run, "train.duration=60 steps", "--resume")
    code, output = hvd_lars(*again)
    assert code == 2, output
    checkpoint = run / "checkpoints/step-00000004"
    assert output == (
        f"hvd-lars: data: differs from that of {checkpoint}: {message}; run.allow_other_data=true "
        f"on the command line accepts it\n"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    taken = ["run.allow_other_data=true", "train.duration=8 steps", "train.eval_every=4 steps"]
    code, output = hvd_lars(*training(images, run, *taken, "train.global_batch=4", "--resume"))
    assert code == 0, output
    assert f"differs from that of {checkpoint}, and is accepted: {message}" in output
    samples = [r["samples"] for r in records_of(run, "train")]
    assert samples == [6, 12, 18, 24, 28, 32, 36, 40]  # where 4 · 5 would run backwards
    assert "allow_other_data: false" in (run / "config.yaml").read_text()
    code, output = hvd_lars("eval", run, f"data.root={images}")  # which now is what it has seen
    assert code == 0, output


def test_a_class_whose_name_is_not_unicode(images, tmp_path):
    for split in ("train", "val"):
        os.rename(images / split / "cat", os.fsencode(images / split) + b"/c\xff")
    code, output = hvd_lars(*training(images, tmp_path / "run"))
    assert code == 0, output
    for command in (
        ["eval", tmp_path / "run"],
        ["export", tmp_path / "run", "-o", tmp_path / "w.pth"],
    ):
        code, output = hvd_lars(*command)
        assert code == 0, output


def test_eval_refuses_other_classes_and_other_test_images(run, images):
    kept = json.loads((run / "data.json").read_text())
    assert kept["classes"] == ["ant", "bee", "cat"]
    assert (kept["train"]["images"], kept["val"]["images"]) == (24, 12)
    assert json.loads((run / "checkpoints/step-00000004/data.json").read_text()) == kept
    grow(images)  # training images are not asked about
    code, output = hvd_lars("eval", run, f"data.root={images}")
    assert code == 0, output
    rename(images)
    code, output = hvd_lars("eval", run, f"data.root={images}")
    assert code == 2, output
    assert "label 0 was ant and is bee" in output
    code, output = hvd_lars("eval", run, f"data.root={images}", "run.allow_other_data=true")
    assert code == 0, output
    assert "and is accepted: gone: class ant" in output


def test_a_run_without_a_checkpoint_knows_its_data_too(run, images):
    shutil.rmtree(run / "checkpoints")
    grow(images)
    code, output = hvd_lars(*training(images, run, "--resume"))
    assert code == 2, output
    assert f"data: differs from that of {run}: 24 images in train then, 60 now" in output


def test_a_checkpoint_from_before_that_says_nothing_is_taken(run, images):
    for path in (run / "data.json", *run.glob("checkpoints/*/data.json")):
        path.unlink()
    for path in run.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest.pop("data.json")
        path.write_text(json.dumps(manifest))
    grow(images)
    code, output = hvd_lars(*training(images, run, "train.duration=5 steps", "--resume"))
    assert code == 0, output
