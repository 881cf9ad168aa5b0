"""Blocks computed again in backward: the same numbers from less memory."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from hvd_lars.errors import UserError
from hvd_lars.models import checkpoint_activations
from hvd_lars.models.footprint import footprint


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16), ("vit_b_16", 12)])
def test_gradients_and_statistics_are_the_same(name, blocks):
    torch.manual_seed(0)
    side = 48
    if name == "vit_b_16":
        model = get_model(name, num_classes=7, image_size=side).double()
        nn.init.normal_(model.heads.head.weight)  # it starts at zero
    else:
        model = get_model(name, num_classes=7).double()
    other = copy.deepcopy(model)
    assert checkpoint_activations(other) == blocks
    twin = copy.deepcopy(other)  # as for a moving average
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    for network in (model, other):
        network(images).square().sum().backward()
    for (key, wanted), found in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, msg=key)
    for (key, wanted), found in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(found, wanted), key
    with torch.no_grad():
        for param in twin.parameters():
            param.zero_()
    assert not twin.train()(images).any()
    assert other.eval()(images).any()


def test_a_step_keeps_less(monkeypatch):
    model = get_model("resnet50")
    before = footprint(model, (3, 64, 64))
    checkpoint_activations(model)
    after = footprint(model, (3, 64, 64))
    assert 0 < after.activations_per_sample < 0.5 * before.activations_per_sample


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match="model.checkpoint_blocks: the network has no blocks"):
        checkpoint_activations(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
