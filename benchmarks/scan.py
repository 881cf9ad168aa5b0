#!/usr/bin/env python3
"""Locating 1,281,167 + 50,000 images: seconds, broadcast over two ranks, and memory.

    python benchmarks/scan.py [--classes 1000] [--images 1281167]

Writes data sets of ImageNet's numbers whose images are 100 bytes of nothing, in three forms: the
official archives, TFRecord files and RecordIO.  Two ranks under mpirun then build the data set as
training does: rank 0 scans with an empty cache, all receive the locations; and once more, from the
cache.  The files are in the page cache; a file system adds the time that it takes to read a header
for every image.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from report import print_head
from scipy.io import savemat

from hvd_lars.data.forms.archives import DEVKIT, TRAIN, VAL
from hvd_lars.data.forms.tfrecord import masked_crc32c
from hvd_lars.launchers.local import run_here, this_python

IMAGE = bytes(100)
VAL_IMAGES = 50_000
FORMS = {"imagenet": "official archives", "tfrecord": "TFRecord", "recordio": "RecordIO"}


def names_of(label: int, count: int) -> list[str]:
    """Return the names of a class's images."""
    return [f"n{label:08d}_{i}.JPEG" for i in range(count)]


def tar_header(name: str, size: int) -> bytes:
    """Return a member's header."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def tar_of(names: list[str]) -> bytes:
    """Return a tar file of empty images."""
    padded = IMAGE + bytes(-len(IMAGE) % 512)
    return b"".join(tar_header(name, len(IMAGE)) + padded for name in names) + bytes(1024)


def write_archives(root: Path, counts: list[int]) -> None:
    """Write the three archives."""
    with (root / TRAIN).open("wb") as out:
        for label, count in enumerate(counts):
            inner = tar_of(names_of(label, count))
            out.write(tar_header(f"n{label:08d}.tar", len(inner)))
            out.write(inner + bytes(-len(inner) % 512))
        out.write(bytes(1024))
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(VAL_IMAGES)]
    (root / VAL).write_bytes(tar_of(names))
    rows = [(i + 1, f"n{i:08d}") for i in range(len(counts))]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])})
    truth = "".join(f"{i % len(counts) + 1}\n" for i in range(VAL_IMAGES)).encode()
    with tarfile.open(root / DEVKIT, "w:gz") as tar:
        for name, data in (
            ("data/meta.mat", mat.getvalue()),
            ("data/ILSVRC2012_validation_ground_truth.txt", truth),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def varint(value: int) -> bytes:
    """Return a protobuf number."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, data: bytes) -> bytes:
    """Return a field of bytes."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(name: bytes, kind: int, data: bytes) -> bytes:
    """Return an entry of an Example's features."""
    return field(1, field(1, name) + field(2, field(kind, field(1, data))))


def write_tfrecords(root: Path, counts: list[int]) -> None:
    """Write 1,024 + 128 files as TensorFlow's script does."""
    train = [(label, name) for label, n in enumerate(counts) for name in names_of(label, n)]
    val = [(i % len(counts), f"ILSVRC2012_val_{i:08d}.JPEG") for i in range(VAL_IMAGES)]
    for split, rows, files in (("train", train, 1024), ("validation", val, 128)):
        order = np.random.default_rng(0).permutation(len(rows))
        for number, chosen in enumerate(np.array_split(order, files)):
            with (root / f"{split}-{number:05d}-of-{files:05d}").open("wb") as out:
                for i in chosen:
                    label, name = rows[i]
                    data = field(
                        1,
                        feature(b"image/colorspace", 1, b"RGB")
                        + feature(b"image/channels", 3, varint(3))
                        + feature(b"image/class/label", 3, varint(label + 1))
                        + feature(b"image/class/synset", 1, f"n{label:08d}".encode())
                        + feature(b"image/encoded", 1, IMAGE)
                        + feature(b"image/filename", 1, name.encode())
                        + feature(b"image/format", 1, b"JPEG"),
                    )
                    head = struct.pack("<Q", len(data))
                    out.write(head + struct.pack("<I", masked_crc32c(head)) + data + bytes(4))


def write_recordio(root: Path, counts: list[int]) -> None:
    """Write train.rec and val.rec."""
    splits = {"train": counts, "val": [VAL_IMAGES // len(counts)] * len(counts)}
    for split, sizes in splits.items():
        with (root / f"{split}.rec").open("wb") as out:
            for label, count in enumerate(sizes):
                head = struct.pack("<II", 0xCED7230A, 24 + len(IMAGE))
                body = struct.pack("<IfQQ", 0, float(label), 0, 0) + IMAGE
                out.write((head + body + bytes(-len(body) % 4)) * count)


def rank(kind: str, root: str, out: str) -> None:
    """What a rank of the measured job does: build the data set, twice, and note time and memory."""
    import psutil

    from hvd_lars.comm import connect
    from hvd_lars.config.file import load_config
    from hvd_lars.sources import BuildContext

    comm = connect("auto")
    data = load_config("digits", [f"data={{name: {kind}, root: {root}}}"]).data
    found = []
    for _ in range(2):
        before = psutil.Process().memory_info()
        begun = time.perf_counter()
        source = data.build(BuildContext(comm, 0))
        seconds = time.perf_counter() - begun
        after = psutil.Process().memory_info()
        value = torch_of(source)
        begun = time.perf_counter()
        comm.broadcast_object(value if comm.rank == 0 else None)
        sent = time.perf_counter() - begun
        found.append((seconds, sent, after.rss - before.rss, source.num_train))
        del source, value
    Path(out, f"{comm.rank}.json").write_text(json.dumps(found))
    comm.close()


def torch_of(source: object) -> object:
    """Return the locations that a rank holds."""
    return source._train._split, source._val._split  # type: ignore[attr-defined]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1_281_167)
    arguments = parser.parse_args()
    print_head("Locating the images of a data set", ["numpy"])
    counts = [len(part) for part in np.array_split(np.arange(arguments.images), arguments.classes)]
    print("| form | files | scan and broadcast, s | again, from the cache, s | broadcast alone, s "
          "| memory of rank 0, MB | of rank 1, MB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    writers = {"imagenet": write_archives, "tfrecord": write_tfrecords, "recordio": write_recordio}
    for kind, title in FORMS.items():
        with tempfile.TemporaryDirectory() as name:
            root = Path(name, "data")
            root.mkdir()
            writers[kind](root, counts)
            program = this_python(os.path.abspath(__file__), "--rank", kind, str(root), name)
            environment = {"XDG_CACHE_HOME": f"{name}/cache", "OMP_NUM_THREADS": "1"}
            result = run_here("mpirun", 2, program, 1800, environment)
            if result.returncode:
                sys.exit(result.stdout)
            ranks = [json.loads(Path(name, f"{i}.json").read_text()) for i in range(2)]
            (cold, sent, first, count), (warm, _, _, _) = ranks[0]
            assert count == arguments.images
            files, second = len(list(root.iterdir())), ranks[1][0][2]
            print(f"| {title} | {files:,} | {cold:.1f} | {warm:.2f} | {sent:.2f} | "
                  f"{first / 1e6:.0f} | {second / 1e6:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
    else:
        main()
