"""Every form of the same images is the same data; what is damaged is named."""

import json
import os
import shutil
import struct
import zipfile
import zlib

import forms
import numpy as np
import pyarrow.parquet
import pytest
import torch
from test_image_folder import make_folder, source_of

from hvd_lars.assemble.check import examine
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.config.binding import changes
from hvd_lars.config.file import load_config
from hvd_lars.data.forms import arrow
from hvd_lars.data.forms.archives import DEVKIT, VAL
from hvd_lars.data.forms.recognise import recognise
from hvd_lars.data.lists import read_list
from hvd_lars.data.shards.cache import verify
from hvd_lars.data.shards.index import load_shards
from hvd_lars.data.shards.origins import compare
from hvd_lars.data.shards.samples import scan_tar
from hvd_lars.data.shards.samples_to_pack import collect, stored_order
from hvd_lars.data.shards.shrink import Shrink
from hvd_lars.data.shards.writer import pack
from hvd_lars.errors import UserError
from hvd_lars.sources import BuildContext

QUIET = lambda done, total: None  # noqa: E731
SIDES = "image_size: 16, eval_resize: 20, workers: 0"
WRITERS = {
    "archives": (forms.archives, {}),
    "tensorflow": (forms.tfrecords, {}),
    "tfds": (forms.tfrecords, {"spelling": "tfds"}),
    "arrow": (forms.arrow, {}),
    "recordio": (forms.recordio, {}),
    "several labels": (forms.recordio, {"labels": 3}),
    "zip": (forms.zipped, {}),
    "zip for each": (forms.zip_each, {}),
    "zip for each with strays": (forms.zip_each, {"above": "", "strays": True}),
    "zip for each with its folder": (forms.zip_each, {"above": ""}),
    "zip for each with folders": (forms.zip_each, {"above": "ILSVRC/Data/CLS-LOC/"}),
    "kaggle": (forms.kaggle, {}),
    "tiny": (forms.tiny, {}),
    "places": (forms.places, {}),
}
# Other names of classes, or none: the same images and labels, and another identity.
NAMELESS = ("recordio", "several labels", "places", "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("images") / "images")
    forms.number_val(folder)
    for name, path in forms.images(folder, "train"):
        path.rename(path.with_name(f"{name}_{path.name}"))
    return folder


def data_of(root, **keys):
    text = ", ".join([f"root: {root}", SIDES, *(f"{key}: {value}" for key, value in keys.items())])
    return load_config("digits", ["data={" + text + "}"]).data


def built(root, **keys):
    return data_of(root, **keys).build(BuildContext(LocalCommunicator(), 0))


def same(a, b):
    return all(torch.equal(first, second) for first, second in zip(a, b, strict=True))


def check_same(found, wanted):
    for epoch in (0, 1):
        everything = np.arange(wanted.num_train)
        assert same(found.train_batch(epoch, everything), wanted.train_batch(epoch, everything))
    everything = np.arange(wanted.num_eval)
    assert same(found.eval_batch(everything), wanted.eval_batch(everything))
    assert not found.unreadable


@pytest.mark.parametrize("form", WRITERS)
def test_a_form_is_recognised_and_holds_the_folders_images(folder, tmp_path, form, capfd):
    write, options = WRITERS[form]
    root = write(folder, tmp_path / "form", **options)
    before = sorted(path for path in root.rglob("*"))
    found, wanted = built(root), source_of(folder)
    check_same(found, wanted)
    assert (found.identity == wanted.identity) == (form not in NAMELESS)
    kind = recognise(root).kind
    assert f"(data.name={kind})" in capfd.readouterr().err
    check_same(built(root, name=kind), wanted)
    assert sorted(path for path in root.rglob("*")) == before  # nothing beside the user's data


@pytest.mark.parametrize("form", [*WRITERS, "parquet"])
def test_a_form_is_packed(folder, tmp_path, form):
    write, options = WRITERS.get(form, (forms.parquet, {}))
    root = write(folder, tmp_path / "form", **options)
    pack(str(root), tmp_path / "shards", 1, 5, QUIET)
    found, wanted = built(tmp_path / "shards"), source_of(folder)
    check_same(found, wanted)
    assert (found.identity == wanted.identity) == (form not in NAMELESS)
    again = pack(str(root), tmp_path / "shards", 1, 5, QUIET)
    assert again.written == 0


def test_the_folder_is_packed_as_before(folder, tmp_path):
    """Shards of an earlier version are taken up, with their index and their order."""
    pack(str(folder), tmp_path / "shards", 1, 5, QUIET)
    path = tmp_path / "shards/dataset.json"
    manifest = json.loads(path.read_text())
    del manifest["images"]
    path.write_text(json.dumps(manifest))
    assert pack(str(folder), tmp_path / "shards", 1, 5, QUIET).written == 0
    shards = load_shards(str(tmp_path / "shards"), "", "", None)
    assert shards.identity != source_of(folder).identity


def test_parquet_is_packed_and_not_read_in_place(folder, tmp_path):
    root = forms.parquet(folder, tmp_path / "parquet")
    with pytest.raises(UserError, match=f"pack it first: hvd-lars pack {root} FOLDER"):
        built(root)


def test_parquet_is_read_a_batch_at_a_time(folder, tmp_path, monkeypatch):
    """In stored order without starting again; in any other order all the same."""
    monkeypatch.setattr(arrow, "_BATCH", 2)
    found = collect(str(forms.parquet(folder, tmp_path / "parquet"))).train
    stored = [(split, path.read_bytes()) for split, path in forms.images(folder, "train")]
    opened = []
    open_group = arrow.ParquetImages._open
    monkeypatch.setattr(arrow.ParquetImages, "_open",
                        lambda *a: opened.append(a) or open_group(*a))  # fmt: skip
    for order in (range(len(found)), reversed(range(len(found)))):
        for index in order:
            assert found.read(index) == stored[index][1]
    ordered = stored_order(found)
    opened.clear()
    for index in ordered:
        found.read(int(index))
    assert len(opened) == -(-len(found) // 5)  # once for each row group


def test_a_missing_parquet_file_is_named(folder, tmp_path):
    root = forms.parquet(folder, tmp_path / "parquet")
    os.rename(root / "data/train-00000-of-00001.parquet",
              root / "data/train-00002-of-00003-0a1b2c.parquet")  # fmt: skip
    with pytest.raises(UserError, match="no train-00000-of-00003 in it"):
        collect(str(root))


@pytest.mark.parametrize(
    ("write", "name", "copy", "message"),
    [
        (forms.parquet, "data/train-00000-of-00001.parquet", "data/train-00000-of-00001-ab.parquet",
         "are the same part of two data sets"),
        (forms.tfrecords, "train-00000-of-00002", "train-00000-of-00001",
         "train-NNNNN-of-00001 and train-NNNNN-of-00002 in it: two data sets"),
        (forms.recordio, "train.rec", "train_480.rec", "train.rec, train_480.rec: one file of all"),
    ],
)  # fmt: skip
def test_two_versions_of_the_same_images_are_not_mixed(
    folder, tmp_path, write, name, copy, message
):
    root = write(folder, tmp_path / "form")
    shutil.copy(root / name, root / copy)
    with pytest.raises(UserError, match=message):
        collect(str(root))


def test_classes_of_other_files_are_in_the_same_order(folder, tmp_path):
    root = forms.parquet(folder, tmp_path / "parquet")
    path = next(root.glob("data/validation*"))
    table = pyarrow.parquet.read_table(path)
    text = table.schema.metadata[b"huggingface"]
    turned = text.replace(b'"ant", "bee", "cat"', b'"cat", "bee", "ant"')
    assert turned != text
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": turned}), path)
    with pytest.raises(UserError, match=r"its classes .*: label 0 is cat here, ant there"):
        collect(str(root))


def test_a_label_that_hugging_face_calls_a_value_is_taken(folder, tmp_path):
    root = forms.parquet(folder, tmp_path / "parquet")
    features = {"image": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "int64"}}
    text = json.dumps({"info": {"features": features}}).encode()
    for path in root.glob("data/*"):
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": text}), path)
    assert collect(str(root)).classes == ("0", "1", "2")


@pytest.mark.parametrize("field", [True, False])
def test_names_in_a_zip_of_info_zip_are_utf8(folder, tmp_path, field, monkeypatch):
    """It writes them without the flag, and perhaps once more in a field of their own."""
    root = shutil.copytree(folder, tmp_path / "images")
    for split in ("train", "val"):
        os.rename(root / split / "ant", root / split / "猫")

    def encode(info):
        return info.filename.encode(), info.flag_bits

    monkeypatch.setattr(zipfile.ZipInfo, "_encodeFilenameFlags", encode)
    write = zipfile.ZipFile.write

    def named(archive, path, name):
        info = zipfile.ZipInfo(name)
        unicode = struct.pack("<BI", 1, zlib.crc32(name.encode())) + name.encode()
        info.extra = struct.pack("<HH", 0x7075, len(unicode)) + unicode if field else b""
        archive.writestr(info, path.read_bytes())

    monkeypatch.setattr(zipfile.ZipFile, "write", named)
    target = forms.zipped(root, tmp_path / "zip")
    monkeypatch.setattr(zipfile.ZipFile, "write", write)
    monkeypatch.undo()
    assert zipfile.ZipFile(target / "images.zip").infolist()[-1].flag_bits == 0
    found, wanted = built(target), source_of(root)
    assert found.identity == wanted.identity
    check_same(found, wanted)


@pytest.mark.parametrize("form", ["zip", "tensorflow", "recordio", "parquet"])
def test_what_macos_leaves_beside_files_is_no_data(folder, tmp_path, form):
    root = (WRITERS | {"parquet": (forms.parquet, {})})[form][0](folder, tmp_path / "form")
    before = list(collect(str(root)).train.labels)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert list(collect(str(root)).train.labels) == before


def test_columns_that_do_not_fit_are_named_with_their_types(folder, tmp_path):
    root = forms.parquet(folder, tmp_path / "parquet")
    path = next(root.glob("data/train*"))
    table = pyarrow.parquet.read_table(path).replace_schema_metadata({})
    labels = pyarrow.array([float(value) for value in table["label"].to_pylist()])
    at = table.schema.get_field_index("label")
    pyarrow.parquet.write_table(table.set_column(at, "label", labels), path)
    with pytest.raises(UserError, match=r"label \(double\).*; needed: .* of integer labels"):
        collect(str(root))


def test_names_of_hugging_face_are_the_folders(folder, tmp_path):
    """Its train files are called n01440764_10026_n01440764.JPEG."""
    wnids = {"ant": "n00000001", "bee": "n00000002", "cat": "n00000003"}
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    plain = shutil.copytree(folder, tmp_path / "plain")
    for split in ("train", "val"):
        for name, wnid in wnids.items():
            os.rename(renamed / split / name, renamed / split / wnid)
            os.rename(plain / split / name, plain / split / wnid)
    for name, path in forms.images(renamed, "train"):
        path.rename(path.with_name(f"{path.stem}_{name}{path.suffix}"))
    found, wanted = built(forms.arrow(renamed, tmp_path / "arrow")), source_of(plain)
    assert found.identity == wanted.identity
    check_same(found, wanted)


def test_the_magic_number_in_an_image_splits_its_record(folder, tmp_path):
    """MXNet's writer cuts such a record in parts; the image is whole again when it is read."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    magic = (0xCED7230A).to_bytes(4, "little")
    paths = [path for _, path in forms.images(changed, "train")]
    for number, path in enumerate(paths[:3]):  # Pillow and turbojpeg ignore what follows an image
        data = path.read_bytes()
        path.write_bytes(data + bytes(-len(data) % 4 + number) + (magic + b"more") * 2 + magic)
    root = forms.recordio(changed, tmp_path / "rec")
    assert len((root / "train.rec").read_bytes().split(magic)) > len(paths) + 4
    packed = collect(str(root))
    assert [packed.train.read(i) for i in range(len(paths))] == [p.read_bytes() for p in paths]
    check_same(built(root), source_of(changed))


def test_lists(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    rows = [(f"train/{name}/{path.name}", name) for name, path in forms.images(folder, "train")]
    numbers = {name: str(i) for i, name in enumerate(forms.classes_of(folder))}
    val = [(f"val/{name}/{path.name}", numbers[name]) for name, path in forms.images(folder, "val")]
    (root / "train.csv").write_text("label,path\n" + "".join(f"{b},{a}\n" for a, b in rows[::-1]))
    (root / "val.txt").write_text("".join(f"{a} {b}\n" for a, b in val))
    found, wanted = built(root, train_list="train.csv", val_list="val.txt"), source_of(folder)
    assert found.identity == wanted.identity
    check_same(found, wanted)
    check_same(built(root, name="imagefolder", val_list="val.txt"), wanted)
    (root / "some.csv").write_text("".join(f"{a},{b}\n" for a, b in rows if b != "bee"))
    with pytest.raises(UserError, match=r"val.txt: .* has label '2'; allowed: .* or 0 to 1"):
        built(root, train_list="some.csv", val_list="val.txt")
    os.utime(root / "some.csv", ns=(1, 1))
    (root / "fewer.txt").write_text("".join(f"{a} {b}\n" for a, b in val if b != "2"))
    assert built(root, train_list="some.csv", val_list="fewer.txt").num_classes == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no image in it"),
        ("a.jpg\n", "line 1: found 'a.jpg'; needed: a path and a label"),
        ("a.jpg,\n", "line 1: found"),
        ("path,label\na.jpg,\n", "line 2: found"),
        ("a.jpg 4000000000\n", "found label 4000000000; allowed in a list of 1 images: 0 to 1"),
        (b"\xff\xfe\x00", "not text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_damaged_lists_are_named(folder, text, message, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    if text is not None:
        (root / "list").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"list: {message}") as caught:
        built(root, train_list="list")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_name,label\ntrain/a.jpg,1\n", "line 1: found .*; needed: a path of an image and"),
        ("\n\nPath,Label\n", "no image in it"),
    ],
)
def test_a_first_row_of_unknown_names_is_no_image(folder, tmp_path, text, message):
    root = shutil.copytree(folder, tmp_path / "images")
    (root / "list").write_text(text)
    with pytest.raises(UserError, match=rf"list: {message}"):
        built(root, train_list="list")


def test_paths_of_a_list_may_have_spaces_and_commas(tmp_path):
    (tmp_path / "list").write_text("my dir/a,b.jpg\t5\nmy dir/c.jpg\t0\n")
    assert read_list(tmp_path / "list") == [("my dir/a,b.jpg", "5"), ("my dir/c.jpg", "0")]


def test_a_list_has_whole_names_of_classes_and_perhaps_a_head(tmp_path):
    rows = [("a.jpg", "great white shark"), ("b.jpg", "great grey owl")]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{a},{b}\n" for a, b in rows))
    (tmp_path / "list.tsv").write_text("Path\tLabel\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    assert read_list(tmp_path / "list.csv") == read_list(tmp_path / "list.tsv") == rows
    (tmp_path / "boxes.csv").write_text("ImageId,PredictionString\nx,n01978287 85 1 499 272\n")
    assert read_list(tmp_path / "boxes.csv") == [("x", "n01978287")]


def test_one_class_is_no_data_set(folder, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copytree(folder / "train", tmp_path / "images/train/all")
    shutil.copytree(folder / "val", tmp_path / "images/val/all")
    with pytest.raises(UserError, match="found one class, all; two or more are needed"):
        built(tmp_path / "images")


def test_a_dataset_json_of_others_is_no_sign_of_shards(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    (root / "dataset.json").write_text('{"author": "somebody"}')
    check_same(built(root), source_of(folder))


def test_records_to_test_on_are_left_out_beside_those_to_validate(folder, tmp_path):
    root = forms.recordio(folder, tmp_path / "form")
    shutil.copy(root / "train.rec", root / "test.rec")
    check_same(built(root), source_of(folder))
    os.rename(root / "val.rec", root / "other.rec")
    assert built(root).num_eval == built(root).num_train


def test_a_shard_is_not_in_both_splits(folder, tmp_path):
    pack(str(folder), tmp_path / "shards", 1, 5, QUIET)
    (tmp_path / "foreign").mkdir()
    for path in (tmp_path / "shards").glob("*.tar"):
        name = path.name.replace("imagenet", "retrieval")
        shutil.copy(path, tmp_path / "foreign" / f"retrieval-{name}")
    with pytest.raises(UserError, match=r"retrieval.*train.*\.tar: matches data.train_shards"):
        built(tmp_path / "foreign", name="shards")


def test_an_unpacked_folder_beside_its_archives_is_read(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    (root / DEVKIT).write_bytes(b"kept")
    (root / "ILSVRC/Data/CLS-LOC/train").mkdir(parents=True)
    assert built(root).identity == source_of(folder).identity


def test_the_archive_of_training_alone(folder, tmp_path):
    root = forms.archives(folder, tmp_path / "archives")
    (root / VAL).unlink()
    assert built(root, val_fraction=0.25).num_train == 9


def test_names_of_classes_may_have_spaces(folder, tmp_path):
    root = forms.tfrecords(folder, tmp_path / "form", spelling="tfds")
    (root / "label.labels.txt").write_text("an ant\na bee\na cat\n")
    assert built(root).identity.classes == ("an ant", "a bee", "a cat")


def test_images_without_names_of_classes_with_dots_are_packed(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    for split in ("train", "val"):
        os.rename(root / split / "ant", root / split / "001.Ant of the wood")
    for path in (arrow := forms.arrow(root, tmp_path / "arrow", names=False)).rglob("*.arrow"):
        assert path.stat().st_size
    pack(str(arrow), tmp_path / "shards", 1, 5, QUIET)
    assert verify(tmp_path / "shards", 1, QUIET) == 5
    rows = scan_tar(tmp_path / "shards/train-000000.tar")
    assert len(rows) == 5
    assert built(tmp_path / "shards").num_train == 12


def test_packing_keeps_few_files_open(folder, tmp_path, monkeypatch):
    root = forms.tfrecords(folder, tmp_path / "form", files=6)
    found = collect(str(root))
    before = len(os.listdir("/proc/self/fd"))
    packed = pack(str(root), tmp_path / "shards", 1, 2, QUIET)
    compare(tmp_path / "shards", packed.sources, QUIET)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert found.train.read(0)


def test_the_index_of_an_earlier_version_keeps_its_order(folder, tmp_path):
    target = tmp_path / "shards"
    pack(str(folder), target, 1, 5, QUIET)
    manifest = json.loads((target / "dataset.json").read_text())
    del manifest["images"]
    (target / "dataset.json").write_text(json.dumps(manifest))
    (target / "index.safetensors").unlink()
    pack(str(folder), target, 1, 5, QUIET)
    found = load_shards(str(target), "", "", None)
    assert found.train.file.tolist() == sorted(found.train.file.tolist())


def test_validation_is_a_name_of_val(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    os.rename(root / "val", root / "validation")
    found, wanted = built(root), source_of(folder)
    assert found.identity == wanted.identity
    check_same(found, wanted)


def test_classes_without_test_images_are_named(folder, tmp_path, capfd):
    root = shutil.copytree(folder, tmp_path / "images")
    shutil.rmtree(root / "val/bee")
    found = built(root)
    assert (found.num_classes, found.num_eval) == (3, 4)
    assert "no test images of 1 of 3 classes: bee" in capfd.readouterr().err


def test_an_empty_class_of_test_images_is_as_one_that_is_not_there(folder, tmp_path, capfd):
    root = shutil.copytree(folder, tmp_path / "images")
    for path in (root / "val/bee").iterdir():
        path.unlink()
    found = built(root)
    assert (found.num_classes, found.num_eval) == (3, 4)
    assert "no test images of 1 of 3 classes: bee" in capfd.readouterr().err


def test_shards_are_not_written_among_the_images(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    for place in ("train", "train/ant", "val/new", "."):
        with pytest.raises(UserError, match="is the data set itself"):
            pack(str(root), root / place, 1, 5, QUIET)
    pack(str(root), root / "shards", 1, 5, QUIET)


def test_tfrecords_to_test_on_are_taken_where_there_are_none_to_validate(folder, tmp_path):
    root = forms.tfrecords(folder, tmp_path / "form")
    wanted = collect(str(root)).val.labels
    for path in root.glob("validation-*"):
        shutil.copy(path, path.with_name(path.name.replace("validation", "mine-test.tfrecord")))
    assert list(collect(str(root)).val.labels) == list(wanted)
    for path in root.glob("validation-*"):
        path.unlink()
    assert list(collect(str(root)).val.labels) == list(wanted)


def test_labels_that_count_from_1_are_noticed(folder, tmp_path, capfd, monkeypatch):
    names = forms.classes_of(folder)
    monkeypatch.setattr(forms, "classes_of", lambda _: ["", *names])
    assert built(forms.recordio(folder, tmp_path / "form")).num_classes == 4
    error = capfd.readouterr().err
    assert "no training images of 1 of 4 classes: 0; labels count from 0" in error


@pytest.mark.parametrize("form", ["folder", "zip", "tensorflow", "classes"])
def test_a_share_of_training_is_held_out_where_there_is_no_val(folder, tmp_path, form):
    """Nobody's labels change, no image is in both sets, and every run holds the same ones out."""
    changed = shutil.copytree(folder, tmp_path / "images")
    shutil.rmtree(changed / "val")
    root = tmp_path / "form"
    if form == "classes":  # ImageNet-21K: a tar file for each class
        root.mkdir()
        for number, name in enumerate(forms.classes_of(folder)):
            paths = sorted((folder / "train" / name).iterdir())
            tar = forms.tar_of([(p.name, p.read_bytes()) for p in paths])
            (root / f"n0000000{number}.tar").write_bytes(tar)
    else:
        writers = {"folder": shutil.copytree, "zip": forms.zipped, "tensorflow": forms.tfrecords}
        writers[form](changed, root)
        if form == "tensorflow":
            for path in root.glob("validation*"):
                path.unlink()
    with pytest.raises(UserError):
        built(root)
    found, again = built(root, val_fraction=0.25), built(root, val_fraction=0.25)
    assert (found.num_train, found.num_eval) == (9, 3)
    assert found.identity == again.identity
    images, labels = found.eval_batch(np.arange(3))
    assert same((images, labels), again.eval_batch(np.arange(3)))
    kept = found.train_batch(0, np.arange(9))[1]
    assert sorted([*labels.tolist(), *kept.tolist()]) == [0] * 4 + [1] * 4 + [2] * 4
    assert built(root, val_fraction=0.5).identity != found.identity
    pack(str(root), tmp_path / "shards", 1, 5, QUIET)
    with pytest.raises(UserError, match=r"no images in val; data.val_fraction=0.02 holds some"):
        built(tmp_path / "shards")
    packed = built(tmp_path / "shards", val_fraction=0.25)
    assert packed.identity == found.identity
    assert same(packed.eval_batch(np.arange(3)), (images, labels))


def test_a_run_may_go_on_from_another_form(tmp_path):
    """Bundled configs said imagefolder before they said auto."""
    form = [f"data={{name: {name}, root: {tmp_path}}}" for name in ("imagefolder", "auto", "zip")]
    configs = [load_config("digits", [data]) for data in form]
    for other in configs[1:]:
        assert changes(configs[0], other, "run", lambda key, *_: key) == []


def test_what_is_no_data_set_is_described(tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="found folders holiday; files: 1 .txt; known are class"):
        built(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        built(tmp_path / "nothing")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match="that need a name; set data.name=cifar10"):
        built(tmp_path)


def test_a_copy_on_the_node_is_read(folder, tmp_path):
    root = forms.tfrecords(folder, tmp_path / "records")
    found = built(root, cache_dir=tmp_path / "node")
    copies = list((tmp_path / "node").rglob("*-of-*"))
    assert sorted(path.name for path in copies) == sorted(path.name for path in root.iterdir())
    for path in root.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    check_same(found, source_of(folder))
    with pytest.raises(UserError, match="imagefolder cannot be copied to it"):
        built(folder, cache_dir=tmp_path / "node")


def test_a_scan_is_kept_until_a_file_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = forms.tfrecords(folder, tmp_path / "records")
    built(root)
    monkeypatch.setattr("hvd_lars.data.forms.tfrecord._scan", None)
    check_same(built(root), source_of(folder))
    os.utime(root / "train-00000-of-00002", ns=(1, 1))
    with pytest.raises(TypeError):
        built(root)


@pytest.mark.parametrize("side", [25, 30, 64])
def test_shrunk_shards(folder, tmp_path, side, capfd):
    """Images are smaller, only where they were larger; the run's data say so."""
    pack(str(folder), tmp_path / "small", 1, 5, QUIET, Shrink(side, 90))
    pack(str(folder), tmp_path / "plain", 1, 5, QUIET)
    small, plain = built(tmp_path / "small"), built(tmp_path / "plain")
    assert small.identity.prepared == f"shorter side {side}, JPEG quality 90"
    assert small.identity != plain.identity
    store = small._train
    sizes = {(store.open(i).height, store.open(i).width) for i in range(small.num_train)}
    assert sizes == ({(25, 33)} if side == 25 else {(30, 40)})
    found, wanted = (source.eval_batch(np.arange(6))[0].float() for source in (small, plain))
    assert (found - wanted).abs().mean() < (12 if side == 25 else 0.001)
    again = pack(str(folder), tmp_path / "small", 1, 5, QUIET, Shrink(side, 90))
    assert again.written == 0
    data = f"data={{root: {tmp_path / 'small'}, {SIDES}}}"
    config = load_config("digits", [data, "model.name=resnet18_cifar", "train.global_batch=6"])
    line = f"images were packed with shorter side {side}, JPEG quality 90, which published results"
    assert any(warning.startswith(line) for warning in examine(config, 1).warnings)
    with pytest.raises(UserError, match="of other options of pack"):
        pack(str(folder), tmp_path / "small", 1, 5, QUIET, Shrink(side, 80))


def damaged(name, change):
    def apply(root):
        path = next(root.glob(name))
        path.write_bytes(change(path.read_bytes()))

    return apply


def add_again(root):
    path = next(root.glob("*.zip"))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        name = next(name for name in archive.namelist() if "/train/" in name)
        archive.writestr(name, b"later")


@pytest.mark.parametrize(
    ("write", "options", "change", "message"),
    [
        (forms.tfrecords, {}, damaged("train-00001*", lambda d: d[:-3]), "truncated"),
        (forms.tfrecords, {}, damaged("train-00001*", lambda d: b"?" + d[1:]), "not a TFRecord"),
        (
            forms.tfrecords,
            {},
            damaged("train-00001*", lambda d: forms.record(forms.example({"a": b"b"}))),
            "has a; needed: image/encoded and image/class/label, or image and label",
        ),
        (
            forms.tfrecords,
            {},
            damaged("train-00001*", lambda d: forms.record(b"\x0f\xff")),
            "is no Example",
        ),
        (
            forms.tfrecords,
            {},
            lambda root: next(root.glob("train-00001*")).unlink(),
            "no train-00001",
        ),
        (forms.recordio, {}, damaged("train.rec", lambda d: d[:-9]), "truncated"),
        (forms.recordio, {}, damaged("train.rec", lambda d: b"?" + d[1:]), "not MXNet's RecordIO"),
        (forms.recordio, {}, damaged("train.rec", lambda d: b""), r"train\.rec: empty"),
        (forms.tfrecords, {}, damaged("train-00001-of-00002", lambda d: b""), "00002: empty"),
        (
            forms.recordio,
            {},
            damaged("val.rec", lambda d: d[:12] + b"\0\0\xc0\x7f" + d[16:]),
            "has label nan",
        ),
        (
            forms.recordio,
            {},
            damaged("val.rec", lambda d: d[:12] + b"\0\0\xe0\x40" + d[16:]),
            r"has label 7; allowed with 3 classes: 0 to 2",
        ),
        (forms.arrow, {}, damaged("train/data-00001*", lambda d: d[: len(d) // 2]), "damaged"),
        (forms.arrow, {}, damaged("train/data-00001*", lambda d: b"?" * len(d)), "damaged"),
        (
            forms.arrow,
            {},
            damaged("train/data-00001*", lambda d: d.replace(b"label\0", b"\x80abel\0", 2)),
            "damaged",
        ),
        (forms.arrow, {"compression": "zstd"}, lambda root: None, "are compressed"),
        (
            forms.arrow,
            {},
            damaged("train/state.json", lambda d: b"{}"),
            "does not name Arrow",
        ),
        (forms.arrow, {}, damaged("dataset_dict.json", lambda d: b"["), "damaged"),
        (
            forms.arrow,
            {},
            lambda root: next(root.glob("train/data-00000*")).unlink(),
            "data-00000-of-00002.arrow: missing",
        ),
        (forms.zipped, {"compression": zipfile.ZIP_DEFLATED}, lambda root: None, "compressed"),
        (forms.zipped, {}, damaged("*.zip", lambda d: d[:-9]), "not a zip file, or damaged"),
        (
            forms.zipped,
            {},
            damaged("*.zip", lambda d: d.replace(b"PK\3\4", b"PK\3\5")),
            "no member at byte",
        ),
        (forms.zipped, {}, lambda root: add_again(root), "is in it twice"),
        (forms.kaggle, {}, damaged("LOC*.csv", lambda d: d[: len(d) // 2]), "has no label in"),
        (forms.tiny, {}, damaged("val/val*.txt", lambda d: b"a"), "needed: an image, a class"),
        (
            forms.places,
            {},
            damaged("categories*", lambda d: d.replace(b" 1", b" x")),
            "found label 'x'; must be a number",
        ),
    ],
)
def test_damage_is_one_line_that_names_the_file(folder, tmp_path, write, options, change, message):
    root = write(folder, tmp_path / "form", **options)
    change(root)
    with pytest.raises(UserError, match=message) as caught:
        built(root)
    assert len(str(caught.value).splitlines()) == 1
    assert str(root) in str(caught.value)
