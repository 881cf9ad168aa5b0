"""What recipes change in a network, and starting from somebody's weights."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_loop, tiny_model, tiny_trainer
from torch import nn

from hvd_lars import LARS
from hvd_lars.assemble.network import build_network
from hvd_lars.checkpoint import Checkpointer
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.config import Model
from hvd_lars.config_data import ImageFolderData, Resize, SyntheticData
from hvd_lars.errors import UserError
from hvd_lars.models import batch_norms, build_model, load_weights, zero_last_gammas
from hvd_lars.progress import Progress

CPU = torch.device("cpu")
DATA = SyntheticData(name="synthetic", image_size=64)


@pytest.mark.parametrize(
    ("name", "blocks", "last"),
    [("resnet18", 8, "bn2"), ("resnet50", 16, "bn3"), ("timm/resnet26", 8, "bn3")],
)
def test_resnets_start_as_goyal_says(name, blocks, last):
    torch.manual_seed(0)
    settings = Model(name=name, zero_init_last_gamma=True, fc_sigma=0.01, bn_momentum=0.02)
    model = build_network(settings, DATA, 1000, CPU)
    zero = [key for key, norm in batch_norms(model).items() if not norm.weight.any()]
    assert len(zero) == blocks
    assert all(key.endswith(last) for key in zero)
    assert {norm.momentum for norm in batch_norms(model).values()} == {0.02}
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.fc.bias.any()


def test_torchvisions_resnet50_is_v15():
    block = build_model("resnet50", 10).layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_timm_by_name():
    model = build_network(Model(name="timm/mobilenetv3_small_050"), DATA, 7, CPU)
    assert sum(p.numel() for p in model.parameters()) > 500_000
    with pytest.raises(UserError, match="found 'timm/resnet5'; nearest: timm/resnet"):
        build_model("timm/resnet5", 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "alexnet_bn", "zero_init_last_gamma": True}, "model.zero_init_last_gamma: the"),
        ({"name": "squeezenet1_0", "fc_sigma": 0.1}, "model.fc_sigma: the network has no linear"),
        ({"name": "vgg11", "bn_momentum": 0.1}, "model.bn_momentum: the network has no Batch"),
        ({"name": "alexnet_caffe"}, "alexnet_caffe does not take the 3×64×64 images"),
    ],
)
def test_an_option_that_does_not_fit_the_network(settings, message):
    with pytest.raises(UserError, match=message):
        build_network(Model(**settings), DATA, 10, CPU)


def test_every_size_of_progressive_resizing_is_tried():
    data = ImageFolderData(
        name="imagefolder", root="x", image_size=227, progressive=(Resize(epoch=0, image_size=60),)
    )
    with pytest.raises(UserError, match="alexnet_bn does not take the 3×60×60 images"):
        build_network(Model(name="alexnet_bn"), data, 10, CPU)


@pytest.fixture
def weights(tmp_path):
    """A model and the same weights in every form that is read."""
    model = build_model("resnet18", 5)
    state = model.state_dict()
    paths = {
        "bare": tmp_path / "bare.pth",
        "nested": tmp_path / "nested.pt",
        "parallel": tmp_path / "parallel.pth",
        "safetensors": tmp_path / "w.safetensors",
        "run": tmp_path / "run",
    }
    torch.save(state, paths["bare"])
    torch.save({"state_dict": state, "epoch": 3}, paths["nested"])
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, paths["parallel"])
    save_file(state, paths["safetensors"])
    checkpointer = Checkpointer(paths["run"] / "checkpoints", LocalCommunicator())
    checkpointer.save(build_model("resnet18", 5), LARS(model.parameters()), Progress(step=9))
    checkpointer.save(model, LARS(model.parameters()), Progress(step=10))
    return model, paths


@pytest.mark.parametrize("form", ["bare", "nested", "parallel", "safetensors", "run"])
def test_weights_are_read(weights, form):
    model, paths = weights
    other = build_model("resnet18", 5)
    assert load_weights(other, str(paths[form]), 5) == []
    for found, wanted in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(found, wanted)


def test_a_head_of_another_width_stays_as_it_starts(weights):
    model, paths = weights
    other = build_model("resnet18", 9)
    fresh = other.fc.weight.detach().clone()
    assert load_weights(other, str(paths["bare"]), 9) == ["fc.weight", "fc.bias"]
    assert torch.equal(other.fc.weight, fresh)
    assert torch.equal(other.conv1.weight, model.conv1.weight)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code in the file was run",))


def test_weights_that_cannot_be_taken_change_nothing(weights, tmp_path):
    _, paths = weights
    other = build_model("resnet34", 5)
    before = [p.clone() for p in other.parameters()]
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "page.html").write_text("<html>not found</html>")
    torch.save({**other.state_dict(), "conv1.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    for path, message in (
        (paths["bare"], "is not in the file: it is another model"),
        ("/no/such.pth", "/no/such.pth: cannot be read: No such file"),
        (tmp_path / "evil.pth", "evil.pth: no readable weights"),
        (tmp_path / "torn.safetensors", "torn.safetensors: no readable weights"),
        (tmp_path / "list.pth", "list.pth: no state dict in it"),
        (tmp_path / "page.html", "page.html: no readable weights"),
        (tmp_path / "shape.pth", r"conv1.weight is \(3,\), the model has \(64, 3, 7, 7\)"),
        (tmp_path, "no checkpoint in it"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_weights(other, str(path), 5)
        assert str(caught.value).startswith("model.init_from: ")
        assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(b, p) for b, p in zip(before, other.parameters(), strict=True))


def test_zero_gammas_need_affine_norms():
    class Block(nn.Module):
        bn1 = bn2 = nn.BatchNorm2d(3, affine=False)

    with pytest.raises(UserError, match="no residual blocks"):
        zero_last_gammas(Block())


class Recorder:
    def __init__(self, records):
        self.write = records.append

    def close(self):
        pass


def test_the_average_follows_the_weights_and_is_saved(tmp_path):
    decay = 0.75
    trainer = tiny_trainer(LocalCommunicator(), torch.float64, 1000, norm=True, ema=decay)
    records = []
    loop = tiny_loop(trainer, tmp_path / "checkpoints", sinks=[Recorder(records)])
    step, history = trainer.train_step, []

    def remembering(number, batches):
        loss = step(number, batches)
        history.append([p.detach().clone() for p in trainer.model.parameters()])
        return loss

    trainer.train_step = remembering
    loop.run()
    wanted = history[0]
    for weights in history[1:]:
        wanted = [decay * e + (1 - decay) * w for e, w in zip(wanted, weights, strict=True)]
    for found, value in zip(trainer.average.module.parameters(), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14)
    last = [record for record in records if record["kind"] == "eval"][-1]
    assert last["ema_loss"] != last["loss"]
    from hvd_lars.assemble.training import make_average

    model = tiny_model(torch.float64, seed=9, norm=True)
    average = make_average(model, decay)
    Checkpointer(tmp_path / "checkpoints", LocalCommunicator()).restore(model, average=average)
    for found, value in zip(average.module.parameters(), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14)
    plain = tiny_model(torch.float64, seed=9, norm=True)  # evaluated without its average
    Checkpointer(tmp_path / "checkpoints", LocalCommunicator()).restore(plain)
    assert torch.equal(plain[0].weight, trainer.model[0].weight)
