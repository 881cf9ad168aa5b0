"""Writers of the forms in which sites keep ImageNet: small, and exact in their structure."""

import csv
import io
import json
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
from scipy.io import savemat

from hvd_lars.data.forms.archives import DEVKIT, TRAIN, VAL
from hvd_lars.data.forms.tfrecord import masked_crc32c


def images(folder, split):
    """(class, path) of a split, sorted by class and name."""
    paths = sorted((folder / split).glob("*/*"))
    return [(path.parent.name, path) for path in paths]


def classes_of(folder):
    return sorted(path.name for path in (folder / "train").iterdir())


def shuffled(items, seed):
    items = list(items)
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def tar_of(files):
    """An uncompressed tar file of names and bytes."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


def devkit_of(classes, labels):
    """``labels`` are positions in the classes; ILSVRC ids are in another order."""
    order = np.random.default_rng(3).permutation(len(classes))
    ids = {name: int(order[i]) + 1 for i, name in enumerate(classes)}
    rows = [(ids[name], name, 0) for name in sorted(classes, key=ids.get)]
    rows.append((len(classes) + 1, "n99999999", 5))  # an inner node of WordNet
    table = np.array(rows, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")])
    mat = io.BytesIO()
    savemat(mat, {"synsets": table})
    truth = "".join(f"{ids[classes[label]]}\n" for label in labels).encode()
    folder, made = "ILSVRC2012_devkit_t12", io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, data in (
            (f"{folder}/readme.txt", b"Please read"),
            (f"{folder}/data/meta.mat", mat.getvalue()),
            (f"{folder}/data/ILSVRC2012_validation_ground_truth.txt", truth),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


def number_val(folder):
    """Give test images names of their own across the classes, as ImageNet's have."""
    for number, (_, path) in enumerate(shuffled(images(folder, "val"), 1), 1):
        path.rename(path.with_name(f"ILSVRC2012_val_{number:08d}{path.suffix}"))


def archives(folder, target):
    """The three archives, in no order; test images need names of their own."""
    target.mkdir()
    inner = []
    for name in reversed(classes_of(folder)):
        paths = shuffled((folder / "train" / name).iterdir(), 2)
        inner.append((f"{name}.tar", tar_of([(p.name, p.read_bytes()) for p in paths])))
    (target / TRAIN).write_bytes(tar_of(inner))
    val = sorted(images(folder, "val"), key=lambda item: item[1].name)
    (target / VAL).write_bytes(tar_of([(path.name, path.read_bytes()) for _, path in val]))
    labels = [classes_of(folder).index(name) for name, _ in val]
    (target / DEVKIT).write_bytes(devkit_of(classes_of(folder), labels))
    return target


def varint(value):
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(features):
    """A tf.train.Example of bytes, and lists of integers or of floats."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        elif isinstance(value[0], float):
            feature = field(2, field(1, np.array(value, "<f4").tobytes()))
        else:
            feature = field(3, field(1, b"".join(map(varint, value))))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def record(data):
    length = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(sums) + data + next(sums)


def tfrecords(folder, target, spelling="tensorflow", files=2):
    """TensorFlow's script's files, or those of TensorFlow Datasets (``tfds``)."""
    target.mkdir()
    names = classes_of(folder)
    for split, long in (("train", "train"), ("val", "validation")):
        rows = shuffled(images(folder, split), 4)
        for number in range(files):
            made = b""
            for name, path in rows[number::files]:
                label, data = names.index(name), path.read_bytes()
                if spelling == "tensorflow":
                    features = {
                        "image/height": [30],
                        "image/object/bbox/xmin": [0.25, 0.5],
                        "image/colorspace": b"RGB",
                        "image/encoded": data,
                        "image/class/label": [label + 1],
                        "image/class/synset": name.encode(),
                        "image/filename": path.name.encode(),
                    }
                else:
                    features = {"file_name": path.name.encode(), "image": data, "label": [label]}
                made += record(example(features))
            prefix = long if spelling == "tensorflow" else f"imagenet2012-{long}.tfrecord"
            (target / f"{prefix}-{number:05d}-of-{files:05d}").write_bytes(made)
    if spelling != "tensorflow":
        (target / "label.labels.txt").write_text("".join(f"{name}\n" for name in names))
    return target


def table_of(folder, split, named=True):
    """A split as Hugging Face's datasets describe it."""
    names = classes_of(folder)
    rows = shuffled(images(folder, split), 5)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {
        "image": {"_type": "Image"},
        "label": {"names": names, "_type": "ClassLabel"},
    }
    schema = pyarrow.schema(
        [("image", kind), ("label", pyarrow.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = [
        pyarrow.array(
            [{"bytes": p.read_bytes(), "path": p.name if named else None} for _, p in rows], kind
        ),
        pyarrow.array([names.index(name) for name, _ in rows], pyarrow.int64()),
    ]
    return pyarrow.Table.from_arrays(columns, schema=schema)


def arrow(folder, target, batch=4, compression=None, names=True):
    """``DatasetDict.save_to_disk``."""
    target.mkdir()
    (target / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    for split, name in (("train", "train"), ("val", "validation")):
        (target / name).mkdir()
        table = table_of(folder, split, names)
        half = -(-table.num_rows // 2)
        files = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        for file, begin in zip(files, (0, half), strict=True):
            path = str(target / name / file)
            with pyarrow.ipc.new_stream(path, table.schema, options=options) as out:
                out.write_table(table.slice(begin, half), max_chunksize=batch)
        state = {"_data_files": [{"filename": file} for file in files], "_split": name}
        (target / name / "state.json").write_text(json.dumps(state))
    return target


def parquet(folder, target, group=5):
    (target / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation")):
        table = table_of(folder, split)
        path = target / "data" / f"{name}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=group)
    return target


def recordio_record(data):
    """dmlc's writer: a record is cut where the magic number stands at a multiple of 4 bytes."""
    magic = struct.pack("<I", 0xCED7230A)
    cuts = [i for i in range(0, len(data) - 3, 4) if data[i : i + 4] == magic]
    begins = [0, *(cut + 4 for cut in cuts)]
    ends = [*cuts, len(data)]
    out = b""
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        last = number == len(begins) - 1
        part = (3 if last else 2) if number else (0 if last else 1)
        out += magic + struct.pack("<I", part << 29 | end - begin) + data[begin:end]
        out += bytes(-(end - begin) % 4)
    return out


def recordio(folder, target, labels=0):
    """``train.rec`` and ``val.rec``; with ``labels``, records have that many, the class first."""
    target.mkdir()
    names = classes_of(folder)
    for split in ("train", "val"):
        made = b""
        for number, (name, path) in enumerate(images(folder, split)):
            label = float(names.index(name))
            head = struct.pack("<IfQQ", labels, 0.0 if labels else label, number, 0)
            head += b"".join(struct.pack("<f", label) for _ in range(labels))
            made += recordio_record(head + path.read_bytes())
        (target / f"{split}.rec").write_bytes(made)
    return target


def zipped(folder, target, top="imagenet/", compression=zipfile.ZIP_STORED):
    target.mkdir()
    with zipfile.ZipFile(target / "images.zip", "w", compression) as archive:
        archive.writestr("imagenet/README.txt", "Please read")
        for split in ("train", "val"):
            for name, path in shuffled(images(folder, split), 6):
                archive.write(path, f"{top}{split}/{name}/{path.name}")
    return target


def zip_each(folder, target, above=None, strays=False):
    """``above`` are folders above the split's, as in Kaggle's tree; None for classes alone.

    With ``strays``, images lie above the classes, too.
    """
    target.mkdir()
    for split in ("train", "val"):
        top = "" if above is None else f"{above}{split}/"
        with zipfile.ZipFile(target / f"{split}.zip", "w") as archive:
            for stray in ("cover.png", f"{split}/preview.png") if strays else ():
                archive.writestr(stray, b"")
            for name, path in shuffled(images(folder, split), 6):
                archive.write(path, f"{top}{name}/{path.name}")
    return target


def kaggle(folder, target):
    """Kaggle's tree: test images in one folder, labels with boxes in a CSV file."""
    inside = target / "ILSVRC/Data/CLS-LOC"
    shutil.copytree(folder / "train", inside / "train")
    (inside / "val").mkdir()
    with (target / "LOC_val_solution.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["ImageId", "PredictionString"])
        for name, path in shuffled(images(folder, "val"), 7):
            shutil.copy(path, inside / "val")
            out.writerow([path.stem, f"{name} 85 1 499 272 {name} 1 2 3 4 "])
    return target


def tiny(folder, target):
    """tiny-imagenet-200's tree."""
    for name, path in images(folder, "train"):
        (target / "train" / name / "images").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / "train" / name / "images")
        (target / "train" / name / f"{name}_boxes.txt").write_text("0\t1\t2\t3\n")
    (target / "val/images").mkdir(parents=True)
    lines = []
    for name, path in images(folder, "val"):
        shutil.copy(path, target / "val/images")
        lines.append(f"{path.name}\t{name}\t0\t32\t44\t62\n")
    (target / "val/val_annotations.txt").write_text("".join(lines))
    return target


def places(folder, target):
    """Places365's standard lists, with images of 256 pixels."""
    names = classes_of(folder)
    lines = {"train": [], "val": []}
    for name, path in images(folder, "train"):
        inside = target / "data_256_standard" / name[0] / name
        inside.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, inside)
        lines["train"].append(f"/{name[0]}/{name}/{path.name} {names.index(name)}\n")
    (target / "val_256").mkdir()
    for name, path in images(folder, "val"):
        shutil.copy(path, target / "val_256")
        lines["val"].append(f"{path.name} {names.index(name)}\n")
    (target / "places365_train_standard.txt").write_text("".join(shuffled(lines["train"], 8)))
    (target / "places365_val.txt").write_text("".join(lines["val"]))
    rows = "".join(f"/{name[0]}/{name} {i}\n" for i, name in enumerate(names))
    (target / "categories_places365.txt").write_text(rows)
    return target
