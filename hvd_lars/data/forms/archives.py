"""ImageNet's official archives: nothing is unpacked.

``ILSVRC2012_img_train.tar`` holds a tar file for each class, ``ILSVRC2012_img_val.tar`` all test
images, whose labels are in ``ILSVRC2012_devkit_t12.tar.gz``.  ImageNet-21K is a tar file for each
class in a folder, or in one tar file, and has no test images.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hvd_lars.data.forms.scan import Each, Files, Found, Scan
from hvd_lars.data.forms.tar import Member, members
from hvd_lars.data.naming import ending_of, image_endings, is_litter, shown
from hvd_lars.errors import UserError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


class Archives:
    """See the module."""

    name = "archives"

    def find(self, root: Path) -> Files:
        """Return the three archives, or a tar file for each class."""
        paths = [root / name for name in (TRAIN, VAL, DEVKIT)]
        missing = [path.name for path in paths if not path.is_file()]
        if not missing:
            return Files(root, [paths[0]], [paths[1]], [paths[2]])
        if paths[0].is_file() and VAL in missing:
            return Files(root, [paths[0]], [], [])
        if len(missing) == len(paths):
            by_class = class_tars(root)
            if by_class:
                return Files(root, by_class, [], [])
        raise UserError(f"data.root: {root}: no {', no '.join(missing)} in it")

    def scan(self, files: Files, each: Each) -> Scan:
        """See :class:`Form`; the archives are scanned class by class."""
        inner = [
            (number, path, member)
            for number, path in enumerate(files.train)
            for member in _class_files(path)
        ]
        inner.sort(key=lambda item: item[2].name)
        classes = [member.name.removesuffix(".tar") for _, _, member in inner]
        twice = next((a for a, b in zip(classes, classes[1:], strict=False) if a == b), None)
        if twice is not None:
            raise UserError(f"data.root: {files.root}: two tar files of class {shown(twice)}")
        found = each(_images_of, inner)
        empty = [m.name for (_, _, m), images in zip(inner, found, strict=True) if not images]
        if empty and any(found):
            raise UserError(f"data.root: {files.root}: {shown(empty[0])} has no image")
        train = [
            Found(label, image.name, number, image.offset, image.size)
            for label, ((number, _, _), images) in enumerate(zip(inner, found, strict=True))
            for image in images
        ]
        if not train:
            raise UserError(f"{files.train[0]}: no image in it")
        val = _val_images(files.val[0], files.others[0], classes) if files.val else []
        return Scan(classes, train, val)


FORM = Archives()


def class_tars(root: Path) -> list[Path]:
    """Return ImageNet-21K's tar files, one per class (``n00004475.tar``), or one of them all."""
    try:
        tars = (p for p in root.iterdir() if p.suffix == ".tar" and not is_litter(p.name))
        found = sorted(path for path in tars if path.is_file())
    except OSError:
        return []
    if len(found) == 1:
        return found if found[0].name.startswith(("fall11", "winter21")) else []
    return found if found and all(_is_wnid(path.stem) for path in found) else []


def _is_wnid(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def _class_files(path: Path) -> list[Member]:
    """Return the tar files of the classes in an archive, or the archive as the file of one."""
    size = path.stat().st_size
    if _is_wnid(path.stem):
        return [Member(path.name, 0, size)]
    with path.open("rb") as file:
        found = list(members(file.fileno(), path, 0, size))
    for member in found:
        if not member.name.endswith(".tar"):
            raise UserError(f"{path}: {shown(member.name)}: a tar file for each class is expected")
    return found


def _images_of(item: tuple[int, Path, Member]) -> list[Member]:
    _, path, member = item
    name = path if member.name == path.name else path / member.name
    with path.open("rb") as file:
        found = list(members(file.fileno(), name, member.offset, member.offset + member.size))
    images = _only_images(found)
    twice = next((n for n, count in Counter(m.path for m in images).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{name}: {shown(twice)} is in it twice (tar -r or -u): unpack it")
    return images


def _only_images(found: list[Member]) -> list[Member]:
    endings = image_endings()
    return [m for m in found if ending_of(m.name) in endings and not is_litter(m.name)]


def _val_images(val: Path, devkit: Path, classes: Sequence[str]) -> list[Found]:
    """Return the test images; their labels are in the order of their names."""
    wnids, truth = _read_devkit(devkit)
    with val.open("rb") as file:
        images = sorted(_only_images(list(members(file.fileno(), val, 0, val.stat().st_size))))
    if len(images) != len(truth):
        raise UserError(
            f"{val}: {len(images)} images; {devkit.name} has the labels of {len(truth)}"
        )
    labels = {wnid: label for label, wnid in enumerate(classes)}
    rows = []
    for image, number in zip(images, truth, strict=True):
        wnid = wnids.get(number)
        if wnid not in labels:
            raise UserError(
                f"{devkit}: the label of {shown(image.name)} is {number}"
                f"{f' ({wnid})' if wnid else ''}, which is no class of {TRAIN}"
            )
        rows.append(Found(labels[wnid], image.name, 0, image.offset, image.size))
    return rows


def _read_devkit(devkit: Path) -> tuple[dict[int, str], list[int]]:
    """Return the WordNet id of every ILSVRC id, and the test images' ILSVRC ids in order."""
    from scipy.io import loadmat

    texts: dict[str, bytes] = {}
    try:
        with tarfile.open(devkit, "r:gz") as tar:
            for member in tar:
                for wanted in (_META, _TRUTH):
                    if member.isfile() and f"/{member.name}".endswith(f"/{wanted}"):
                        data = tar.extractfile(member)
                        assert data is not None
                        texts[wanted] = data.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{devkit}: damaged, or not a gzipped tar file: {error}") from None
    for wanted in (_META, _TRUTH):
        if wanted not in texts:
            raise UserError(f"{devkit}: no {wanted} in it")
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(texts[_META]), squeeze_me=True)["synsets"])
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        truth = [int(line) for line in texts[_TRUTH].split()]
    except Exception as error:  # scipy raises anything on a damaged file
        raise UserError(f"{devkit}: damaged: {type(error).__name__}: {error}") from None
    return wnids, truth
