"""A run's weights in the hands of torchvision, timm and onnxruntime, and checkpoints by name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from commands import hvd_lars, records_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_image_folder import make_folder, source_of

from hvd_lars.assemble.evaluation import evaluate_run
from hvd_lars.assemble.export import export
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.config.file import load_config
from hvd_lars.data.source import Request
from hvd_lars.errors import UserError
from hvd_lars.launchers.environment import ALONE
from hvd_lars.state.run_folder import config_of

CLASSES = ("ant", "bee", "cat")


def train(root, images, model, *options):
    code, output = hvd_lars(
        "train", "digits", f"run.dir={root}",
        f"data={{name: imagefolder, root: {images}, image_size: 64, eval_resize: 72, workers: 0}}",
        f"model={{name: {model}, ema_decay: 0.5}}", "train.global_batch=12", "schedule.base_lr=0.5",
        "train.micro_batch=12", "train.duration=6 steps", "schedule.warmup_duration=1 steps",
        "train.eval_every=2 steps", "checkpoint.every=1 steps", "checkpoint.keep_last=9", *options,
    )  # fmt: skip
    assert code == 0, output
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("export") / "images", train=12, val=5, size=(80, 80))


@pytest.fixture(scope="module")
def run(images):
    return train(images.parent / "run", images, "resnet18")


def evaluated(run, which="latest"):
    config = load_config(config_of(run))
    plain, average = evaluate_run(run, config, LocalCommunicator(), ALONE, str(which))
    return plain.record() | ({} if average is None else average.record("ema_"))


def exported(run, output, average=False):
    export(run, load_config(config_of(run)), output, "latest", average)
    return output


def pixels_of(images):
    """The test images as the network is shown them, and their labels."""
    listed = source_of(images, sides=(64, 72))
    indices = np.arange(15)
    return listed.on_device(*listed.eval_batch(indices), Request(None, indices))


def measured(logits, labels):
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("average", [False, True])
def test_torchvision_loads_it_and_measures_the_same(run, images, tmp_path, kind, average):
    path = exported(run, tmp_path / f"w.{kind}", average)
    if kind == "pth":
        state = torch.load(path, weights_only=True)
        facts = state.hvd_lars
    else:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            facts = {key: json.loads(text) for key, text in file.metadata().items()}
    assert (facts["model"], facts["classes"], facts["step"]) == ("resnet18", list(CLASSES), 6)
    assert (facts["mean"], facts["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (facts["image_size"], facts["eval_resize"]) == (64, 72)
    assert ("top1" in facts) == (not average)  # it is of the plain weights
    model = torchvision.models.resnet18(num_classes=3)
    model.load_state_dict(state)
    pixels, labels = pixels_of(images)
    with torch.no_grad():
        loss, top1 = measured(model.eval()(pixels), labels)
    wanted = evaluated(run)
    prefix = "ema_" if average else ""
    assert loss == pytest.approx(wanted[f"{prefix}loss"], rel=1e-4)
    assert top1 == pytest.approx(wanted[f"{prefix}top1"])


def test_timm_loads_its_own(images, tmp_path):
    run = train(tmp_path / "run", images, "timm/resnet10t")
    state = torch.load(exported(run, tmp_path / "w.pth"), weights_only=True)
    model = timm.create_model("resnet10t", num_classes=3)
    model.load_state_dict(state)
    pixels, labels = pixels_of(images)
    with torch.no_grad():
        loss, _ = measured(model.eval()(pixels), labels)
    assert loss == pytest.approx(evaluated(run)["loss"], rel=1e-4)


def test_onnxruntime_gives_the_same_for_any_number_of_images(run, images, tmp_path):
    path = tmp_path / "m.onnx"
    code, output = hvd_lars("export", run, "-o", path, "--onnx")
    assert (code, output) == (0, f"{path}: 122 tensors of resnet18 after step 6\n")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list(CLASSES)
    pixels, labels = pixels_of(images)
    for count in (1, 15):
        (logits,) = session.run(["logits"], {"images": pixels[:count].numpy()})
        assert logits.shape == (count, 3)
    loss, _ = measured(torch.from_numpy(logits), labels)
    assert loss == pytest.approx(evaluated(run)["loss"], rel=1e-4)


def test_the_page_of_the_documentation_runs_as_it_stands(run, images, tmp_path):
    page = (Path(__file__).parent.parent.parent / "docs/export.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for kind in ("pth", "safetensors"):
        exported(run, tmp_path / f"weights.{kind}")
    Image.open(images / "val/cat/0.JPEG").convert("RGB").save(tmp_path / "photo.jpg")
    for program in programs:
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() in (*CLASSES, "")
    assert len(programs) == 2


def test_checkpoints_by_name(run):
    evaluations = {r["step"]: r for r in records_of(run, "eval")}
    best = max(evaluations, key=lambda step: evaluations[step]["top1"])
    for which, step in (
        ("latest", 6), ("best", best), ("4", 4), ("step-00000002", 2),
        (run / "checkpoints/step-00000004", 4),
    ):  # fmt: skip
        found = evaluated(run, which)
        assert found["loss"] == pytest.approx(evaluations[step]["loss"], rel=1e-5), which
        assert found["ema_top1"] == evaluations[step]["ema_top1"]
    code, output = hvd_lars("eval", run, "--checkpoint", "2")
    assert code == 0, output
    assert json.loads(output)["loss"] == pytest.approx(evaluations[2]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("eval", ["--checkpoint", "99"], "has steps 1, 2, 3, 4, 5, 6"),
        ("export", ["-o", "w.bin"], "-o: w.bin: found '.bin'; allowed: .safetensors, .pth"),
        ("export", ["-o", "/no/such/w.pth"], "/no/such/w.pth: cannot be written: No such file"),
        ("export", ["-o", "w.pth", "--onnx"], "--onnx: -o w.pth: must end in .onnx"),
        ("export", ["-o", "w.pth", "--checkpoint", "x"], "latest, best, a step, or a path"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(
    run, tmp_path, command, options, message
):
    code, output = hvd_lars(command, run, *options, cwd=tmp_path)
    assert code == 2, output
    assert message in output
    assert len(output.splitlines()) == 1, output
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_network_is_refused(run, images, tmp_path):
    other = train(tmp_path / "other", images, "squeezenet1_1")
    with pytest.raises(UserError, match="step-00000004: .* does not fit the run's model"):
        path = str(other / "checkpoints/step-00000004")
        export(run, load_config(config_of(run)), tmp_path / "w.pth", path, False)
    assert not (tmp_path / "w.pth").exists()


def test_a_run_without_an_average_has_none_to_export(tmp_path):
    steps = ["train.duration=2 steps", "schedule.warmup_duration=1 steps"]
    code, output = hvd_lars("train", "digits", f"run.dir={tmp_path / 'run'}", *steps)
    assert code == 0, output
    code, output = hvd_lars("export", tmp_path / "run", "-o", tmp_path / "w.pth", "--average")
    assert code == 2
    assert "has no average; model.ema_decay keeps one" in output
    state = torch.load(exported(tmp_path / "run", tmp_path / "w.pth"), weights_only=True)
    assert state.hvd_lars["classes"] == [str(i) for i in range(10)]
    assert 0 < state.hvd_lars["mean"][0] < 1
