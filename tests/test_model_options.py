"""What recipes change in a network."""

from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_loop, tiny_model, tiny_trainer
from torch import nn

from hvd_lars.assemble import network
from hvd_lars.assemble.network import build_network
from hvd_lars.assemble.run import build_run
from hvd_lars.comm import detect_launch
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.config.file import load_config
from hvd_lars.config.schema import Model
from hvd_lars.errors import UserError
from hvd_lars.models import batch_norms, build_model, zero_last_gammas
from hvd_lars.models.moving_average import MovingAverage
from hvd_lars.sources.image_folder import ImageFolderData
from hvd_lars.sources.images import Resize
from hvd_lars.sources.synthetic import SyntheticData
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.replicas import broadcast_and_verify
from hvd_lars.state.run_state import RunState

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


def test_a_network_with_several_outputs_is_one_line():
    """GoogLeNet gives logits in evaluation, and more in training."""
    settings = Model(name="googlenet", options={"aux_logits": True, "init_weights": False})
    with pytest.raises(UserError, match="googlenet gives a GoogLeNetOutputs in training; a tensor"):
        build_network(settings, DATA, 10, CPU)


class Odd(nn.Module):
    """Gives what ``kind`` says."""

    def __init__(self, num_classes, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(3, num_classes)
        if kind == "expanded":
            self.register_buffer("places", torch.arange(4.0).expand(2, 4))

    def forward(self, images):
        logits = self.layer(images.mean((2, 3)))
        return (logits, logits) if self.kind == "tuple" else logits

    def get_extra_state(self):
        return {"calls": 3} if self.kind == "state" else None

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tuple", "gives a tuple; a tensor of logits is expected"),
        ("state", "keeps _extra_state, a "),
    ],
)
def test_a_network_of_ones_own_that_cannot_be_trained_is_one_line(kind, message):
    settings = Model(name="test_model_options:Odd", options={"kind": kind})
    with pytest.raises(UserError, match=message):
        build_network(settings, DATA, 10, CPU)


def test_looking_at_the_output_in_training_leaves_nothing_behind():
    """Such as a tensor of another device that forward keeps."""

    class Keeps(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.layer, self.calls, self.kept = nn.LazyLinear(num_classes), [], None

        def forward(self, images):
            self.calls.append(images.device)
            if self.training:
                self.kept = images
            return self.layer(images.flatten(1))

    made = []
    with mock.patch.object(network, "build_model", lambda *_: made.append(Keeps(10)) or made[0]):
        model = build_network(Model(name="resnet18"), DATA, 10, CPU)
    assert model is made[0]
    assert (model.calls, model.kept, model.training) == ([CPU], None, True)


def test_a_network_that_cuts_its_batch_is_built():
    """Two images are one for each of its halves, of which BatchNorm has no statistics."""

    class Halves(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(3), nn.Linear(3, num_classes)

        def forward(self, images):
            means = images.mean((2, 3))
            parts = means.chunk(2) if self.training else [means]
            return self.layer(torch.cat([self.norm(part) for part in parts]))

    with mock.patch.object(network, "build_model", lambda *_: Halves(10)):
        assert build_network(Model(name="resnet18"), DATA, 10, CPU).training


@pytest.mark.ranks(1, 2)
def test_a_buffer_whose_elements_share_memory_is_a_constant(comm, tmp_path):
    """It is neither averaged nor broadcast into, but checkpoints hold it."""
    folder = comm.broadcast_object(tmp_path)
    settings = Model(name="test_model_options:Odd", options={"kind": "expanded"})
    model = build_network(settings, DATA, 10, CPU)
    state = RunState(model, average=MovingAverage(model, 0.5))
    broadcast_and_verify(state.tensors(), comm)
    state.average.follow(model, torch.tensor(True))
    saved, _ = Checkpointer(folder, comm).save(state)  # averages buffers over the ranks
    kept = load_file(saved / "state.safetensors")
    assert torch.equal(kept["model/places"], torch.arange(4.0).expand(2, 4))
    Checkpointer(folder, comm).restore(state)
    comm.barrier()


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

    def remembering(batches):
        loss = step(batches)
        history.append([p.detach().clone() for p in trainer.model.parameters()])
        return loss

    trainer.train_step = remembering
    loop.run()
    wanted = history[0]
    for weights in history[1:]:
        wanted = [decay * e + (1 - decay) * w for e, w in zip(wanted, weights, strict=True)]
    for found, value in zip(trainer.state.average.module.parameters(), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14)
    last = [record for record in records if record["kind"] == "eval"][-1]
    assert last["ema_loss"] != last["loss"]
    from hvd_lars.models.moving_average import MovingAverage

    model = tiny_model(torch.float64, seed=9, norm=True)
    average = MovingAverage(model, decay)
    checkpointer = Checkpointer(tmp_path / "checkpoints", LocalCommunicator())
    checkpointer.restore(RunState(model, average=average))
    for found, value in zip(average.module.parameters(), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14)
    plain = tiny_model(torch.float64, seed=9, norm=True)  # evaluated without its average
    checkpointer.restore(RunState(plain))
    assert torch.equal(plain[0].weight, trainer.model[0].weight)


def test_the_average_lies_in_memory_as_the_weights_do(tmp_path):
    """Or torch updates it tensor by tensor."""
    overrides = ["model.name=resnet18", "model.ema_decay=0.9", "train.channels_last=true"]
    overrides += [f"run.dir={tmp_path}", "data={name: synthetic, image_size: 32}"]
    loop, _ = build_run(load_config("digits", overrides), LocalCommunicator(), detect_launch({}))
    for sink in loop.recorder.sinks:
        sink.close()
    state = loop.trainer.state
    assert any(weight.stride()[1:2] == (1,) for weight in state.model.parameters())
    for name, weight in state.model.named_parameters():
        assert state.average.module.get_parameter(name).stride() == weight.stride()
