"""ImageNet's archives, generated small: the same data as the folder that they unpack to."""

import io
import os
import tarfile

import forms
import numpy as np
import pytest
import torch
from forms import devkit_of, tar_of
from test_image_folder import make_folder, source_of

from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.config.file import load_config
from hvd_lars.data.forms.archives import DEVKIT, FORM, TRAIN, VAL
from hvd_lars.data.forms.scan import locate
from hvd_lars.errors import UserError
from hvd_lars.sources import BuildContext


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images")


@pytest.fixture
def archives(folder, tmp_path):
    forms.number_val(folder)
    return forms.archives(folder, tmp_path / "archives")


def from_archives(root, expect="null"):
    text = f"{{name: imagenet, root: {root}, image_size: 16, eval_resize: 20, expect: {expect}}}"
    config = load_config("digits", [f"data={text}"])
    return config.data.build(BuildContext(LocalCommunicator(), 0))


def test_they_are_the_folder_that_they_unpack_to(folder, archives):
    found, wanted = from_archives(archives), source_of(folder)
    assert found.identity == wanted.identity
    for epoch in (0, 1):
        for a, b in zip(
            found.train_batch(epoch, np.arange(found.num_train)),
            wanted.train_batch(epoch, np.arange(wanted.num_train)),
            strict=True,
        ):
            assert torch.equal(a, b)
    both = [s.eval_batch(np.arange(s.num_eval)) for s in (found, wanted)]
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])


def test_a_scan_is_kept_until_an_archive_changes(archives, tmp_path, monkeypatch):
    first = locate(FORM, str(archives), tmp_path / "cache")
    monkeypatch.setattr("hvd_lars.data.forms.archives.members", None)
    again = locate(FORM, str(archives), tmp_path / "cache")
    assert again.identity == first.identity
    assert np.array_equal(again.train.offset, first.train.offset)
    os.utime(archives / VAL, ns=(1, 1))
    with pytest.raises(TypeError):
        locate(FORM, str(archives), tmp_path / "cache")


def test_long_names_and_folders_inside_are_read(folder, archives):
    name = "x" * 120 + ".JPEG"
    image = sorted((folder / "train/ant").iterdir())[0].read_bytes()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as tar:
        itself = tarfile.TarInfo("./")
        itself.type = tarfile.DIRTYPE
        tar.addfile(itself)
        member = tarfile.TarInfo(name)
        member.size = len(image)
        tar.addfile(member, io.BytesIO(image))
    others = [(f"{c}.tar", tar_of([("a.JPEG", image)])) for c in ("bee", "cat")]
    (archives / TRAIN).write_bytes(tar_of([("ant.tar", made.getvalue()), *others]))
    found = from_archives(archives)
    assert found.num_train == 3


def tar_with(names, image, kind):
    """A tar file whose entries are images, or folders where the name ends in /."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
    return made.getvalue()


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_no_image_is_lost_to_a_long_name(folder, archives, kind):
    """Of a file, or of a folder, which is not the next file's."""
    image = sorted((folder / "train/ant").iterdir())[0].read_bytes()
    long = "d" * (130 if kind != tarfile.USTAR_FORMAT else 90)
    names = [f"{long}/", f"{long}/{long}.JPEG", "x.JPEG", f"{long}/", "y.JPEG", "a/y.JPEG"]
    ant = tar_with(names, image, kind)
    others = [(f"{c}.tar", tar_of([("a.JPEG", image)])) for c in ("bee", "cat")]
    (archives / TRAIN).write_bytes(tar_of([("ant.tar", ant), *others]))
    assert from_archives(archives).num_train == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ant, image: ant[: len(ant) // 2] + bytes(len(ant) - len(ant) // 2),
         "ant.tar: zeros at byte"),
        (lambda ant, image: ant + ant, "ant.tar: zeros at byte"),
        (lambda ant, image: bytes(10240), "ant.tar has no image"),
        (lambda ant, image: tar_of([("a.JPEG", image)] * 2), "ant.tar: a.JPEG is in it twice"),
    ],
)  # fmt: skip
def test_class_tars_that_would_lose_or_repeat_images_are_named(folder, archives, spoil, message):
    image = sorted((folder / "train/ant").iterdir())[0].read_bytes()
    ant = tar_of([(f"{i}.JPEG", bytes(512 - 1) + b"x") for i in range(64)])
    others = [(f"{c}.tar", tar_of([("a.JPEG", image)])) for c in ("bee", "cat")]
    (archives / TRAIN).write_bytes(tar_of([("ant.tar", spoil(ant, image)), *others]))
    with pytest.raises(UserError, match=message) as caught:
        from_archives(archives)
    assert len(str(caught.value).splitlines()) == 1


def changed(name, change):
    def apply(root):
        path = root / name
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / VAL).unlink(), "no test images; data.val_fraction"),
        (lambda root: (root / DEVKIT).unlink(), f"no {DEVKIT} in it"),
        (changed(TRAIN, lambda d: d[: len(d) // 2]), f"{TRAIN}: truncated"),
        (changed(TRAIN, lambda d: b""), f"{TRAIN}: truncated at byte 0"),
        (changed(TRAIN, lambda d: b"x" * len(d)), "not an uncompressed tar file"),
        (changed(TRAIN, lambda d: d[:700] + b"?" + d[701:]), r"\.tar: not an uncompressed tar"),
        (changed(TRAIN, lambda d: tar_of([])), f"{TRAIN}: no image in it"),
        (changed(TRAIN, lambda d: tar_of([("a.JPEG", b"x")])), "a tar file for each class"),
        (changed(VAL, lambda d: d[:512]), f"{VAL}: truncated"),
        (changed(VAL, lambda d: tar_of([("a.JPEG", b"x")])), f"{VAL}: 1 images; .* labels of"),
        (changed(DEVKIT, lambda d: d[:100]), f"{DEVKIT}: damaged, or not a gzipped"),
        (changed(DEVKIT, lambda d: b"PK"), f"{DEVKIT}: damaged, or not a gzipped"),
        (changed(DEVKIT, lambda d: devkit_of(["x", "y", "z"], [0] * 6)), "no class of"),
    ],
)  # fmt: skip
def test_archives_that_are_not_what_they_should_be_are_named(archives, change, message):
    change(archives)
    with pytest.raises(UserError, match=message) as caught:
        from_archives(archives)
    assert len(str(caught.value).splitlines()) == 1


def test_another_size_than_expected_is_refused(archives):
    with pytest.raises(UserError, match="data.expect: .* are expected"):
        from_archives(archives, "{train: 1281167, eval: 50000, classes: 1000}")
