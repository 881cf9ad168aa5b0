"""Augmentation: what each option does, and that it depends on seed, epoch and sample alone."""

import numpy as np
import pytest
import torch
from test_image_folder import make_folder, source_of

from hvd_lars.config.file import load_config
from hvd_lars.data.augment import Augment
from hvd_lars.data.images import DeviceWork
from hvd_lars.data.mixing import mix_pairs
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.data.source import Request

OPTIONS = {
    "window": Augment(crop="window"),
    "padded": Augment(crop="padded"),
    "trivial": Augment(trivial_augment=True),
    "jitter": Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "lighting": Augment(lighting=0.1),
    "erasing": Augment(random_erasing=0.9),
    "mixup": Augment(mixup=0.4),
    "cutmix": Augment(cutmix=1.0),
    "both": Augment(mixup=0.4, cutmix=1.0, trivial_augment=True, random_erasing=0.5),
}
PLAIN = Augment()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # As large as the crop: "padded" does not resize.
    return make_folder(tmp_path_factory.mktemp("images") / "data", size=(20, 20))


def finished(source, epoch, indices):
    """A training batch as the model gets it."""
    return source.on_device(*source.train_batch(epoch, indices), Request(epoch, indices))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_images_by_seed_epoch_and_sample_alone(folder, name):
    source = source_of(folder, augment=OPTIONS[name])
    indices = np.array([3, 7, 11, 4, 0, 5])
    images, labels = finished(source, 1, indices)
    assert images.shape == (6, 3, 16, 16)
    assert images.dtype == torch.float32
    plain, _ = finished(source_of(folder, augment=PLAIN), 1, indices)
    assert not torch.allclose(images, plain)
    again, labels_again = finished(source, 1, indices)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    pair, pair_labels = finished(source, 1, indices[2:4])  # in another batch, with its neighbour
    torch.testing.assert_close(pair, images[2:4])
    torch.testing.assert_close(pair_labels, labels[2:4])
    assert not torch.allclose(finished(source, 2, indices)[0], images)
    other = source_of(folder, seed=1, augment=OPTIONS[name])
    assert not torch.allclose(finished(other, 1, indices)[0], images)


@pytest.mark.parametrize("name", ["trivial", "jitter", "both"])
def test_the_device_augments_as_the_workers_do(folder, name):
    """``device_work`` moves the work behind the transfer; here the device is the CPU too."""
    indices = np.arange(8)
    there = source_of(folder, augment=OPTIONS[name], device_work=DeviceWork(augment=True))
    here = source_of(folder, augment=OPTIONS[name])
    assert not torch.equal(there.train_batch(0, indices)[0], here.train_batch(0, indices)[0])
    assert torch.equal(finished(there, 0, indices)[0], finished(here, 0, indices)[0])


def test_augmentation_leaves_the_random_state_alone(folder):
    source = source_of(folder, augment=OPTIONS["both"], device_work=DeviceWork(augment=True))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    finished(source, 0, np.arange(4))
    assert torch.equal(torch.rand(3), wanted)


def test_evaluation_is_not_augmented(folder):
    indices = np.arange(6)
    for name, augment in OPTIONS.items():
        if name in ("window", "padded"):
            continue
        pair = [source_of(folder, augment=a) for a in (augment, PLAIN)]
        found, wanted = (s.on_device(*s.eval_batch(indices), Request(None, indices)) for s in pair)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_progressive_resizing_follows_the_epoch(folder):
    source = source_of(folder, progressive=[(0, 8), (3, 12), (5, 16)])
    sides = [source.train_batch(epoch, np.array([0]))[0].shape[-1] for epoch in range(7)]
    assert sides == [8, 8, 8, 12, 12, 16, 16]
    assert source.eval_batch(np.array([0]))[0].shape[-1] == 16
    late = source_of(folder, progressive=[(2, 8)])
    assert [late.image_size(epoch) for epoch in (1, 2)] == [16, 8]


def mixed(count, mixup, cutmix, side=32):
    """Images whose every pixel is the sample's number, mixed."""
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(-1, 3, side, side)
    request = Request(0, np.arange(count))
    return mix_pairs(images, torch.arange(count) % 10, request, 10, 3, mixup, cutmix)


def test_mixup_is_linear_in_images_and_labels():
    images, shares = mixed(2000, mixup=0.4, cutmix=0.0)
    own = shares[torch.arange(2000), torch.arange(2000) % 10]
    partner = torch.arange(2000) ^ 1
    wanted = own * torch.arange(2000) + (1 - own) * partner
    torch.testing.assert_close(images[:, 0, 5, 7], wanted)
    assert torch.allclose(own[0::2], own[1::2])  # both of a pair have one λ
    # Beta(α, α): mean 1/2, variance 1/(4(2α + 1)).
    assert own[0::2].mean() == pytest.approx(0.5, abs=0.04)
    assert own[0::2].var() == pytest.approx(1 / (4 * 1.8), rel=0.1)


def test_cutmix_swaps_one_rectangle_and_shares_labels_by_area():
    images, shares = mixed(2000, mixup=0.0, cutmix=1.0)
    labels = torch.arange(2000) % 10
    kept = images[:, 0] == torch.arange(2000, dtype=torch.float32)[:, None, None]
    swapped = images[:, 0] == (torch.arange(2000) ^ 1).float()[:, None, None]
    assert (kept ^ swapped).all()  # every pixel is one's own or the neighbour's
    own = shares[torch.arange(2000), labels]
    torch.testing.assert_close(own, kept.float().mean((1, 2)))
    for i in range(0, 200, 2):
        rows, columns = swapped[i].any(1), swapped[i].any(0)
        assert swapped[i].sum() == rows.sum() * columns.sum()  # a rectangle
    assert torch.equal(swapped[0::2], swapped[1::2])
    assert 0.5 < own.mean() < 0.75  # boxes are cut off at the border


def test_with_both_a_pair_takes_either_and_an_odd_last_stays():
    images, shares = mixed(1001, mixup=0.4, cutmix=1.0)
    cut = [len(image.unique()) == 2 for image in images[:1000:2, 0]]
    assert 0.35 < sum(cut) / 500 < 0.65
    assert (images[1000] == 1000.0).all()
    assert shares[1000].tolist() == [1.0] + [0.0] * 9
    torch.testing.assert_close(shares.sum(1), torch.ones(1001))


def test_mixing_gives_the_same_images_however_the_batch_is_cut(folder):
    source = source_of(folder, augment=OPTIONS["both"])
    batches = GlobalBatches(12, 11, seed=3, pairs=True)
    indices = batches.indices(0)
    whole, _ = finished(source, 0, indices)
    found = {}
    for rank in range(3):
        for piece in batches.micro_batches(0, rank, 3, 2):
            images, _ = finished(source, 0, piece)
            found |= dict(zip(piece.tolist(), images, strict=True))
    for i, index in enumerate(indices.tolist()):
        torch.testing.assert_close(found[index], whole[i])


@pytest.mark.parametrize(
    ("augment", "there"), [("trivial_augment: true", False), ("hue: 0.1", True)]
)
def test_what_would_wait_for_the_gpu_stays_in_the_workers(augment, there):
    data = f"data={{name: imagefolder, root: /nowhere, augment: {{{augment}}}}}"
    assert load_config("digits", [data]).data._device_work(gpu=True).augment == there
