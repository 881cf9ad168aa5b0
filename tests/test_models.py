"""The papers' networks, and how models are named."""

import pytest
import torch
from torch import nn

from hvd_lars.errors import UserError
from hvd_lars.models import build_model, model_names


@pytest.mark.parametrize("name", ["alexnet_caffe", "alexnet_bn"])
def test_the_papers_alexnets_have_60_97_million_parameters(name):
    with torch.device("meta"):
        model = build_model(name, 1000)
        logits = model(torch.empty(2, 3, 227, 227))
    assert sum(p.numel() for p in model.parameters()) == 60_965_224
    assert logits.shape == (2, 1000)


def test_alexnet_normalises_where_caffe_did():
    def kinds(name):
        with torch.device("meta"):
            return [type(m).__name__ for m in build_model(name, 10).features]

    c, r, n, p, b = "Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d", "BatchNorm2d"
    assert kinds("alexnet_caffe") == [c, r, n, p, c, r, n, p, c, r, c, r, c, r, p]
    assert kinds("alexnet_bn") == [c, r, p, b, c, r, p, b, c, r, b, c, r, b, c, r, p]


def test_alexnet_bn_starts_as_the_paper_says():
    torch.manual_seed(0)
    model = build_model("alexnet_bn", 10)
    convolutions = [m for m in model.features if isinstance(m, nn.Conv2d)]
    linears = [m for m in model.classifier if isinstance(m, nn.Linear)]
    assert [m.groups for m in convolutions] == [1, 2, 1, 2, 2]
    assert [round(m.weight.std().item(), 3) for m in convolutions] == [0.01] * 5
    assert [round(m.weight.std().item(), 3) for m in linears] == [0.005, 0.005, 0.01]
    assert [m.bias.unique().tolist() for m in linears] == [
        [pytest.approx(0.1)],
        [pytest.approx(0.1)],
        [0.0],
    ]
    norms = [m for m in model.features if isinstance(m, nn.BatchNorm2d)]
    assert [(m.eps, m.affine) for m in norms] == [(1e-4, False)] * 4


def test_torchvision_classifiers_by_name():
    assert {"resnet50", "vit_b_16", "alexnet"} <= set(model_names())
    assert not [name for name in model_names() if "segment" in name or "r3d" in name]
    for name in ("resnet18", "googlenet"):
        model = build_model(name, 7).eval()
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_an_unknown_model_is_told_with_the_nearest():
    with pytest.raises(UserError, match="model.name: found 'alexnet_nb'; nearest: alexnet_bn"):
        build_model("alexnet_nb", 10)
    with pytest.raises(UserError, match="found 'xyzzy'; digits_alexnet, glyphs_alexnet"):
        build_model("xyzzy", 10)
