"""``hvd-lars check``: plans, memory and warnings, for one config and for all."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch.test_training import hvd_lars
from test_image_folder import make_folder
from torch import nn

from hvd_lars.assemble import sizes
from hvd_lars.cli.check import check, curve, parse_bytes
from hvd_lars.config.file import bundled_configs, load_config
from hvd_lars.data.shards.writer import pack
from hvd_lars.errors import UserError
from hvd_lars.models import build_model
from hvd_lars.models.footprint import footprint


def planned(capsys, *arguments, ranks=64, memory=None):
    assert check([arguments[0]], list(arguments[1:]), ranks, memory, as_json=True) == 0
    return json.loads(capsys.readouterr().out)


def test_every_bundled_config_can_be_planned_without_its_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = list(bundled_configs())
    assert check(names, [], 64, "80GB", as_json=True) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["config"] for answer in answers] == names
    for answer in answers:
        name = answer["config"]
        config = load_config(name)
        assert answer["global_batch"] == config.train.global_batch
        assert answer["ranks"] == 64
        assert answer["accumulation"] * answer["largest_micro_batch"] * 64 >= answer["global_batch"]
        if name.startswith(("alexnet", "resnet50")):
            assert answer["num_train"] == 1_281_167
            assert config.recipe.source
            assert config.recipe.obtained
            assert any("is not here: planned for the 1,281,167" in note for note in answer["notes"])
        assert not any("GB a rank are estimated" in line for line in answer["warnings"])


def test_a_plan_of_goyals_recipe(capsys):
    plan = planned(capsys, "resnet50-goyal-b8192", ranks=256)
    assert plan["steps_per_epoch"] == 156
    assert plan["intervals"]["total"] == 90 * 156
    assert plan["lr"]["after warmup"] == pytest.approx(3.2)
    assert plan["lr"]["start"] == pytest.approx(0.1)
    assert plan["lr"]["last step"] == pytest.approx(0.0032)
    assert plan["accumulation"] == 1
    groups = plan["optimizer_groups"]
    assert [g["adapt"] for g in groups] == ["none", "none"]
    assert [g["weight_decay"] for g in groups] == [1e-4, 0.0]
    assert sum(g["parameters"] for g in groups) == 25_557_032
    assert plan["memory_bytes"]["gradients"] == 4 * 25_557_032


def test_what_leaves_the_recipe_is_told(capsys):
    plan = planned(
        capsys,
        "resnet50-lars-b8192",
        "schedule.base_lr=3",
        "train.micro_batch=16",
        "data.augment.mixup=0.2",
        "data.root=/elsewhere",
    )
    changes = [line for line in plan["warnings"] if "in place of" in line]
    assert changes.pop() == "BatchNorm spans 16 samples in place of the recipe's 128"
    assert changes == [
        "data.augment.mixup is 0.2 in place of the recipe's 0.0",
        "schedule.base_lr is 3.0 in place of the recipe's 12.8",
    ]


def test_a_device_that_is_too_small_is_told_with_what_would_fit(capsys):
    def plan(size):
        options = [f"train.micro_batch={size}", f"train.global_batch={size}", "schedule.end_lr=0"]
        return planned(capsys, "resnet50-lars-b32768", *options, ranks=1, memory="16GB")

    (line,) = [line for line in plan(512)["warnings"] if "estimated" in line]
    fitting = int(line.partition("train.micro_batch=")[2].split()[0])
    assert plan(fitting)["memory_bytes_total"] <= 16e9 < plan(fitting + 1)["memory_bytes_total"]
    assert not any("estimated" in line for line in plan(fitting)["warnings"])
    for text in ("lots", "80", "-1GB"):
        with pytest.raises(UserError, match=f"--device-memory: found '{text}'"):
            check(["digits"], [], 1, text, as_json=False)


def test_the_span_of_batch_norm_is_watched(capsys):
    def spans(*options):
        warnings = planned(capsys, "resnet50-mlperf-b32768", *options)["warnings"]
        return [line for line in warnings if line.startswith("BatchNorm spans")]

    assert spans() == []
    assert spans("train.micro_batch=16") == [
        "BatchNorm spans 16 samples in place of the recipe's 128"
    ]
    assert spans("train.micro_batch=16", "model.bn_sync_ranks=8") == []


ONE_PIXEL = ["data={name: synthetic, image_size: 32}", "model.name=resnet18"]  # at the last block
SHORT = ["train.duration=2 steps", "schedule.warmup_duration=1 steps"]


@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        (["train.global_batch=9", "train.micro_batch=4"], 3, None),
        (
            ["train.global_batch=9", "train.micro_batch=2"],
            2,
            "9 samples over 2 ranks (accumulation 3)",
        ),
        (
            ["train.global_batch=8", "train.micro_batch=4"],
            8,
            "8 samples over 8 ranks (accumulation 1)",
        ),
        (
            ["train.global_batch=5", "train.micro_batch=1"],
            1,
            "5 samples over 1 rank (accumulation 5)",
        ),
        (["train.global_batch=8", "train.micro_batch=4", "model.bn_sync_ranks=8"], 8, None),
        (["train.global_batch=8", "train.micro_batch=4", "data.image_size=64"], 8, None),
        (["train.global_batch=8", "train.micro_batch=4", "model.name=squeezenet1_1"], 8, None),
    ],
)
def test_a_micro_batch_of_one_sample_is_refused_where_batch_norm_cannot_take_it(
    capsys, options, ranks, said
):
    arguments = ["digits", *ONE_PIXEL, *SHORT, *options]
    if said is None:
        assert planned(capsys, *arguments, ranks=ranks)["ranks"] == ranks
        return
    with pytest.raises(UserError) as caught:
        planned(capsys, *arguments, ranks=ranks)
    assert str(caught.value).startswith(f"digits: train.micro_batch: {said}")
    assert str(caught.value).endswith(
        ") leave a micro-batch of 1 sample, which the BatchNorm layer4.0.bn1 cannot normalise; "
        "choose train.global_batch or train.micro_batch so that each has 2 or more"
    )


def test_shards_in_place_of_the_folder_are_no_departure(capsys, tmp_path):
    options = ["data.name=shards", f"data.root={tmp_path / 'absent'}"]
    plan = planned(capsys, "alexnet-bn-lars-b8192", *options, ranks=32)
    assert not [line for line in plan["warnings"] if "in place of" in line]
    assert plan["num_train"] == 1_281_167  # what is expected goes with the images


def test_check_takes_what_overrides_complete_and_copies_nothing(capsys, tmp_path):
    root = make_folder(tmp_path / "images", train=4, val=2)
    pack(str(root), tmp_path / "shards", 1, 100, lambda *_: None)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data: {{name: shards, cache_dir: {tmp_path / 'node'}, image_size: 32, eval_resize: 32}}\n"
        "model: {name: resnet18}\nschedule: {base_lr: 1}\n"
        "train: {duration: 1 epochs, global_batch: 4}\ncheckpoint: {every: 1 epochs}\n"
    )
    arguments = str(config), f"data.root={tmp_path / 'shards'}"
    assert planned(capsys, *arguments, ranks=2)["num_train"] == 12
    assert not (tmp_path / "node").exists()


@pytest.mark.parametrize(
    ("text", "wanted"), [("80GB", 8e10), ("16GiB", 2**34), ("640 MB", 6.4e8), ("1.5T", 1.5e12)]
)
def test_sizes(text, wanted):
    assert parse_bytes(text) == wanted


def test_the_footprint_is_what_autograd_keeps():
    """By hand: ReLU keeps its result, a convolution and a linear layer their input."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    )
    found = footprint(model, (3, 6, 6))
    assert found.parameters == 4 * (4 * 27 + 4 + 10 * 144 + 10)
    # images 108, ReLU's result 144 (the linear layer's input too), log-softmax 10, the label 2·4
    assert found.activations_per_sample == 4 * (108 + 144 + 10) + 8
    assert found.activations(100) - found.activations(50) == 50 * found.activations_per_sample


@pytest.mark.parametrize("name", ["resnet18", "alexnet_bn", "timm/mobilenetv3_small_050"])
def test_the_footprint_on_meta_is_that_of_real_tensors(name):
    torch.manual_seed(0)
    side = 227 if name == "alexnet_bn" else 64
    model = build_model(name, 10)
    wanted = footprint(model, (3, side, side)).activations(3)
    kept = {}
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor
        return tensor

    images = torch.randn(3, 3, side, side)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2]), reduction="sum")
    keep(images)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert found == pytest.approx(wanted, rel=0.02)
    assert loss.item() > 0


def test_the_curve_shows_ramp_and_decay():
    drawn = curve(lambda step: min(step, 20 - step) / 10, 21, width=21)
    assert drawn[0] == drawn[-1] == "▁"
    assert drawn[10] == "█"


def test_one_bad_config_among_good_ones(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("extends: ../no.yaml\n")
    code, output = hvd_lars("check", "digits", bad, "train.duration=7 epochs", "--ranks", "2")
    assert code == 2
    assert "70 of 1,024 samples" in output
    (line,) = [line for line in output.splitlines() if line.startswith("hvd-lars: ")]
    assert "bad.yaml: extends: " in line


@pytest.mark.parametrize("name", ["recipes", "configs"])
def test_generated_pages_are_what_the_package_says(name, monkeypatch):
    docs = Path(__file__).parent.parent / "docs"
    monkeypatch.syspath_prepend(docs)
    page = importlib.import_module(f"make_{name}").page()
    assert (docs / f"{name}.md").read_text() == page


def sizes_in(folder):
    return sorted((folder / "hvd_lars/networks").glob("*.json"))


def test_a_network_is_measured_once_and_then_planned_for_without_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = """
import sys
class Refused:
    def find_spec(self, name, *_):
        if name == "torch" or name.startswith("torch."):
            raise ImportError("torch is not needed here")
if sys.argv[1] == "without":
    sys.meta_path.insert(0, Refused())
from hvd_lars.cli import main
main(["check", "cifar10-lars-b4096", "--ranks", "8"])
"""
    shown = []
    for torch_is in ("there", "without"):
        found = subprocess.run(
            [sys.executable, "-c", program, torch_is], cwd=tmp_path,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        shown.append(found.stdout)
    assert shown[0] == shown[1]
    assert "activations" in shown[0]
    (file,) = sizes_in(tmp_path / "cache")
    assert file.stat().st_size < 1000


def test_a_damaged_cache_of_networks_is_renewed_and_one_that_cannot_be_written_is_none(
    tmp_path, monkeypatch
):
    config = load_config("digits")
    arguments = config.model, config.optimizer, config.data, 10
    monkeypatch.setattr(sizes, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    first = sizes.network_size(*arguments)
    (file,) = sizes_in(tmp_path / "a")
    whole = file.read_text()
    for damage in (whole[:40], "[]", "{}", '{"groups": 3}'):
        file.write_text(damage)
        monkeypatch.setattr(sizes, "_known", {})
        assert sizes.network_size(*arguments) == first
        assert file.read_text() == whole
    (tmp_path / "b").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setattr(sizes, "_known", {})
    assert sizes.network_size(*arguments) == first


def test_a_network_of_the_users_own_is_not_cached(tmp_path, monkeypatch):
    (tmp_path / "ownnet.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, width=8):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = load_config("digits", ["model.name=ownnet:net"])
    found = sizes.network_size(config.model, config.optimizer, config.data, 10)
    assert found.parameters == 4 * (64 * 8 + 8 + 8 * 10 + 10)
    assert not sizes_in(tmp_path / "cache")
