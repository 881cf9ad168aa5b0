"""Image folders: what is listed, cropped and refused, and that workers change nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from hvd_lars.data import loader
from hvd_lars.data.augment import Augment
from hvd_lars.data.image_folder import FolderImages
from hvd_lars.data.images import Images, Sizes
from hvd_lars.data.listing import list_folder
from hvd_lars.data.loader import WorkerLostError, stream
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.data.source import Request
from hvd_lars.errors import UserError
from hvd_lars.sources.images import IMAGENET_STATISTICS as STATISTICS


def make_folder(root, classes=("ant", "bee", "cat"), train=4, val=2, size=(40, 30)):
    """Noise around a brightness that tells the class; PNG and JPEG, one of them grey."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(0, 50, (size[1], size[0], 3))
                image = Image.fromarray((noise + 80 * label).astype(np.uint8))
                if i == 0:
                    image = image.convert("L")
                image.save(root / split / name / f"{i}.{'png' if i % 2 else 'JPEG'}")
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images")


def source_of(folder, seed=0, augment=None, progressive=(), sides=(16, 20), **options):
    listing = list_folder(str(folder), None)
    train, val = (FolderImages(listing.root, split) for split in (listing.train, listing.val))
    parts = train, val, listing.identity(), augment or Augment()
    return Images(*parts, Sizes(*sides, progressive), seed, STATISTICS, **options)


def test_a_folder_is_listed_by_class(folder):
    (folder / "train/ant/readme.txt").write_text("no image")
    listing = list_folder(str(folder), None)
    assert listing.classes == ("ant", "bee", "cat")
    assert listing.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert listing.val.paths[3] == b"val/bee/1.png"
    assert (source_of(folder).num_train, source_of(folder).num_eval) == (12, 6)


def test_the_list_is_remembered_until_a_class_folder_changes(folder, tmp_path, monkeypatch):
    from hvd_lars.data import listing

    cache = tmp_path / "cache"
    first = list_folder(str(folder), cache)
    with monkeypatch.context() as patch:
        patch.setattr(listing, "_list", lambda *_: pytest.fail("scanned again"))
        again = list_folder(str(folder), cache)
    assert again.train.paths.tolist() == first.train.paths.tolist()
    assert again.classes == first.classes
    os.remove(folder / "train/bee/2.JPEG")
    assert len(list_folder(str(folder), cache).train.paths) == 11
    assert not list(cache.glob("*.tmp*"))
    for content in (b"torn", b""):
        for file in cache.iterdir():
            file.write_bytes(content)
        assert len(list_folder(str(folder), cache).train.paths) == 11
    assert len(list_folder(str(folder), cache).train.paths) == 11


def test_a_cache_that_cannot_be_written_is_no_loss(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert len(list_folder(str(folder), tmp_path / "file/cache").train.paths) == 12


def test_crops_depend_on_seed_epoch_and_sample_alone(folder):
    source = source_of(folder)
    images, labels = source.train_batch(1, np.array([3, 7, 11]))
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 1, 2]
    alone, _ = source.train_batch(1, np.array([7]))
    assert torch.equal(alone[0], images[1])
    assert not torch.equal(source.train_batch(2, np.array([7]))[0], alone)
    assert not torch.equal(source_of(folder, seed=1).train_batch(1, np.array([7]))[0], alone)


def test_making_a_batch_leaves_the_random_state_alone(folder):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    source_of(folder).train_batch(0, np.array([1, 2]))
    assert torch.equal(torch.rand(3), wanted)


def test_evaluation_resizes_the_shorter_side_and_takes_the_centre(tmp_path):
    root = make_folder(tmp_path / "images", size=(60, 30))
    picture = np.zeros((30, 60, 3), np.uint8)
    picture[:, 20:40] = 255  # a square of 20 in the centre after the resize to 20×40: 13 wide
    Image.fromarray(picture).save(root / "val/ant/1.png")
    images, _ = source_of(root).eval_batch(np.array([1]))
    row = images[0, 0, 8]
    assert row[4:12].eq(255).all()
    assert row[0] == 0
    assert row[-1] == 0


def test_images_are_normalised_on_the_device(folder):
    source = source_of(folder)
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    pixels, labels = source.on_device(images, torch.tensor([2]), Request(None, np.array([0])))
    assert labels.tolist() == [2]
    found = pixels[0, :, 0, 0]
    wanted = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_workers_give_the_same_batches_in_the_same_order(folder):
    batches = GlobalBatches(12, 5, seed=3)
    requests = [Request(step // 2, batches.indices(step)) for step in range(6)]
    requests.append(Request(None, np.arange(6)))
    source = source_of(folder)
    alone = list(stream(source, requests))
    helped = list(stream(source, iter(requests), workers=2))
    assert len(alone) == len(helped) == 7
    for (asked, (images, labels)), (asked_2, (images_2, labels_2)) in zip(
        alone, helped, strict=True
    ):
        assert asked is asked_2
        assert torch.equal(images, images_2)
        assert torch.equal(labels, labels_2)


OWNER = """
import sys, time
import numpy as np
from hvd_lars.data.loader import stream
from hvd_lars.data.source import Request
from test_image_folder import source_of
if __name__ == "__main__":
    requests = iter([Request(0, np.array([1, 2]))] * 100)
    for batch in stream(source_of(sys.argv[1]), requests, workers=2):
        print("ready", flush=True)
        time.sleep(600)
"""


def test_workers_end_with_an_owner_that_is_killed(folder, tmp_path):
    program = tmp_path / "owner.py"
    program.write_text(OWNER)
    command = [sys.executable, str(program), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout.readline() == "ready\n"
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) >= 3  # the fork server and two workers
    owner.kill()
    owner.communicate()
    assert psutil.wait_procs(family, timeout=60)[1] == []


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), WorkerLostError),
        (EOFError(), WorkerLostError),
        (ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."),
         ConnectionResetError),
    ],
)  # fmt: skip
def test_a_worker_that_dies_while_it_hands_a_batch_over_is_lost(folder, monkeypatch, error, seen):
    """Not so an error of the user's own data set, which torch repeats here."""

    class Broken:
        def __init__(self, *_, **options):
            assert options["num_workers"] == 1

        def __iter__(self):
            raise error
            yield

    monkeypatch.setattr(loader, "DataLoader", Broken)
    with pytest.raises(seen) as told:
        next(stream(source_of(folder), [Request(0, np.array([1]))], workers=1))
    if seen is WorkerLostError:
        assert "(one of data.workers=1) has ended: out of memory?" in str(told.value)


def test_workers_leave_the_random_state_alone(folder):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    list(stream(source_of(folder), [Request(0, np.array([1, 2]))], workers=1))
    assert torch.equal(torch.rand(3), wanted)


def test_a_name_that_is_not_utf8_is_read(folder):
    os.rename(folder / "val/ant/1.png", os.fsencode(folder) + b"/val/ant/\xff.png")
    assert source_of(folder).eval_batch(np.arange(6))[0].shape[0] == 6


def test_a_picture_of_absurd_size_is_named(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    source = source_of(folder)
    assert len(source.eval_batch(np.arange(1))[1]) == 0
    assert "val/ant/0.JPEG: not a readable image: Image size" in source.unreadable[0].line


DAMAGED = ("ant/0.JPEG", "ant/1.png", "cat/1.png")  # the first two, and the last


def damage(folder, split):
    """Three images that cannot be read, each for another reason."""
    (folder / split / DAMAGED[0]).write_bytes(b"no image")
    (folder / split / DAMAGED[1]).unlink()
    last = folder / split / DAMAGED[2]
    last.write_bytes(last.read_bytes()[:60])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_takes_the_place_of_one_that_cannot_be_read(tmp_path, workers):
    folder = make_folder(tmp_path / "images", train=2)
    everything = Request(0, np.arange(6))
    _, labels = source_of(folder).train_batch(0, everything.indices)
    source = source_of(folder)
    damage(folder, "train")
    for made in list(stream(source, [everything, everything], workers)):
        assert made[1][1].tolist() == labels[[2, 2, 2, 3, 4, 2]].tolist()
    assert {(line.partition(": ")[0], evaluation) for line, evaluation in source.unreadable} == {
        (f"{folder}/train/{name}", False) for name in DAMAGED
    }
    if workers == 0:
        assert len(source.unreadable) == 3  # once each
    for path in folder.glob("train/*/*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="5 training images in a row .*not a readable") as e:
        list(stream(source_of(folder), [everything], workers))
    assert folder.name in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_image_that_cannot_be_read_is_not_evaluated(folder, workers):
    images, labels = source_of(folder).eval_batch(np.arange(6))
    source = source_of(folder)
    damage(folder, "val")
    requests = [Request(None, np.arange(6)), Request(None, np.array([0, 1]))]
    (_, some), (_, none) = stream(source, requests, workers)
    assert torch.equal(some[0], images[[2, 3, 4]])
    assert some[1].tolist() == labels[[2, 3, 4]].tolist()
    assert (none[0].shape, none[1].shape) == ((0, 3, 16, 16), (0,))
    assert {(line.partition(": ")[0], evaluation) for line, evaluation in source.unreadable} == {
        (f"{folder}/val/{name}", True) for name in DAMAGED
    }


LITTER = (".ipynb_checkpoints/0-checkpoint.png", ".git/x.png", "__MACOSX/._0.png", "@eaDir/0.png")


def test_what_systems_leave_behind_is_no_class_and_no_image(folder):
    """Hidden folders once became class 0 and shifted every label."""
    wanted = list_folder(str(folder), None)
    picture = (folder / "val/ant/1.png").read_bytes()
    for place in ("train", "val", "train/ant", "val/bee"):
        for name in (*LITTER, "._0.JPEG", ".DS_Store", "Thumbs.db"):
            (folder / place / name).parent.mkdir(exist_ok=True)
            (folder / place / name).write_bytes(picture)
    (folder / "train/astray.png").write_bytes(picture)
    found = list_folder(str(folder), None)
    assert found.classes == wanted.classes
    assert found.identity() == wanted.identity()
    assert found.left_out == (
        "6 hidden, 6 hidden beside the class folders, 1 .png beside the class folders"
    )


def test_whatever_pillow_reads_is_an_image_in_sub_folders_too(tmp_path):
    """The order is torchvision's."""
    from torchvision.datasets import ImageFolder

    root = make_folder(tmp_path / "images", train=1, val=1)
    picture = Image.fromarray(np.full((30, 40, 3), 200, np.uint8))
    for ending in ("tif", "TIFF", "gif", "jfif", "pgm", "jp2", "tga"):
        (root / "train/bee/deep/er").mkdir(parents=True, exist_ok=True)
        picture.save(root / f"train/bee/deep/er/x.{ending}")
    (root / "train/bee/deep-1").mkdir()
    picture.save(root / "train/bee/deep-1/y.png")
    for name in ("notes.txt", "boxes.txt", "sound.mpg", "table.h5", "program.eps", "README"):
        (root / "train/bee" / name).write_text("no image")
    (root / "train/bee/deep/up").symlink_to(root / "train/bee")  # a circle
    (root / "train/bee/deep/top").symlink_to("../..")  # and a larger one
    cache = tmp_path / "cache"
    listing = list_folder(str(root), cache)
    assert listing.train.labels.tolist() == [0, *[1] * 9, 2]
    assert listing.left_out == "2 .txt, 1 .eps, 1 .h5, 1 .mpg, 1 without an extension"
    (root / "train/bee/deep/up").unlink()
    (root / "train/bee/deep/top").unlink()
    theirs = ImageFolder(str(root / "train"), is_valid_file=lambda path: "." in path[-5:])
    odd = (".txt", ".mpg", ".h5", ".eps")
    wanted = [path for path, _ in theirs.samples if not path.endswith(odd)]
    assert [f"{root}/{path.decode()}" for path in listing.train.paths.tolist()] == wanted
    images, _ = source_of(root, augment=Augment(flip=False)).train_batch(0, np.arange(1, 10))
    assert (images[1:].float() - 200).abs().max() <= 2
    picture.save(root / "train/bee/deep/er/late.png")  # far below the class's own folder
    assert len(list_folder(str(root), cache).train.paths) == 12


def test_a_pipe_is_no_image_and_a_link_to_nowhere_is_named(folder):
    """To open the one waits for ever; the other is an image that is missing."""
    os.mkfifo(folder / "val/ant/9.png")
    (folder / "val/ant/8.png").symlink_to(folder / "gone.png")
    source = source_of(folder)
    assert source.num_eval == 7
    assert len(source.eval_batch(np.arange(7))[1]) == 6
    assert "val/ant/8.png: cannot be read: No such file" in source.unreadable[0].line


def break_by(folder, how):
    if how == "no train":
        os.rename(folder / "train", folder / "training")
    elif how == "no classes":
        for name in ("ant", "bee", "cat"):
            os.rename(folder / "val" / name, folder / name)
    elif how == "classes differ":
        os.rename(folder / "val/cat", folder / "val/dog")
    elif how == "no images":
        for path in (folder / "train/bee").iterdir():
            path.unlink()
        (folder / "train/bee/notes.txt").touch()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no train", "train: No such file or directory; expected a folder with one folder of"),
        ("no classes", "val: no class folders in it"),
        ("classes differ", "val has classes that train has not: dog"),
        ("no images", "train/bee: no images in it, only 1 .txt"),
    ],
)
def test_bad_layouts_get_one_line(folder, how, message):
    break_by(folder, how)
    with pytest.raises(UserError, match=message) as caught:
        list_folder(str(folder), None)
    assert str(caught.value).startswith(f"data.root: {folder}")
    assert len(str(caught.value).splitlines()) == 1
