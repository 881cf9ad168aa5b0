"""MNIST's files: generated, found, read, and refused where they are damaged."""

import gzip

import numpy as np
import pytest
import torch

from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.config.file import load_config
from hvd_lars.errors import UserError
from hvd_lars.sources import BuildContext

SIZES = {"train": 40, "t10k": 12}


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def arrays(part, first=0, side=6):
    generator = np.random.default_rng(SIZES[part])
    images = generator.integers(0, 256, (SIZES[part], side, side))
    return images, first + np.arange(SIZES[part]) % 4


def write(folder, prefix="", packed=False, first=0, names=("train", "t10k")):
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in zip(SIZES, names, strict=True):
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays(part, first), strict=True):
            path = folder / f"{prefix}{name}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return folder


def source_of(root, **keys):
    text = ", ".join(f"{k}: {v}" for k, v in {"root": root, "image_size": 6, **keys}.items())
    config = load_config("digits", [f"data={{name: idx, {text}}}"])
    return config.data.build(BuildContext(LocalCommunicator(), config.run.seed))


def test_one_of_several_data_sets_in_a_folder_is_chosen_by_name(tmp_path):
    write(tmp_path, "emnist-letters-", first=1)
    write(tmp_path, "emnist-digits-")
    names = f"{tmp_path}/emnist-digits, {tmp_path}/emnist-letters"
    with pytest.raises(UserError, match=f"several data sets in it: {names}; name one"):
        source_of(tmp_path)
    _, labels = source_of(tmp_path / "emnist-digits").eval_batch(np.arange(4))
    assert labels.min() == 0
    (tmp_path / "emnist-digits-t10k-labels-idx1-ubyte").unlink()
    (tmp_path / "emnist-letters-train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no val labels beside"):
        source_of(tmp_path)


def test_the_names_of_kaggles_files_are_read(tmp_path):
    for path in list(write(tmp_path).iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
        path.mkdir()
    assert source_of(tmp_path).num_train == 40


@pytest.mark.parametrize(
    ("below", "options"),
    [
        (".", {}),
        (".", {"packed": True}),
        ("raw", {}),
        ("FashionMNIST/raw", {}),
        (
            ".",
            {"prefix": "emnist-letters-", "first": 1, "names": ("train", "test"), "packed": True},
        ),
    ],
)
def test_images_and_labels_are_those_of_the_files(tmp_path, below, options):
    write(tmp_path / below, **options)
    source = source_of(tmp_path)
    assert (source.num_train, source.num_eval, source.num_classes) == (40, 12, 4)
    pixels, labels = arrays("t10k")
    images, found = source.eval_batch(np.arange(12))
    wanted = (torch.from_numpy(pixels) / 255.0 - source.mean) / source.deviation
    torch.testing.assert_close(images[:, 0], wanted.float())
    assert found.tolist() == labels.tolist()
    everything = source_of(tmp_path, shift=0).train_batch(0, np.arange(40))[0]
    assert everything.mean().abs() < 1e-5
    assert everything.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def same_pixels(part, made, mirrored):
    return torch.allclose(part.flip(1) if mirrored else part, made, atol=1e-6)


def test_a_training_image_is_moved_and_mirrored_by_its_own_random_numbers(tmp_path):
    write(tmp_path)
    plain, moved = source_of(tmp_path, shift=0), source_of(tmp_path, shift=2, flip="true")
    indices = np.arange(40)
    images, labels = plain.train_batch(0, indices)
    found, same = moved.train_batch(3, indices)
    assert torch.equal(labels, same)
    paper = (0.0 - plain.mean) / plain.deviation
    offsets = set()
    for image, made in zip(images[:, 0], found[:, 0], strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2), value=paper)
        places = [
            (mirrored, top, left)
            for mirrored in (False, True)
            for top in range(5)
            for left in range(5)
            if torch.allclose(
                padded[top : top + 6, left : left + 6].flip([1] if mirrored else []),
                made,
                atol=1e-6,
            )
        ]
        assert len(places) == 1
        offsets.update(places)
    assert len(offsets) > 20
    part, _ = moved.train_batch(3, indices[7:9])
    assert torch.equal(part, found[7:9])
    assert not torch.equal(moved.train_batch(4, indices)[0], found)


def test_another_image_or_label_is_other_data(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", packed=True)
    assert source_of(tmp_path / "a").identity == source_of(tmp_path / "b").identity
    labels = tmp_path / "b/train-labels-idx1-ubyte.gz"
    changed = arrays("train")[1].copy()
    changed[[0, 1]] = changed[[1, 0]]
    labels.write_bytes(gzip.compress(idx(changed)))
    assert source_of(tmp_path / "a").identity != source_of(tmp_path / "b").identity


def damage(name, data):
    def change(root):
        path = next(root.glob(f"*{name}*"))
        path.write_bytes(data(path.read_bytes()))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: next(root.glob("train-l*")).unlink(), "no train labels beside"),
        (lambda root: [p.unlink() for p in root.iterdir()], "no IDX files in it; needed: train-"),
        (damage("train-images", lambda d: d[:-1]), "1439 elements; 1440 = 40 × 6 × 6 are expected"),
        (damage("train-images", lambda d: d + b"x"), "1441 elements"),
        (damage("train-images", lambda d: b""), "not an IDX file of bytes with 3 dimensions"),
        (damage("train-images", lambda d: b"PK" + d[2:]), "it begins with b'PK"),
        (damage("train-images", lambda d: d[:3] + b"\x01" + d[4:]), "with 3 dimensions"),
        (damage("train-images", lambda d: d[:4] + b"\xff" * 12 + d[16:]), "4294967295 × 42949"),
        (damage("train-images", lambda d: gzip.compress(d)[:200]), "cannot be read: "),
        (damage("train-images", lambda d: b"\x1f\x8b" + d), "cannot be read: "),
        (damage("t10k-labels", lambda d: idx(np.zeros(11))), "11 labels for 12 images"),
        (damage("t10k-labels", lambda d: idx(np.full(12, 9))), "label 9, which training has not"),
        (damage("t10k-images", lambda d: idx(np.zeros((12, 5, 5)))), r"images of \(5, 5\)"),
        (damage("train-", lambda d: d), ""),
        (lambda root: write(root / "one/raw") and write(root / "two/raw") and
         [p.unlink() for p in root.iterdir() if p.is_file()], "several data sets in it"),
    ],
)  # fmt: skip
def test_files_that_are_not_what_they_should_be_are_named(tmp_path, change, message):
    write(tmp_path)
    change(tmp_path)
    if not message:
        source_of(tmp_path)
        return
    with pytest.raises(UserError, match=message) as caught:
        source_of(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_other_sizes_than_the_config_says_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="data.image_size: found 28; .* has images of 6×6"):
        source_of(tmp_path, image_size=28)
    with pytest.raises(UserError, match="data.expect: .* 40 . 12 images of 4 classes"):
        source_of(tmp_path, expect="{train: 41, eval: 12, classes: 4}")
    with pytest.raises(UserError, match="no such folder"):
        source_of(tmp_path / "absent")


def test_training_images_are_held_out_in_place_of_the_test_images(tmp_path):
    write(tmp_path)
    whole, held = source_of(tmp_path, shift=0), source_of(tmp_path, shift=0, val_fraction=0.3)
    again = source_of(tmp_path, shift=0, val_fraction=0.3)
    assert held.num_eval == round(0.3 * whole.num_train)
    assert held.num_train + held.num_eval == whole.num_train
    assert held.identity == again.identity != whole.identity
    assert (held.identity.train.images, held.identity.val.images) == (held.num_train, held.num_eval)

    def pixels(source, count, batch):
        images, labels = batch(np.arange(count))
        images = (images * source.deviation + source.mean).flatten(1)
        return [(*image.round(decimals=4).tolist(), label) for image, label in
                zip(images, labels.tolist(), strict=True)]  # fmt: skip

    kept = pixels(held, held.num_train, lambda indices: held.train_batch(0, indices))
    out = pixels(held, held.num_eval, held.eval_batch)
    every = pixels(whole, whole.num_train, lambda indices: whole.train_batch(0, indices))
    assert sorted(kept + out) == sorted(every)


@pytest.mark.parametrize("name", ["digits", "glyphs"])
def test_held_out_images_are_never_trained_on_as_warped_copies(name):
    config = load_config("digits", [f"data={{name: {name}, val_fraction: 0.25, copies: 3}}"])
    whole = load_config("digits", [f"data={{name: {name}, copies: 3}}"])
    held, every = (c.data.build(BuildContext(LocalCommunicator(), 0)) for c in (config, whole))
    assert held.num_train == 3 * (every.num_train // 3 - held.num_eval)
    assert held.num_eval == round(0.25 * (every.num_train // 3))
    trained = held.train_batch(0, np.arange(held.num_train))[1].bincount()
    out = held.eval_batch(np.arange(held.num_eval))[1].bincount()
    of_all = every.train_batch(0, np.arange(every.num_train))[1].bincount()
    assert (trained + 3 * out).equal(of_all)
    assert held.identity.train.images == held.num_train
