"""Training images decoded on the device (data.decode: gpu); here torchvision decodes on the CPU."""

import numpy as np
import pytest
import torch
from test_crops import photograph
from test_image_folder import make_folder, source_of

from hvd_lars.data.augment import Augment
from hvd_lars.data.encoded import why_not_on
from hvd_lars.data.images import DeviceWork
from hvd_lars.data.loader import stream
from hvd_lars.data.source import Request
from hvd_lars.errors import UserError

DECODE = DeviceWork(decode=True)
ALL = np.arange(12)


@pytest.fixture
def folder(tmp_path):
    """PNG files of noise, and photographs of several sizes as JPEG, some of them grey."""
    root = make_folder(tmp_path / "images")
    for i, file in enumerate(sorted((root / "train").rglob("*.JPEG"))):
        size, mode = [(44, 30), (64, 48), (33, 90)][i % 3], "L" if i % 2 else "RGB"
        file.write_bytes(photograph(*size, mode)[0])
    return root


def batches(source, workers):
    requests = [Request(0, part) for part in np.split(ALL, 3)]
    requests.append(Request(None, np.arange(source.num_eval)))
    return list(stream(source, requests, workers))


def distance(images, others):
    """Mean difference of pixels; some 60 between two crops."""
    return (images.int() - others.int()).abs().float().mean()


@pytest.mark.parametrize("crop", ["resized", "window", "padded"])
def test_crops_are_the_workers_but_for_the_decoders_rounding(folder, crop):
    augment = Augment(crop=crop, crop_scale=(0.5, 1.0))
    found = batches(source_of(folder, augment=augment, device_work=DECODE), workers=2)
    wanted = batches(source_of(folder, augment=augment), workers=0)
    for (_, (images, labels)), (request, (theirs, their_labels)) in zip(found, wanted, strict=True):
        assert torch.equal(labels, their_labels)
        assert images.dtype == torch.uint8
        if request.epoch is None:
            assert torch.equal(images, theirs)
        else:
            assert distance(images, theirs) < 6, "the same part of the same image"


def test_other_formats_are_the_same_pixels(folder):
    png = np.array([1, 3, 5, 11])
    found = [
        next(stream(source_of(folder, **options), [Request(3, png)]))[1][0]
        for options in ({}, {"device_work": DECODE})
    ]
    assert torch.equal(*found)


def test_an_image_does_not_depend_on_its_batch_nor_on_the_workers(folder):
    source = source_of(folder, device_work=DECODE)
    whole = torch.cat([images for _, (images, _) in batches(source, workers=1)[:3]])
    for i in ALL:
        ((_, (alone, _)),) = stream(source, [Request(0, ALL[i : i + 1])])
        assert torch.equal(alone[0], whole[i])


def test_a_damaged_file_is_replaced_as_it_is_on_the_cpu(folder):
    whole = (folder / "train/bee/0.JPEG").read_bytes()
    (folder / "train/bee/0.JPEG").write_bytes(whole[: len(whole) // 2])
    (folder / "train/bee/2.JPEG").write_bytes(b"no picture")
    source, wanted = source_of(folder, device_work=DECODE), source_of(folder)
    found = torch.cat([labels for _, (_, labels) in batches(source, workers=1)[:3]])
    theirs = torch.cat([labels for _, (_, labels) in batches(wanted, workers=0)[:3]])
    assert torch.equal(found, theirs)
    lines = sorted(line for line, _ in source.unreadable)
    assert lines == sorted(line for line, _ in wanted.unreadable)
    assert len(lines) == 2


def test_what_cannot_decode_says_why():
    assert why_not_on(torch.device("cpu")) == ""
    if not torch.cuda.is_available():
        assert why_not_on(torch.device("cuda"))


def test_a_rank_without_a_gpu_is_refused(folder):
    from hvd_lars.comm.local import LocalCommunicator
    from hvd_lars.sources.image_folder import ImageFolderData
    from hvd_lars.sources.settings import BuildContext

    settings = ImageFolderData(name="imagefolder", root=str(folder), decode="gpu")
    with pytest.raises(UserError, match="^data.decode: gpu: this rank computes on the CPU; data"):
        settings.build(BuildContext(LocalCommunicator(), 0))


@pytest.mark.gpu
def test_a_gpu_decodes_and_crops_as_the_cpu(folder):
    assert why_not_on(torch.device("cuda")) == ""
    source = source_of(folder, device_work=DECODE)
    requests = [Request(0, ALL)]
    (((_, (wanted, _)),), ((_, (found, _)),)) = (
        list(stream(source, requests, 1, device)) for device in ("cpu", "cuda")
    )
    assert distance(found.cpu(), wanted) < 3
