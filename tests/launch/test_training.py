"""``hvd-lars train digits`` under every launcher, and what it leaves behind."""

import json
import re
import shutil

import pytest
import torch
from commands import HANG_GUARD, hvd_lars, made_once, records_of, warm_python
from test_image_folder import make_folder

from hvd_lars.launchers.local import run_here
from hvd_lars.runtime.stopwatch import PARTS

# Launcher and ranks; the last three end after a quarter of the run.
CASES = {
    "alone": (None, 1),
    "mpirun-2": ("mpirun", 2),
    "mpirun-4": ("mpirun", 4),
    "horovodrun-2": ("horovodrun", 2),
    "gloo-2": ("horovodrun --gloo", 2),
}
WHOLE = ["alone", "mpirun-2"]


@pytest.fixture
def finished(tmp_path_factory):
    """A function from a case to its run folder."""

    def run_of(case):
        launcher, ranks = CASES[case]

        def train(folder):
            arguments = ["train", "digits", f"run.dir={folder}", "comm.backend=auto"]
            if case not in WHOLE:
                arguments.append("train.duration=6 epochs")
            if launcher is None:
                code, output = hvd_lars(*arguments)
            else:
                program = warm_python("-m", "hvd_lars", *arguments)
                program.append(f"run.expect_world_size={ranks}")
                result = run_here(launcher, ranks, program, HANG_GUARD)
                code, output = result.returncode, result.stdout
            assert code == 0, output
            assert re.search(r"top-1 0\.\d+ on 900 images, [\d,]+ images/s, run folder", output)

        return made_once(tmp_path_factory, case, train)

    return run_of


@pytest.mark.parametrize("case", WHOLE)
def test_digits_reach_98_percent(finished, case):
    last = records_of(finished(case), "eval")[-1]
    assert last["top1"] >= 0.98
    assert last["num_samples"] == 900


@pytest.mark.parametrize("case", WHOLE[1:])
def test_accuracy_does_not_depend_on_the_number_of_ranks(finished, case):
    alone = records_of(finished("alone"), "eval")[-1]["top1"]
    assert records_of(finished(case), "eval")[-1]["top1"] == pytest.approx(alone, abs=0.01)


@pytest.mark.parametrize("case", CASES)
def test_the_first_epoch_is_the_same_on_every_number_of_ranks(finished, case):
    """Before rounding grows, the loss of the global batch agrees to many digits."""
    alone = records_of(finished("alone"), "train")[0]
    found = records_of(finished(case), "train")[0]
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_the_run_folder_holds_what_it_should(finished):
    folder = finished("mpirun-2")
    train = records_of(folder, "train")
    assert train[0].keys() == {
        "kind",
        "step",
        "epoch",
        "samples",
        "loss",
        "lr",
        "images_per_second",
        *(f"{part}_seconds" for part in PARTS),
        "step_seconds",
        "rank_data_seconds",
        "rank_busy_seconds",
        "critical_batch",
        "unix_seconds",
    }
    assert all(len(r[f"rank_{what}_seconds"]) == 2 for r in train for what in ("data", "busy"))
    assert [r["step"] for r in train] == list(range(10, 201, 10))
    assert train[4] | {"step": 50, "epoch": 5.0, "samples": 51_200} == train[4]
    assert train[4]["lr"] == pytest.approx(32.0 * 49 / 50)
    assert train[-1]["lr"] == pytest.approx(32.0 * (1 / 150) ** 2)
    for record in train:
        parts = [record[f"{part}_seconds"] for part in PARTS]
        assert all(part > 0 for part in parts)
        assert sum(parts) < record["step_seconds"]
    evaluations = records_of(folder, "eval")
    wanted = {"kind", "step", "epoch", "loss", "top1", "top5", "num_samples", "unix_seconds"}
    assert evaluations[0].keys() == wanted
    assert len(evaluations) == 20
    # A machine that is busy may make one of the ranks a straggler.
    told = [r for r in records_of(folder, "event") if r["event"] != "straggler"]
    events = [(r["event"], r["step"]) for r in told]
    assert events == [("start", 0)] + [("checkpoint", s) for s in (50, 100, 150, 200)] + [
        ("stop", 200)
    ]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["backend"] == "horovod"
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0] or (
        environment["versions"]["torch"] == torch.__version__
    )
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert steps[-2:] == ["step-00000150", "step-00000200"]
    assert len(steps) <= 3  # and the best, where it is older
    assert (folder / "checkpoints/latest").read_text() == "step-00000200\n"


@pytest.mark.parametrize(("launcher", "ranks"), [(None, 1), ("mpirun", 3), ("horovodrun", 2)])
def test_eval_gives_what_training_logged(finished, launcher, ranks):
    folder = finished("mpirun-4")
    if launcher is None:
        code, output = hvd_lars("eval", folder)
    else:
        program = warm_python("-m", "hvd_lars", "eval", str(folder))
        result = run_here(launcher, ranks, program, HANG_GUARD)
        code, output = result.returncode, result.stdout
    assert code == 0, output
    found = json.loads(output[output.index("{") : output.index("}") + 1])
    logged = records_of(folder, "eval")[-1]
    assert found["top1"] == logged["top1"]
    assert found["top5"] == logged["top5"]
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert found["num_samples"] == 900


def test_the_resolved_config_repeats_the_run(finished, tmp_path):
    options = ["train.duration=12 steps", "schedule.warmup_duration=3 steps", "train.threads=1"]
    losses = []
    for name in ("one", "two"):
        code, output = hvd_lars(
            "train", finished("alone") / "config.yaml", f"run.dir={tmp_path / name}", *options
        )
        assert code == 0, output
        losses.append([r["loss"] for r in records_of(tmp_path / name, "train")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "none left"])
def test_a_damaged_checkpoint_is_named(finished, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished("alone"), folder)
    file = folder / "checkpoints/step-00000200/state.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        shutil.rmtree(folder / "checkpoints")
    code, output = hvd_lars("eval", folder)
    if damage != "none left":  # the one before is taken, and that is told …
        assert code == 0, output
        assert "damaged" in output and "; using " in output
        for path in (folder / "checkpoints").glob("step-*"):
            if path.name != "step-00000200":
                shutil.rmtree(path)
        code, output = hvd_lars("eval", folder)  # … while there is one
    assert code == 2
    assert len(output.splitlines()) == 1, output
    assert "damaged" in output or "no checkpoint" in output
    assert "checkpoints" in output


def test_torchvision_model_on_synthetic_data_trains_over_two_ranks_of_mpi4py(tmp_path):
    config = tmp_path / "resnet.yaml"
    config.write_text("""
run: {name: resnet}
data: {name: synthetic, num_train: 24, num_eval: 10, num_classes: 4}
model: {name: resnet18}
comm: {backend: mpi}
schedule: {base_lr: 2.0, warmup: constant, warmup_start_lr: 0.5, warmup_duration: 1 steps}
train: {duration: 3 steps, global_batch: 8, micro_batch: 2, log_every: 1 steps}
""")
    program = warm_python("-m", "hvd_lars", "train", str(config), f"run.dir={tmp_path / 'run'}")
    result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    train = records_of(tmp_path / "run", "train")
    assert [r["lr"] for r in train] == pytest.approx([0.5, 2.0, 0.5])
    assert records_of(tmp_path / "run", "eval")[-1]["num_samples"] == 10


def test_an_image_folder_trains_and_evaluates_over_two_ranks_with_workers(tmp_path):
    root = make_folder(tmp_path / "images", train=12, val=5)
    config = tmp_path / "folder.yaml"
    config.write_text(f"""
data: {{name: imagefolder, root: {root}, image_size: 32, eval_resize: 36, workers: 1}}
model: {{name: resnet18}}
optimizer: {{weight_decay: 1.0e-4}}
schedule: {{base_lr: 4.0, warmup: gradual, warmup_duration: 1 epochs}}
train:
  {{duration: 3 epochs, global_batch: 12, micro_batch: 4, log_every: 1 steps, label_smoothing: 0.1,
    eval_every: 3 epochs}}
""")
    run = tmp_path / "run"
    environment = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    program = warm_python("-m", "hvd_lars", "train", str(config), f"run.dir={run}")
    result = run_here("mpirun", 2, program, HANG_GUARD, environment)
    assert result.returncode == 0, result.stdout
    logged = records_of(run, "eval")[-1]
    assert logged["num_samples"] == 15
    assert len(records_of(run, "train")) == 9
    assert len(list((tmp_path / "cache/hvd_lars/listings").iterdir())) == 1
    code, output = hvd_lars("eval", run, "data.workers=0")
    assert code == 0, output
    assert json.loads(output)["top1"] == logged["top1"]


def test_a_bad_image_ends_both_ranks_with_its_path(tmp_path):
    root = make_folder(tmp_path / "images", train=12, val=5)
    (root / "train/cat/3.png").write_bytes(b"no image")
    options = [f"data={{name: imagefolder, root: {root}, image_size: 32, eval_resize: 36}}"]
    options += ["data.workers=1", "model.name=resnet18", "train.global_batch=12"]
    options += [f"run.dir={tmp_path / 'run'}", "train.duration=3 epochs"]
    options += ["schedule.warmup_duration=1 epochs", "comm.backend=mpi"]
    options += ["train.eval_every=3 epochs"]
    program = warm_python("-m", "hvd_lars", "train", "digits", *options)
    result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 2, result.stdout
    line = f"{root}/train/cat/3.png: not a readable image"
    said = f"data.max_bad_fraction: 1 of 36 training images cannot be read, such as {line}"
    assert said in result.stdout
    assert "Traceback" not in result.stdout
    # … unless some may be bad; both ranks meet this one in the course of three epochs.
    program += [f"run.dir={tmp_path / 'other'}", "data.max_bad_fraction=0.1"]
    result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    assert result.stdout.count(f"{line}: of no known format: another takes its place") == 1
    events = [r for r in records_of(tmp_path / "other", "event") if r["event"] == "replaced"]
    assert [event["image"].partition(": ")[0] for event in events] == [f"{root}/train/cat/3.png"]


def test_shards_train_over_two_ranks_with_all_that_happens_to_images(tmp_path):
    """pack → train (mixing, resizing by epoch, an average, synchronous BatchNorm) → eval."""
    root = make_folder(tmp_path / "images", train=12, val=5)
    code, output = hvd_lars("pack", root, tmp_path / "shards", "--shard-samples=10")
    assert code == 0, output
    config = tmp_path / "shards.yaml"
    config.write_text(f"""
data:
  name: shards
  root: {tmp_path / "shards"}
  cache_dir: {tmp_path / "node"}
  image_size: 32
  eval_resize: 36
  workers: 1
  expect: {{train: 36, eval: 15, classes: 3}}
  augment: {{mixup: 0.2, cutmix: 1.0, trivial_augment: true, random_erasing: 0.5}}
  progressive: [{{epoch: 0, image_size: 24}}, {{epoch: 1, image_size: 32}}]
model: {{name: resnet18, zero_init_last_gamma: true, bn_sync_ranks: 2, ema_decay: 0.9}}
schedule: {{base_lr: 2.0, warmup: gradual, warmup_duration: 1 epochs}}
train:
  {{duration: 2 epochs, global_batch: 12, micro_batch: 4, log_every: 1 steps, eval_every: 2 epochs}}
""")
    run = tmp_path / "run"
    program = warm_python("-m", "hvd_lars", "train", str(config), f"run.dir={run}")
    result = run_here("horovodrun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    assert "average's top-1" in result.stdout
    logged = records_of(run, "eval")[-1]
    assert logged["num_samples"] == 15
    (copy,) = (tmp_path / "node").iterdir()
    assert len(list(copy.glob("*.tar"))) == 6
    code, output = hvd_lars("eval", run, "data.cache_dir=null", "data.workers=0")
    assert code == 0, output
    found = json.loads(output)
    assert (found["top1"], found["ema_top1"]) == (logged["top1"], logged["ema_top1"])
    assert found["ema_loss"] == pytest.approx(logged["ema_loss"], rel=1e-5)
    fine_tune = [f"model.init_from={run}", f"run.dir={tmp_path / 'tuned'}", "data.workers=0"]
    code, output = hvd_lars("train", config, *fine_tune, "model.bn_sync_ranks=1")
    assert code == 0, output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=/no/such", "data.root: /no/such: neither dataset.json nor shards"),
        ("model.bn_sync_ranks=3", "model.bn_sync_ranks: found 3; it must divide the 2 ranks"),
        ("model.init_from=/no/such.pth", "model.init_from: /no/such.pth: cannot be read"),
        ("data.expect={train: 9, eval: 9, classes: 3}", "has 36 + 15 images of 3 classes; 9 + 9"),
        ("train.micro_batch=1", "train.micro_batch: found 1; mixup and cutmix need 2 or more"),
    ],
)
def test_mistakes_about_shards_and_networks_end_both_ranks(packed, tmp_path, override, message):
    options = ["data.name=shards", f"data.root={packed}", "data.image_size=32", "data.workers=0"]
    options += ["data.eval_resize=32", "data.augment.mixup=0.2", "model.name=resnet18"]
    options += ["train.global_batch=12", "train.duration=3 epochs", f"run.dir={tmp_path / 'run'}"]
    options += ["schedule.warmup_duration=1 epochs", "comm.backend=mpi", override]
    program = warm_python("-m", "hvd_lars", "train", "digits", *options)
    result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 2, result.stdout
    lines = [line for line in result.stdout.splitlines() if "hvd-lars: " in line]
    assert all(message in line for line in lines), result.stdout
    assert lines
    assert "Traceback" not in result.stdout
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small folder as shards."""
    folder = tmp_path_factory.mktemp("packed")
    root = make_folder(folder / "images", train=12, val=5)
    code, output = hvd_lars("pack", root, folder / "shards")
    assert code == 0, output
    return folder / "shards"
