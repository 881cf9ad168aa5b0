"""CIFAR from torchvision's files: generated here, with their checksums put in place of theirs."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.config.file import load_config
from hvd_lars.data.cifar import load_cifar
from hvd_lars.errors import UserError
from hvd_lars.sources import BuildContext


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Files of the real layout with 20 images in place of 10,000 each."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    sums = {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        write(name, {"data": pixels, "labels": [i % 10 for i in range(20)]})
    write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["batches.meta"]})
    return tmp_path


def source_of(root, *overrides):
    config = load_config("cifar10-sgd-b128", [f"data.root={root}", *overrides])
    return config.data.build(BuildContext(LocalCommunicator(), config.run.seed))


def test_images_and_labels_are_those_of_the_files(cifar10):
    source = source_of(cifar10, "data.expect=null")
    assert (source.num_train, source.num_eval, source.num_classes) == (100, 20, 10)
    images, labels = source.eval_batch(np.arange(20))
    content = pickle.loads((cifar10 / "cifar-10-batches-py/test_batch").read_bytes())
    assert torch.equal(images.flatten(1), torch.from_numpy(content["data"]))
    assert labels.tolist() == content["labels"]


def test_training_crops_after_padding(cifar10):
    images, _ = source_of(cifar10, "data.expect=null").train_batch(0, np.arange(100))
    assert images.shape == (100, 3, 32, 32)
    edges = [images[:, :, 0].flatten(1), images[:, :, -1].flatten(1)]
    padded = sum(((edge == 0).all(1)).float().mean() for edge in edges)
    assert 0.6 < padded < 1.1  # four of nine shifts either way leave a row of padding


def test_a_set_of_another_size_is_refused(cifar10):
    with pytest.raises(UserError) as caught:
        source_of(cifar10)
    assert str(caught.value) == (
        f"data.expect: {cifar10} has 100 + 20 images of 10 classes; 50,000 + 10,000 images of 10 "
        f"classes are expected; data.expect=null accepts any"
    )


def test_missing_or_damaged_files_are_told(cifar10, tmp_path):
    file = cifar10 / "cifar-10-batches-py/data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="no cifar10 in it, or damaged .* data.download=true"):
        load_cifar("cifar10", str(cifar10), download=False)
    with pytest.raises(UserError, match="no cifar100 in it"):
        load_cifar("cifar100", str(tmp_path), download=False)


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UserError, match="cifar100 could not be downloaded: ") as caught:
        load_cifar("cifar100", str(tmp_path / "new"), download=True)
    assert len(str(caught.value).splitlines()) == 1
