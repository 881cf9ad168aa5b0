"""Starting from the files that people have, and refusing those of another network."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from hvd_lars import LARS
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.errors import UserError
from hvd_lars.models import build_model, load_weights
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.progress import Progress
from hvd_lars.state.run_state import RunState


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other_weights(state):
    """Of the same names, and other values."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def run_of(model, folder):
    checkpointer = Checkpointer(folder / "checkpoints", LocalCommunicator())
    optimizer = LARS(model.parameters())
    checkpointer.save(RunState(build_model("resnet18", 5), optimizer, None, Progress(step=9)))
    checkpointer.save(RunState(model, optimizer, None, Progress(step=10)))


def hub_folder(state, folder):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")


NAMESPACE = argparse.Namespace(lr=0.1, out=Path("x"), best=np.float64(0.7))
# How a file is made from a model's state and path, and what is said of it.
FORMS = {
    "bare": (lambda m, s, p: torch.save(s, p), ""),
    "legacy": (lambda m, s, p: torch.save(s, p, _use_new_zipfile_serialization=False), ""),
    "nested": (lambda m, s, p: torch.save({"state_dict": s, "epoch": 3}, p), "its key state_dict"),
    "parallel": (
        lambda m, s, p: torch.save({"model": prefixed("module.", s)}, p),
        "its key model; prefix module. removed",
    ),
    "compiled": (
        lambda m, s, p: torch.save(prefixed("_orig_mod.", s), p),
        "names of wrappers removed",
    ),
    "lightning": (
        lambda m, s, p: torch.save(
            {
                "state_dict": prefixed("model.", s) | {"criterion.weight": torch.ones(3)},
                "hyper_parameters": {"lr": 1},
            },
            p,
        ),
        "prefix model. removed",
    ),
    "lightning.safetensors": (lambda m, s, p: save_file(prefixed("model.", s), p), "prefix model."),
    "all.safetensors": (
        lambda m, s, p: save_file(prefixed("module.model._orig_mod.", s), p),
        "prefix module.model. removed",
    ),
    "dictionary in dictionary": (
        lambda m, s, p: torch.save({"net": {"model_state_dict": s}, "optimizer": {}}, p),
        "its key net; from its key model_state_dict",
    ),
    "average alone": (lambda m, s, p: torch.save({"model_ema": s}, p), "its key model_ema"),
    "average beside": (
        lambda m, s, p: torch.save({"ema": other_weights(s), "model": s}, p),
        "its key model (beside ema)",
    ),
    "self-supervised": (
        lambda m, s, p: torch.save(
            {
                "state_dict": prefixed("module.encoder_q.", s)
                | prefixed("module.encoder_k.", other_weights(s))
                | {"module.queue": torch.ones(2, 3)}
            },
            p,
        ),
        "prefix module.encoder_q. removed",
    ),
    "arguments": (
        lambda m, s, p: torch.save({"model": s, "args": NAMESPACE, "scaler": {"scale": 1.0}}, p),
        "its key model",
    ),
    "whole module": (lambda m, s, p: torch.save({"model": m}, p), "its key model"),
    "half": (lambda m, s, p: torch.save({n: halved(t) for n, t in s.items()}, p), ""),
    "run": (lambda m, s, p: run_of(m, p), "an hvd-lars checkpoint"),
    "hub": (lambda m, s, p: hub_folder(s, p), ""),
    "ours.safetensors": (lambda m, s, p: save_file(s, p), ""),
    "safetensors by another name.bin": (lambda m, s, p: save_file(s, p), ""),
}


def halved(tensor):
    return tensor.half() if tensor.is_floating_point() else tensor


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(1)
    return build_model("resnet18", 5)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_taken_from_what_people_have(resnet, form, tmp_path):
    save, said = FORMS[form]
    save(resnet, resnet.state_dict(), tmp_path / form)
    other = build_model("resnet18", 5)
    taken = load_weights(other, str(tmp_path / form), 5)
    assert (taken.count, taken.left) == (122, {})
    assert taken.lines()[0].startswith("122 of the network's 122 tensors loaded")
    assert said in taken.lines()[0]
    for found, wanted in zip(
        other.state_dict().values(), resnet.state_dict().values(), strict=True
    ):
        wanted = halved(wanted).to(wanted.dtype) if form == "half" else wanted
        assert torch.equal(found, wanted)


def test_what_stands_beside_the_network_is_named(resnet, tmp_path):
    FORMS["self-supervised"][0](resnet, resnet.state_dict(), tmp_path / "x")
    taken = load_weights(build_model("resnet18", 5), str(tmp_path / "x"), 5)
    assert len(taken.unused["outside the network"]) == 123
    assert "outside the network): module.encoder_k.conv1.weight, " in taken.lines()[1]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("squeezenet1_1", "classifier.1"),  # a convolution
        ("mobilenet_v3_small", "classifier.3"),
        ("vit_b_16", "heads.head"),
        ("timm/convnext_atto", "head.fc"),
        ("timm/mobilenetv3_small_050", "classifier"),
    ],
)
def test_a_head_of_another_width_stays_as_it_starts(name, head, tmp_path):
    model, other = build_model(name, 6), build_model(name, 9)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    fresh = other.get_submodule(head).weight.detach().clone()
    taken = load_weights(other, str(tmp_path / "w.pth"), 9)
    why = "the file has a head of another width"
    assert taken.left == {why: (f"{head}.weight", f"{head}.bias")}
    assert f"left as initialised ({why}): {head}.weight, {head}.bias" in taken.lines()
    assert torch.equal(other.get_submodule(head).weight, fresh)
    assert torch.equal(next(other.parameters()), next(model.parameters()))


@pytest.mark.parametrize(
    ("name", "head", "extra"),
    [
        ("resnet18", "fc.", {}),
        ("resnet18", "fc.", {"projector.0.weight": torch.ones(2, 2)}),
        ("vgg11", "classifier.", {}),
        ("timm/convnext_atto", "head.", {}),
    ],
)
def test_a_backbone_without_its_head_is_enough(name, head, extra, tmp_path):
    model, other = build_model(name, 6), build_model(name, 6)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(head)}
    torch.save(state | extra, tmp_path / "w.pth")
    taken = load_weights(other, str(tmp_path / "w.pth"), 6)
    assert taken.count == len(state)
    assert set(taken.left["not in the file"]) == set(model.state_dict()) - set(state)
    assert taken.unused == (
        {"a head that the network does not have": tuple(extra)} if extra else {}
    )
    assert torch.equal(next(other.parameters()), next(model.parameters()))


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_torchvisions_files_with_auxiliary_heads(name, tmp_path):
    theirs = torchvision.models.get_model(name, num_classes=7, init_weights=False)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = build_model(name, 7)
    taken = load_weights(ours, str(tmp_path / "w.pth"), 7)
    assert taken.left == {}
    assert all(n.startswith(("AuxLogits", "aux")) for n in taken.unused["auxiliary heads"])
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key])


def test_old_names_of_densenet_and_of_vit(tmp_path):
    for name, renames in (
        ("densenet121", [(".norm1.", ".norm.1."), (".norm2.", ".norm.2."), (".conv1.", ".conv.1."),
                         (".conv2.", ".conv.2.")]),
        ("vit_b_32", [(".mlp.0.", ".mlp.linear_1."), (".mlp.3.", ".mlp.linear_2.")]),
    ):  # fmt: skip
        model, other = build_model(name, 4), build_model(name, 4)
        old = {}
        for key, tensor in model.state_dict().items():
            if "denselayer" in key or "encoder_layer" in key:
                for new, before in renames:
                    key = key.replace(new, before)
            old[key] = tensor
        assert old.keys() != model.state_dict().keys()
        torch.save({k: t for k, t in old.items() if "num_batches" not in k}, tmp_path / "w.pth")
        taken = load_weights(other, str(tmp_path / "w.pth"), 4)
        assert "old names updated" in taken.lines()[0]
        for found, wanted in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(found, wanted)


def run(text):
    raise AssertionError(text)


class Evil:
    def __reduce__(self):
        return (run, ("code in the file was run",))


class Odd:
    """Of a class that takes arguments when it is unpickled."""

    def __reduce__(self):
        return (Odd, (), {"a": 1})


def test_code_in_a_file_is_not_run(resnet, tmp_path):
    torch.save({"state_dict": resnet.state_dict(), "args": [Evil(), Odd()]}, tmp_path / "evil.pth")
    other = build_model("resnet18", 5)
    assert load_weights(other, str(tmp_path / "evil.pth"), 5).count == 122
    legacy = {"_use_new_zipfile_serialization": False}
    torch.save(
        {"state_dict": resnet.state_dict(), "args": NAMESPACE}, tmp_path / "old.pth", **legacy
    )
    with pytest.raises(UserError, match="it holds objects beside tensors; convert it where it was"):
        load_weights(other, str(tmp_path / "old.pth"), 5)


def broken(tmp_path, model):
    """Files that cannot be taken, and what is said of them."""
    state = model.state_dict()
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "page.html").write_text("<html>not found</html>")
    torch.save(state | {"conv1.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    torch.save(state | {"conv1.weight": state["conv1.weight"].to_sparse()}, tmp_path / "sparse.pth")
    torch.save(build_model("resnet18", 5).state_dict(), tmp_path / "smaller.pth")
    torch.save(build_model("resnet50", 5).state_dict(), tmp_path / "larger.pth")
    torch.save(build_model("vgg11", 5).state_dict(), tmp_path / "vgg.pth")
    torch.save(timm.create_model("resnet34d", num_classes=5).state_dict(), tmp_path / "cousin.pth")
    torch.save({"fc.weight": state["fc.weight"]}, tmp_path / "head.pth")
    (tmp_path / "text.pth").write_text("100 years")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "vgg.pth").read_bytes()[:5000])
    torch.save({n: t.to("meta") for n, t in state.items()}, tmp_path / "meta.pth")
    torch.save(state | {"fc.bias": torch.full((5,), torch.nan)}, tmp_path / "nan.pth")
    return (
        ("/no/such.pth", "/no/such.pth: cannot be read: No such file"),
        (tmp_path / "evil.pth", "evil.pth: no readable weights"),
        (tmp_path / "torn.safetensors", "torn.safetensors: no readable weights"),
        (tmp_path / "list.pth", "list.pth: no state dict in it"),
        (tmp_path / "empty.pth", "empty.pth: no state dict in it"),
        (tmp_path / "page.html", "page.html: no readable weights"),
        (tmp_path / "shape.pth", r"conv1.weight is \(3,\), the model has \(64, 3, 7, 7\)"),
        (
            tmp_path / "sparse.pth",
            "conv1.weight is torch.float32, torch.sparse_coo; a plain",
        ),
        (tmp_path / "smaller.pth", "is not in the file; the file is of another model"),
        (tmp_path / "larger.pth", "is not in the model; the file is of another model"),
        (tmp_path / "vgg.pth", "is not in the file; the file is of another model"),
        (tmp_path / "cousin.pth", "the file is of another model"),
        (tmp_path / "head.pth", "is not in the file; the file is of another model"),
        (tmp_path / "text.pth", "no readable weights: torch.save did not write it, or it is damag"),
        (tmp_path / "cut.pth", "no readable weights: torch.save did not write it, or it is damag"),
        (tmp_path / "meta.pth", "is without values; a plain tensor of real numbers is needed"),
        (tmp_path / "nan.pth", "fc.bias holds values that are not a number"),
        (tmp_path, "no checkpoint in it, nor model.safetensors"),
    )


def test_weights_that_cannot_be_taken_change_nothing(tmp_path):
    other = build_model("resnet34", 5)
    before = [p.clone() for p in other.parameters()]
    for path, message in broken(tmp_path, other):
        with pytest.raises(UserError, match=message) as caught:
            load_weights(other, str(path), 5)
        assert str(caught.value).startswith("model.init_from: ")
        assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(b, p) for b, p in zip(before, other.parameters(), strict=True))


def test_a_network_of_one_part_keeps_its_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert load_weights(other, str(tmp_path / "w.pth"), 2).count == 4
    assert torch.equal(other[0].weight, model[0].weight)
