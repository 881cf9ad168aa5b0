"""Whatever stands in a config, a checkpoint, a log or a shard: a clear error, or it is taken.

Hypothesis makes the input; it prints the smallest that fails.  HYPOTHESIS_EXAMPLES=5000 looks
longer than the suite does.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import forms
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from test_image_folder import make_folder

from hvd_lars.config.file import bundled_configs, find_config, load_config
from hvd_lars.config.schema import Config
from hvd_lars.data.decoding import Picture, to_bytes
from hvd_lars.data.identity import made_identity
from hvd_lars.data.image_folder import FolderImages
from hvd_lars.data.listing import list_folder
from hvd_lars.data.located import LocatedImages
from hvd_lars.data.shards.index import load_shards
from hvd_lars.data.shards.samples import scan_tar
from hvd_lars.data.shards.samples_to_pack import collect
from hvd_lars.data.shards.writer import pack
from hvd_lars.errors import UserError
from hvd_lars.state import checkpoint_files, run_folder
from hvd_lars.state.progress import Progress

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "150"))
often = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(),
    st.sampled_from(["5 epochs", "1e400 steps", "-0 steps", "nan", "../../etc/passwd", "~", "auto",
                     "lars", "digits", "imagefolder", "!!python/object:os.system", "\0", "1e-4"]),
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def keys_of(model):
    return sorted(model.model_fields)


SECTIONS = {
    name: keys_of(field.annotation)
    for name, field in Config.model_fields.items()
    if hasattr(field.annotation, "model_fields")
} | {"data": ["name", "root", "copies", "image_size", "augment", "workers", "max_bad_fraction"]}


@st.composite
def damage(draw, size):
    """A function that changes bytes: some are replaced, inserted, or cut off."""
    edits = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["replace", "insert", "delete", "truncate"]),
                st.integers(0, max(size - 1, 0)),
                st.binary(min_size=1, max_size=12),
            ),
            min_size=1, max_size=3,
        )
    )  # fmt: skip

    def apply(data):
        for how, at, new in edits:
            if how == "replace":
                data = data[:at] + new + data[at + len(new) :]
            elif how == "insert":
                data = data[:at] + new + data[at:]
            elif how == "delete":
                data = data[:at] + data[at + len(new) :]
            else:
                data = data[:at]
        return data

    return apply


def clear(error):
    """What a user is told: something, and no leftovers of Python."""
    text = str(error)
    assert text.strip()
    assert "Traceback" not in text
    assert "<hvd_lars" not in text


def load(text, overrides=()):
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            return load_config(file.name, overrides)
        except UserError as error:
            clear(error)
            for line in str(error).splitlines():
                assert line.startswith((file.name, "command line", "imagenet")) or "extends" in line
            return None


@often
@given(st.data())
def test_configs_of_right_keys_and_wrong_values(data):
    tree = yaml.safe_load(Path(find_config("digits")).read_text())
    for _ in range(data.draw(st.integers(1, 4))):
        section = data.draw(st.sampled_from(sorted(SECTIONS)))
        value = data.draw(SCALARS | st.lists(SCALARS, max_size=2))
        if data.draw(st.booleans()) and isinstance(tree.get(section), dict):
            tree[section][data.draw(st.sampled_from(SECTIONS[section]))] = value
        else:
            tree[section] = value
    load(yaml.dump(tree, Dumper=yaml.Dumper).encode())


@often
@given(st.data())
def test_configs_of_damaged_text(data):
    name = data.draw(st.sampled_from(sorted(bundled_configs())))
    text = Path(find_config(name)).read_bytes()
    load(data.draw(damage(len(text)))(text))


@often
@given(st.binary(max_size=200), st.lists(st.text(max_size=30), max_size=3))
def test_configs_of_anything(text, overrides):
    load(text, overrides)


@often
@given(
    st.lists(st.tuples(st.sampled_from(sorted(SECTIONS)), st.text("a.=:{}[]!&*0 \n", max_size=12)))
)
def test_overrides_of_anything(pairs):
    load(Path(find_config("digits")).read_bytes(), ["".join(pair) for pair in pairs])


JSON_FILES = ["progress.json", "data.json", "manifest.json"]
STATE = {"model/w": torch.arange(6.0).reshape(2, 3), "momentum/w": torch.ones(2, 3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    progress = Progress(step=3, window_losses=[0.5]).record()
    checkpoint_files.write(folder, STATE, progress, 2, made_identity("x", 5, 3, 2))
    return folder / "step-00000003"


def take(folder):
    """Find and read as a resume does; whether it was taken."""
    live = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    try:
        found = checkpoint_files.find(folder)
        assert found is not None
        checkpoint_files.read(found, live, list(found.names))
    except UserError as error:
        clear(error)
        assert str(folder) in str(error)
        return False
    assert isinstance(found.progress.step, int)
    return True


def seal(folder):
    """The manifest that fits what the folder holds now, as somebody hostile would write it."""
    manifest = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("state.safetensors", "progress.json", "data.json")
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@often
@given(st.data())
def test_damaged_checkpoints(checkpoint, data):
    name = data.draw(st.sampled_from(["state.safetensors", *JSON_FILES]))
    before = (checkpoint / name).read_bytes()
    after = data.draw(damage(len(before)))(before)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(checkpoint, Path(folder) / "step-00000003"))
        (copy / name).write_bytes(after)
        taken = take(copy)
        if name != "manifest.json":  # blanks in JSON change nothing
            assert taken == (before == after)
            seal(copy)
            take(copy)


@often
@given(JSON, st.sampled_from(JSON_FILES))
def test_checkpoints_of_other_json(checkpoint, value, name):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(checkpoint, Path(folder) / "step-00000003"))
        (copy / name).write_text(json.dumps(value))
        if name != "manifest.json":
            seal(copy)
        take(copy)


@pytest.mark.parametrize("other", [{"model/w": torch.zeros(2, 3)}, {"x": torch.zeros(1)}, {}])
def test_checkpoints_of_another_model(checkpoint, other, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "step-00000003"))
    (copy / "state.safetensors").write_bytes(save(other))
    seal(copy)
    assert not take(copy)


LINES = [
    {"kind": kind, "step": step, "loss": 1 / 3}
    for step in range(1, 8)
    for kind in (["train", "eval"] if step % 3 == 0 else ["train"])
]


@pytest.mark.parametrize("kept", [0, 3, 6])
def test_a_kill_at_any_byte_leaves_no_torn_or_double_line(tmp_path, kept):
    """The log is cut at every byte; what a resumed run leaves is what was there, up to its step."""
    text = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    needed = text.index(json.dumps(next(r for r in LINES if r["step"] > kept)).encode())
    path = tmp_path / run_folder.METRICS
    for cut in range(needed, len(text) + 1):
        path.write_bytes(text[:cut])
        run_folder.forget_after(tmp_path, kept)
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in LINES if line["step"] > kept)
        assert path.read_bytes() == text


@often
@given(st.lists(st.binary(max_size=40) | JSON.map(lambda v: json.dumps(v).encode()), max_size=6))
def test_logs_of_anything(lines):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / run_folder.METRICS).write_bytes(b"\n".join(lines))
        run_folder.forget_after(folder, 5)
        for line in (folder / run_folder.METRICS).read_bytes().splitlines():
            assert json.loads(line)["step"] <= 5


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    folder = make_folder(root / "images", train=2, val=1, size=(8, 8))
    pack(str(folder), root / "shards", 1, 4, lambda done, total: None)
    return root / "shards"


def read_all(root):
    """Open every image as training does; errors name a file."""
    try:
        shards = load_shards(str(root), "*train*.tar", "*val*.tar", None)
        for split in (shards.train, shards.val):
            store = LocatedImages(root, split)
            for i in range(len(split.labels)):
                store.open(i)
    except UserError as error:
        clear(error)
        assert str(root) in str(error)


@often
@given(st.data())
def test_damaged_shard_sets(packed, data):
    name = data.draw(st.sampled_from(sorted(os.listdir(packed))))
    before = (packed / name).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(packed, Path(folder) / "shards"))
        (copy / name).write_bytes(data.draw(damage(len(before)))(before))
        if name == "index.safetensors" and data.draw(st.booleans()):
            manifest = json.loads((copy / "dataset.json").read_text())
            manifest["index"] = hashlib.sha256((copy / name).read_bytes()).hexdigest()
            (copy / "dataset.json").write_text(json.dumps(manifest))
        read_all(copy)
        if data.draw(st.booleans()):  # as shards of other origin
            (copy / "dataset.json").unlink()
            read_all(copy)


@often
@given(st.dictionaries(st.sampled_from(["format", "train", "val", "index", "classes"]), JSON))
def test_shard_sets_of_another_manifest(packed, changed):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(packed, Path(folder) / "shards"))
        manifest = json.loads((copy / "dataset.json").read_text())
        (copy / "dataset.json").write_text(json.dumps(manifest | changed))
        read_all(copy)


NAMES = st.sampled_from(["a", "../../a", "/etc/passwd", "a/../../b", "", "ü", "a\nb"])


@often
@given(
    st.lists(
        st.tuples(
            NAMES, st.sampled_from([".jpg", ".cls", ".JPEG", "", ".json"]),
            st.binary(max_size=20) | st.integers().map(lambda i: str(i).encode()),
            st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE,
                             tarfile.CHRTYPE, tarfile.FIFOTYPE]),
        ), max_size=5,
    )
)  # fmt: skip
def test_foreign_shards_of_anything_stay_inside_their_file(members):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "x-train.tar"
        with tarfile.open(path, "w") as tar:
            for stem, extension, content, kind in members:
                member = tarfile.TarInfo(stem + extension)
                member.type, member.size = kind, len(content) if kind == tarfile.REGTYPE else 0
                member.linkname = "/etc/passwd"
                tar.addfile(member, io.BytesIO(content))
        try:
            samples = scan_tar(path)
        except UserError as error:
            clear(error)
            assert str(path) in str(error)
        else:
            inside = np.array(samples).reshape(-1, 3)
            assert (inside[:, 0] + inside[:, 1] <= path.stat().st_size).all()
        assert [entry.name for entry in folder.iterdir()] == ["x-train.tar"]


SAMPLE_NAMES = st.sampled_from(
    ["a", "./a", "b/a", "b//a", "._a", ".DS_Store", "__MACOSX/a", ".git/a", "a\nb", "README"]
)
SAMPLE_ENDINGS = st.sampled_from([".jpg", ".PNG", ".tif", ".cls", ".json", ".txt", ".seg.png", ""])


@often
@given(st.lists(st.tuples(SAMPLE_NAMES, SAMPLE_ENDINGS), max_size=8))
def test_every_image_of_a_foreign_shard_is_a_sample_or_told(members):
    """Nobody's file is taken for an image, and none is lost: it is in a sample or in an error."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.tar"
        with tarfile.open(path, "w") as tar:
            for stem, ending in members:
                member = tarfile.TarInfo(stem + ending)
                member.size = 1
                tar.addfile(member, io.BytesIO(b"3"))
        visible = [
            f"{stem}{ending}".replace("//", "/").removeprefix("./")
            for stem, ending in members
            if not any(p.startswith(".") and p != "." or p == "__MACOSX" for p in stem.split("/"))
        ]
        images = [n for n in visible if n.endswith((".jpg", ".PNG", ".tif")) and ".seg" not in n]
        labels = [n for n in visible if n.endswith(".cls")]
        try:
            samples = scan_tar(path)
        except UserError as error:
            clear(error)
            assert len(str(error).splitlines()) == 1
            stems = [image.rpartition(".")[0] for image in images]
            whole = sorted(stems) == sorted(label.rpartition(".")[0] for label in labels)
            assert not whole or len(set(stems)) < len(stems)
        else:
            assert len(samples) == len(images) == len(labels)


FILE_NAMES = st.sampled_from(
    ["1.png", "2.PNG", "3.tif", "._1.png", ".DS_Store", "notes.txt", "x", "Thumbs.db", "deep/4.png",
     "deep/er/5.png", ".hidden/6.png", "deep/__MACOSX/7.png", "\udcff.png", "a b.png", "x.png.txt"]
)  # fmt: skip


@often
@given(st.dictionaries(st.sampled_from(["ant", "bee", ".git", "@eaDir", "Ü"]), st.sets(FILE_NAMES)))
def test_folders_of_anything(tree):
    """A class is a visible folder; its images are all that are visible in it, at any depth."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for split in ("train", "val"):
            (root / split).mkdir()
            for folder, files in tree.items():
                (root / split / folder).mkdir()
                for file in files:
                    path = root / split / folder / os.fsdecode(os.fsencode(file))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(b"no image")
        wanted = {
            folder: {
                file
                for file in files
                if file.lower().endswith((".png", ".tif"))
                and not any(part.startswith((".", "__")) for part in file.split("/"))
            }
            for folder, files in tree.items()
            if folder not in (".git", "@eaDir")
        }
        try:
            listing = list_folder(str(root), None)
        except UserError as error:
            clear(error)
            assert len(str(error).splitlines()) == 1
            assert len(wanted) < 2 or not all(wanted.values())
            return
        assert listing.classes == tuple(sorted(wanted))
        found = {os.fsdecode(path) for path in listing.train.paths.tolist()}
        assert found == {f"train/{c}/{file}" for c, files in wanted.items() for file in files}
        store = FolderImages(listing.root, listing.train)
        with pytest.raises(UserError, match="not a readable image"):
            store.open(0)


@often
@given(
    st.sampled_from([255.0, 4095.0, 65535.0, 2.0**32 - 1, 1.0]),
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6),
)
def test_grey_values_keep_their_share_of_white(white, shares):
    dtype = {1.0: np.float32, 2.0**32 - 1: np.uint32}.get(white, np.uint16)
    grey = np.array([[share * white for share in shares]]).astype(dtype)
    try:
        found = to_bytes(grey.view(np.int32) if dtype is np.uint32 else grey, white)
    except ValueError as error:
        assert "their scale is unknown" in str(error)
        assert white > 65535
        assert 0 < grey.max() < white / 255
    else:
        assert np.abs(found / 255 - grey / white).max() <= 0.5 / 255 + 1e-6


@often
@given(st.data())
def test_images_that_are_damaged_are_read_or_named(data):
    kind = data.draw(st.sampled_from(["PNG", "TIFF", "GIF", "PPM", "BMP", "WEBP", "JPEG", "TGA"]))
    array = np.arange(12 * 12, dtype=np.uint8).reshape(12, 12)
    file = io.BytesIO()
    deep = kind in ("PNG", "TIFF", "PPM") and data.draw(st.booleans())
    Image.fromarray(array.astype(np.uint16) * 257 if deep else array).save(file, kind)
    content = data.draw(damage(len(file.getvalue())))(file.getvalue())
    try:
        pixels = Picture(content, "folder/x").pixels()
    except UserError as error:
        clear(error)
        assert str(error).startswith("folder/x: not a readable image")
    else:
        assert pixels.dtype == torch.uint8
        assert pixels.shape[0] == 3


HELD_FORMS = {
    "archives": forms.archives,
    "tfrecord": forms.tfrecords,
    "arrow": forms.arrow,
    "parquet": forms.parquet,
    "recordio": forms.recordio,
    "zip": forms.zipped,
    "kaggle": forms.kaggle,
    "tiny": forms.tiny,
    "places": forms.places,
}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A small data set in every form that is read, and its folder."""
    root = tmp_path_factory.mktemp("held")
    folder = make_folder(root / "images", ("ant", "bee"), train=2, val=1, size=(8, 8))
    forms.number_val(folder)
    return {name: write(folder, root / name) for name, write in HELD_FORMS.items()}


@pytest.mark.parametrize("form", HELD_FORMS)
@often
@given(data=st.data())
def test_damaged_forms(held, form, data):
    """Whatever the damage: a line that names a file, or images that lie inside their files."""
    paths = sorted(path for path in held[form].rglob("*") if path.is_file())
    others = [path for path in paths if path.suffix not in (".JPEG", ".png")]
    path = data.draw(st.sampled_from(others)).relative_to(held[form])
    before = (held[form] / path).read_bytes()
    with tempfile.TemporaryDirectory() as name:
        root = Path(shutil.copytree(held[form], Path(name) / "form"))
        (root / path).write_bytes(data.draw(damage(len(before)))(before))
        try:
            found = collect(str(root))
            for samples in (found.train, found.val):
                for i in range(len(samples)):
                    Picture(samples.read(i), samples.where(i))
        except UserError as error:
            clear(error)
            assert len(str(error).splitlines()) == 1
            assert name in str(error)
