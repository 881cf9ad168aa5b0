"""Packing folders into shards and reading shards, ours and WebDataset's."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import time
from collections import Counter
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
import webdataset
from launch.test_training import hvd_lars
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_image_folder import make_folder, source_of

from hvd_lars.data.augment import Augment
from hvd_lars.data.images import Images, Sizes
from hvd_lars.data.listing import list_folder
from hvd_lars.data.located import LocatedImages
from hvd_lars.data.shards import origins
from hvd_lars.data.shards.cache import cached_root, copy_shards, verify
from hvd_lars.data.shards.index import load_shards
from hvd_lars.data.shards.origins import compare
from hvd_lars.data.shards.samples import scan_tar
from hvd_lars.data.shards.writer import pack
from hvd_lars.errors import UserError
from hvd_lars.launchers.local import this_python
from hvd_lars.sources.images import IMAGENET_STATISTICS as STATISTICS

QUIET = lambda done, total: None  # noqa: E731


def load(root, **options):
    return load_shards(str(root), "*train*.tar", "*val*.tar", options.get("cache"))


def images_of(shards, root):
    stores = (LocatedImages(root, split) for split in (shards.train, shards.val))
    return Images(*stores, shards.identity, Augment(), Sizes(16, 20), 0, STATISTICS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "data", train=9, val=3)


@pytest.fixture
def own(tmp_path):
    """A folder that a test may change, and its shards."""
    folder = make_folder(tmp_path / "own/data", train=9, val=3)
    pack(str(folder), tmp_path / "own/shards", 2, 10, QUIET)
    return folder, tmp_path / "own/shards"


@pytest.fixture
def packed(folder, tmp_path):
    pack(str(folder), tmp_path / "shards", 2, 10, QUIET)
    return tmp_path / "shards"


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_a_packed_folder_holds_the_same_files(folder, packed):
    names = sorted(path.name for path in packed.iterdir())
    assert names == ["dataset.json", "index.safetensors"] + [
        f"train-{i:06d}.tar" for i in range(3)
    ] + ["val-000000.tar"]
    shards = load(packed)
    assert shards.classes == ("ant", "bee", "cat")
    found = sorted(
        (int(label), (packed / shards.train.files[s]).read_bytes()[o : o + n])
        for s, o, n, label in zip(
            shards.train.file,
            shards.train.offset,
            shards.train.size,
            shards.train.labels,
            strict=True,
        )
    )
    wanted = sorted(
        (label, path.read_bytes())
        for label, name in enumerate(("ant", "bee", "cat"))
        for path in (folder / "train" / name).iterdir()
    )
    assert found == wanted
    assert shards.train.file.tolist() != sorted(shards.train.file.tolist())  # shuffled
    assert shards.identity == list_folder(str(folder), None).identity()


def test_evaluation_sees_the_images_of_the_folder(folder, packed):
    mine = images_of(load(packed), packed)
    wanted, labels = source_of(folder).eval_batch(np.arange(9))
    found, found_labels = mine.eval_batch(np.arange(9))
    assert torch.equal(found, wanted)
    assert torch.equal(found_labels, labels)


def test_packing_again_gives_the_same_bytes_whatever_the_workers(folder, packed, tmp_path):
    pack(str(folder), tmp_path / "again", 1, 10, QUIET)
    assert contents(tmp_path / "again") == contents(packed)


def test_an_interrupted_pack_goes_on(folder, packed, tmp_path, monkeypatch):
    from hvd_lars.data.shards import writer as shard_writer

    wanted = contents(packed)
    target = tmp_path / "torn"
    monkeypatch.setattr(
        shard_writer, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        pack(str(folder), target, 1, 10, QUIET)
    monkeypatch.undo()
    assert not (target / "dataset.json").exists()
    (target / "train-000001.tar").unlink()  # one is lost, one was never renamed
    (target / ".packing/train-000002.tar.7.tmp").write_bytes(b"half")
    (target / ".packing/val-000000.tar.json").write_bytes(b"")  # and one note is torn
    result = pack(str(folder), target, 1, 10, QUIET)
    assert (result.samples, result.written, result.shards) == (36, 19, 4)
    assert contents(target) == wanted


def test_a_killed_pack_goes_on(tmp_path):
    """SIGKILL of the command in the midst of writing; its workers end with it."""
    folder = make_folder(tmp_path / "images", train=400, val=2)
    target = tmp_path / "shards"
    command = this_python("-m", "hvd_lars", "pack", str(folder), str(target), "--shard-samples=20")
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(target.glob(".packing/train-*.json")):
        time.sleep(0.005)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert family and psutil.wait_procs(family, timeout=60)[1] == []
    code, output = hvd_lars("pack", folder, target, "--shard-samples=20", "--verify")
    assert code == 0, output
    assert "61 shards have the SHA-256" in output
    assert "were there already" in output
    assert not (target / ".packing").exists()
    pack(str(folder), tmp_path / "whole", 1, 20, QUIET)
    assert contents(target) == contents(tmp_path / "whole")


def test_a_lost_shard_is_written_again(folder, packed):
    wanted = contents(packed)
    (packed / "train-000001.tar").unlink()
    result = pack(str(folder), packed, 1, 10, QUIET)
    assert (result.written, result.mended) == (10, ("train-000001.tar",))
    assert contents(packed) == wanted
    assert {path.stat().st_mode & 0o777 for path in packed.iterdir()} == {
        (packed / "dataset.json").stat().st_mode & 0o777
    }


def test_a_changed_source_is_not_passed_off_as_what_it_was(folder, packed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    victim = copy / "train/ant/1.png"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    for path in packed.glob("train-*.tar"):
        path.unlink()
    for _ in range(2):  # the second time as the first
        with pytest.raises(UserError, match="files of .*copy changed since it was packed"):
            pack(str(copy), packed, 1, 10, QUIET)


def same_size(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_source_that_got_other_bytes_is_named(own):
    """By its size and time at once, by its bytes alone with --verify."""
    folder, packed = own
    wanted = contents(packed)
    victim = folder / "train/bee/2.JPEG"
    before, times = victim.read_bytes(), (victim.stat().st_atime_ns, victim.stat().st_mtime_ns)
    same_size(victim)
    message = f"{packed}: {victim}: changed since it was packed"
    with pytest.raises(UserError, match=re.escape(message)):
        pack(str(folder), packed, 1, 10, QUIET)
    assert contents(packed) == wanted
    os.utime(victim, ns=times)
    again = pack(str(folder), packed, 1, 10, QUIET)
    assert again.written == 0
    with pytest.raises(UserError, match=re.escape(message)):
        compare(packed, again.sources, QUIET)
    code, output = hvd_lars("pack", folder, packed, "--shard-samples=10", "--verify")
    assert code == 2, output
    assert output.splitlines()[-1].startswith(f"hvd-lars: {message}")
    victim.write_bytes(before)  # the same again, but later
    assert pack(str(folder), packed, 1, 10, QUIET).written == 0
    shards = [name for name in wanted if name != "dataset.json"]
    assert {name: contents(packed)[name] for name in shards} == {n: wanted[n] for n in shards}
    with mock.patch.object(origins, "_changed", side_effect=AssertionError("compared anew")):
        assert pack(str(folder), packed, 1, 10, QUIET).written == 0
    code, output = hvd_lars("pack", folder, packed, "--shard-samples=10", "--verify")
    assert code == 0, output
    assert f"the shards match the files of {folder}" in output


def test_a_source_that_changes_before_a_pack_is_whole_is_packed_as_it_is(own, tmp_path):
    folder, packed = own
    manifest = json.loads((packed / "dataset.json").read_text())
    (packed / ".packing").mkdir()
    (packed / ".packing/identity").write_text(manifest["identity"])
    for entry in manifest["train"] + manifest["val"]:
        (packed / f".packing/{entry['name']}.json").write_text(json.dumps(entry))
    (packed / "dataset.json").unlink()
    same_size(folder / "val/bee/1.png")
    result = pack(str(folder), packed, 1, 10, QUIET)
    assert (result.written, result.mended) == (9, ())
    pack(str(folder), tmp_path / "whole", 1, 10, QUIET)
    assert contents(packed) == contents(tmp_path / "whole")


def test_pack_takes_what_training_takes(own, tmp_path):
    folder, _ = own
    picture = Image.fromarray(np.full((8, 8), 40000, np.uint16))
    (folder / "train/bee/deep").mkdir()
    picture.save(folder / "train/bee/deep/x.tif")
    (folder / "train/bee/._0.JPEG").write_bytes(b"AppleDouble")
    (folder / "train/.ipynb_checkpoints").mkdir()
    (folder / "train/bee/notes.txt").touch()
    code, output = hvd_lars("pack", folder, tmp_path / "shards", "--shard-samples=10")
    assert code == 0, output
    assert "skipped, not images of a class: 1 .txt, 1 hidden" in output
    shards = load(tmp_path / "shards")
    assert (shards.classes, len(shards.train.labels)) == (("ant", "bee", "cat"), 28)
    images, _ = images_of(shards, tmp_path / "shards").train_batch(0, np.arange(28))
    assert (images == round(40000 / 257)).all((1, 2, 3)).sum() == 1


def test_a_lost_or_damaged_index_is_made_again(folder, packed):
    wanted = contents(packed)
    for damage in (b"torn", None):
        (packed / "index.safetensors").unlink()
        if damage:
            (packed / "index.safetensors").write_bytes(damage)
        with pytest.raises(UserError, match="index.safetensors: damaged"):
            load(packed)
        assert pack(str(folder), packed, 1, 10, QUIET).written == 0
        assert contents(packed) == wanted


def test_verify_names_every_damaged_shard(packed):
    for name in ("train-000001.tar", "val-000000.tar"):
        data = bytearray((packed / name).read_bytes())
        data[1000] ^= 1
        (packed / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        verify(packed, 2, QUIET)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0].rpartition("/")[2] for line in lines[:2]] == [
        "train-000001.tar",
        "val-000000.tar",
    ]
    assert "remove these and pack again" in lines[2]


def test_another_folder_is_not_mixed_in(folder, packed, tmp_path):
    before = contents(packed)
    other = make_folder(tmp_path / "other", classes=("x", "y"))
    with pytest.raises(UserError, match="holds shards of other images"):
        pack(str(other), packed, 1, 10, QUIET)
    with pytest.raises(UserError, match="or of other options of pack"):
        pack(str(folder), packed, 1, 11, QUIET)
    assert contents(packed) == before


# In a process of its own, since the reader leaves its files to be closed by the interpreter.
READER = """
import hashlib, json, sys, webdataset
decoded = webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode("pil")
labels = [int(sample["cls"]) for sample in decoded]
raw = webdataset.WebDataset(sys.argv[1:], shardshuffle=False)
files = [sample.get("jpeg") or sample["png"] for sample in raw]
print(json.dumps([labels, [hashlib.sha256(file).hexdigest() for file in files]]))
"""


def test_webdataset_reads_our_shards(folder, packed):
    shards = [str(path) for path in sorted(packed.glob("train-*.tar"))]
    output = subprocess.run(
        this_python("-c", READER, *shards), capture_output=True, text=True, check=True
    ).stdout
    labels, sums = json.loads(output)
    train = load(packed).train
    assert labels == train.labels[np.lexsort((train.offset, train.file))].tolist()
    files = (folder / "train").glob("*/*")
    assert sorted(sums) == sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)


@pytest.fixture
def foreign(folder, tmp_path):
    """Shards that WebDataset's own writer made, without an index of ours."""
    root = tmp_path / "foreign"
    root.mkdir()
    for split in ("train", "val"):
        pattern = str(root / f"imagenet-{split}-%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
            for label, name in enumerate(("ant", "bee", "cat")):
                for path in sorted((folder / split / name).iterdir()):
                    key = f"{split}/{name}_{path.stem}"
                    extension = path.suffix[1:].lower()
                    writer.write(
                        {"__key__": key, extension: path.read_bytes(), "cls": label, "json": {}}
                    )
    return root


def test_we_read_webdatasets_shards(folder, foreign, tmp_path):
    cache = tmp_path / "cache"
    shards = load(foreign, cache=cache)
    assert shards.classes == ("0", "1", "2")
    assert len(shards.train.labels) == 27
    found, labels = images_of(shards, foreign).eval_batch(np.arange(9))
    wanted, wanted_labels = source_of(folder).eval_batch(np.arange(9))
    assert torch.equal(found, wanted)
    assert torch.equal(labels, wanted_labels)
    again = load(foreign, cache=cache)
    assert again.train.offset.tolist() == shards.train.offset.tolist()
    assert len(list(cache.iterdir())) == 1


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"x"}, "sample a has no label"),
        ({"a.cls": b"1"}, "sample a has no readable image"),
        ({"a.jpg": b"x", "a.cls": b"one"}, "a.cls: found b'one'; a label must be a number"),
        ({"a.jpg": b"x", "a.cls": b"9" * 30}, "a.cls: found b'999"),
        (
            {"a.heic": b"x", "a.cls": b"1"},
            r"sample a has no readable image \(found a.heic",
        ),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "a has two images, a.jpg and a.png; it"),
        ({"a.jpg": b"x", "./a.cls": b"1", "./a.jpg": b"y"}, "a has two images, a.jpg and ./a.jpg"),
        ({"b/a.cls": b"1", "./b//a.cls": b"2"}, r"sample b/a has two labels \(.cls\)"),
    ],
)
def test_a_sample_that_is_not_whole_is_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        scan_tar(tar_of(tmp_path / "s.tar", files))


def test_a_key_twice_is_named(tmp_path):
    """Half of the data would be lost: tar files that were appended to."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("x/1.jpg", "x/1.txt", "x/1.jpg", "x/1.cls"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(UserError, match="s.tar: sample x/1 has two images") as caught:
        scan_tar(tmp_path / "s.tar")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_sample_in_a_foreign_shard_is_passed_over_and_counted(foreign):
    """Archives from a Mac carry a file ``._x`` beside each; masks and captions are nobody's."""
    wanted = load(foreign)
    for path in sorted(foreign.glob("*.tar")):
        with tarfile.open(path, "a") as tar:
            names = [
                "./._0.jpg",
                ".DS_Store",
                "__MACOSX/x.jpg",
                ".git/y.jpg",
                "README.md",
                "LICENSE",
            ]
            names += [f"{wanted.train.files.index(path.name)}.txt"] if "train" in path.name else []
            for name in names:
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    found = load(foreign)
    for split in ("train", "val"):
        for array in ("file", "offset", "size", "labels"):
            first, second = (getattr(getattr(set_, split), array) for set_ in (wanted, found))
            assert first.tolist() == second.tolist()
    shards = len(list(foreign.glob("*.tar")))
    counts = f"{4 * shards} hidden, {shards} .md, {shards} without an extension, "
    assert found.left_out == counts + f"{len(found.train.files)} .txt"


def test_second_names_in_a_foreign_shard_are_samples(tmp_path):
    """GNU tar writes files of one inode once, and links for the rest."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in (("a.jpg", b"image"), ("a.cls", b"7")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in (("b.jpg", "a.jpg"), ("b.cls", "a.cls")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            tar.addfile(member)
        member = tarfile.TarInfo("c.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(member)
    left_out = Counter()
    first, second = scan_tar(tmp_path / "s.tar", left_out)
    assert first == second == (512, 5, 7)
    assert left_out == {"links and devices": 1}
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        member = tarfile.TarInfo("b.jpg")
        member.type, member.linkname = tarfile.LNKTYPE, "elsewhere.jpg"
        tar.addfile(member)
    with pytest.raises(UserError, match="t.tar: b.jpg is a link to elsewhere.jpg, which does not"):
        scan_tar(tmp_path / "t.tar")


def test_shards_of_somebody_else_are_not_written_over(folder, tmp_path):
    (tmp_path / "train-000001.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="train-000001.tar is there already, and pack did not"):
        pack(str(folder), tmp_path, 1, 10, QUIET)
    assert contents(tmp_path) == {"train-000001.tar": b"precious"}


@pytest.mark.parametrize("damage", ["at a member", "in a header", "a header's byte"])
def test_no_sample_is_lost_in_silence(tmp_path, damage):
    """tarfile takes a bad header for the end of the archive."""
    files = {f"{i}.{e}": b"0" for i in range(4) for e in ("jpg", "cls")} | {"README": b"no sample"}
    path = tar_of(tmp_path / "s.tar", files)
    assert len(scan_tar(path)) == 4
    data = bytearray(path.read_bytes())
    third = 4 * 1024
    if damage == "at a member":
        data = data[:third]
    elif damage == "in a header":
        data = data[: third + 100]
    else:
        data[third + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"s.tar: truncated or damaged at byte 4096"):
        scan_tar(path)


def test_a_stray_label_is_named(foreign):
    extra = {"z.jpg": b"0", "z.cls": b"9000000"}
    tar_of(foreign / "imagenet-train-9999.tar", extra)
    with pytest.raises(UserError, match="imagenet-train-9999.tar: .* has label 9000000; allowed"):
        load(foreign)
    with pytest.raises(UserError, match="has label 9000000; allowed with 1000 classes: 0 to 999"):
        load_shards(str(foreign), "*train*.tar", "*val*.tar", None, num_classes=1000)
    (foreign / "imagenet-train-9999.tar").unlink()
    found = load_shards(str(foreign), "*train*.tar", "*val*.tar", None, 1000)
    assert len(found.classes) == 1000


def test_a_truncated_or_compressed_foreign_shard_is_named(foreign, tmp_path):
    path = foreign / "imagenet-train-0001.tar"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"JFIF") + 50])
    with pytest.raises(UserError, match="imagenet-train-0001.tar: truncated") as caught:
        load(foreign)
    assert len(str(caught.value).splitlines()) == 1
    with tarfile.open(tmp_path / "c.tar", "w:gz") as tar:
        tar.add(__file__, "a.jpg")
    with pytest.raises(UserError, match="not an uncompressed tar file"):
        scan_tar(tmp_path / "c.tar")


def break_index(root, change):
    manifest = json.loads((root / "dataset.json").read_text())
    change(manifest)
    (root / "dataset.json").write_text(json.dumps(manifest))


def lose_class(manifest):
    manifest["classes"].pop()


def name_elsewhere(name):
    def change(manifest):
        manifest["train"][0]["name"] = name

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_class, "has label 2; allowed with 2 classes: 0 to 1"),
        (name_elsewhere("../../etc/passwd"), "'../../etc/passwd' is not the name of a shard"),
        (name_elsewhere("/etc/passwd.tar"), "'/etc/passwd.tar' is not the name of a shard"),
        (name_elsewhere("train-9.tar"), "train-9.tar: No such file"),
        (lambda m: m.pop("classes"), "dataset.json: damaged: KeyError"),
        (lambda m: m.update(format="hvd_lars shards 7"), "format 'hvd_lars shards 7'"),
        (
            lambda m: m["train"][0].update(bytes=float("inf")),
            "dataset.json: damaged: OverflowError",
        ),
    ],
)
def test_a_wrong_index_gets_one_line(packed, change, message):
    break_index(packed, change)
    with pytest.raises(UserError, match=message) as caught:
        load(packed)
    assert len(str(caught.value).splitlines()) == 1


def test_a_truncated_shard_is_named_at_the_start_and_when_read(packed):
    shards = load(packed)
    path = packed / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="train-000002.tar: truncated or replaced: 2000 bytes"):
        load(packed)
    source = images_of(shards, packed)
    assert len(source.train_batch(0, np.arange(27))[0]) == 27
    assert source.unreadable  # others take their place
    for line, evaluation in source.unreadable:
        assert not evaluation
        assert line.startswith(f"{path}: truncated: the image at byte")


def test_a_pattern_may_not_lead_out_of_the_folder(foreign):
    with pytest.raises(UserError, match="data.train_shards: '../x.tar': leads out of data.root"):
        load_shards(str(foreign), "../x.tar", "*val*.tar", None)
    with pytest.raises(UserError, match="neither dataset.json nor shards that match nothing"):
        load_shards(str(foreign), "nothing*.tar", "*val*.tar", None)


@pytest.mark.parametrize("arrays", ["huge", "flat", "outside"])
def test_a_hostile_index_reads_nothing_else(packed, arrays):
    file = packed / "index.safetensors"
    tensors = load_file(file)
    if arrays == "huge":  # the sum of the two overflows
        tensors["train/offset"] = tensors["train/offset"] * 0 + 2**62 + 512
        tensors["train/size"] = tensors["train/size"] * 0 + 2**62
    elif arrays == "flat":
        tensors["train/labels"] = np.zeros((27, 2), dtype=np.int64)
    else:
        tensors["train/shard"] = tensors["train/shard"] + 7
    save_file(tensors, file)
    break_index(packed, lambda m: m.update(index=hashlib.sha256(file.read_bytes()).hexdigest()))
    with pytest.raises(UserError, match=r"lies beyond its end|do not fit together"):
        load(packed)


def test_open_files_are_not_sent_to_workers_and_few_suffice(packed, monkeypatch):
    from hvd_lars.data import located as shards

    store = LocatedImages(packed, load(packed).train)
    store.open(0)
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.open(5).pixels(), store.open(5).pixels())
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    few = LocatedImages(packed, load(packed).train)
    whole = [few.open(i).pixels() for i in range(27)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert all(torch.equal(few, store.open(i).pixels()) for i, few in enumerate(whole))


def test_the_nodes_own_copy_is_whole_and_made_once(packed, tmp_path):
    shards = load(packed)
    cache = tmp_path / "node"
    copy_shards(shards, str(cache))
    root = cached_root(shards, str(cache))
    tars = {name: data for name, data in contents(packed).items() if name.endswith(".tar")}
    assert contents(root) == tars
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    (root / "train-000000.tar").write_bytes(b"torn")
    copy_shards(shards, str(cache))
    assert contents(root) == tars
    after = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    assert [p.name for p in before if after[p] != before[p]] == ["train-000000.tar"]


def test_a_copy_is_compared_with_its_checksum(packed, tmp_path):
    shards = load(packed)
    data = bytearray((packed / "val-000000.tar").read_bytes())
    data[600] ^= 1
    (packed / "val-000000.tar").write_bytes(data)
    with pytest.raises(UserError, match="val-000000.tar: its copy in data.cache_dir does"):
        copy_shards(shards, str(tmp_path / "node"))
    assert not list((tmp_path / "node").rglob("*val*"))


def test_a_cache_without_room_or_rights_says_so(packed, tmp_path, monkeypatch):
    shards = load(packed)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="data.cache_dir: .*file.*: Not a directory"):
        copy_shards(shards, str(tmp_path / "file/node"))
    huge = shards.__class__(**shards.__dict__ | {"bytes": dict.fromkeys(shards.bytes, 10**15)})
    with pytest.raises(UserError, match=r"data.cache_dir: .*: 4000000.0 GB are needed"):
        copy_shards(huge, str(tmp_path / "node"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such", "{tmp}/s"], "SRC: /no/such: no such folder"),
        (["{images}", "{tmp}/file/s"], "file/s/.packing: cannot be written: Not a directory"),
        (["{images}", "{tmp}/s", "--workers=0"], "--workers: found 0; must be 1 or more"),
    ],
)
def test_mistakes_of_pack(folder, tmp_path, arguments, message):
    (tmp_path / "file").write_text("in the way")
    code, output = hvd_lars("pack", *(a.format(tmp=tmp_path, images=folder) for a in arguments))
    assert code == 2
    assert message in output
    assert len(output.splitlines()) == 1


def test_shards_do_not_go_into_their_own_source(own):
    folder, _ = own
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="is the data set itself; name another folder"):
        pack(str(folder), folder / "train" / "..", 1, 10, QUIET)
    assert sorted(folder.rglob("*")) == before
