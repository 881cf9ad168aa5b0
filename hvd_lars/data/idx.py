"""Grey images in the IDX files of MNIST and its relatives."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from hvd_lars.data.hold_out import choose
from hvd_lars.data.identity import DataIdentity, SplitIdentity
from hvd_lars.data.naming import is_litter
from hvd_lars.data.randomness import uniforms
from hvd_lars.data.source import Batch, Indices, Request, Unreadable
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user

_UBYTE = 8  # the type of the elements, in the third byte of a file
_FILES = {  # in IdxFiles' order; the group is what precedes
    f"{part} {kind}": re.compile(rf"(.*)(?:{names})-{kind}[-.]idx{dimensions}-ubyte(?:\.gz)?")
    for part, names in (("train", "train"), ("val", "t10k|test"))
    for kind, dimensions in (("images", 3), ("labels", 1))
}


@dataclass(frozen=True)
class IdxFiles:
    """The four files of a data set."""

    train_images: Path
    train_labels: Path
    val_images: Path
    val_labels: Path


def find_idx(root: str) -> IdxFiles:
    """Find the four files in ``root``, in its folder ``raw``, or in one ``*/raw`` (torchvision's).

    They end in ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of ``t10k``
    or ``test``, and may be gzipped.  Where a folder holds several data sets, as EMNIST's archive
    does, ``root`` is the folder and what their names begin with: ``FOLDER/emnist-letters``.

    Raises:
        UserError: a file is missing, or several data sets are there.
    """
    base, beginning = expand_user(root, "data.root"), ""
    if not base.is_dir():
        if not _sets_in(base.parent, base.name):
            raise UserError(f"data.root: {base}: no such folder")
        base, beginning = base.parent, base.name
    wrong = ""
    for folders in ([base], [base / "raw"], sorted(base.glob("*/raw"))):
        found = [files for folder in folders for files in _sets_in(folder, beginning)]
        whole = [files for files in found if len(files) == 4]
        if len(whole) > 1:
            names = ", ".join(map(_name_of, whole))
            raise UserError(f"data.root: {base}: several data sets in it: {names}; name one")
        if whole:
            return IdxFiles(*(whole[0][name] for name in _FILES))
        for files in found:
            missing = next(name for name in _FILES if name not in files)
            wrong = wrong or f"no {missing} beside {next(iter(files.values()))}"
    raise UserError(
        f"data.root: {base}: {wrong or 'no IDX files in it'}; needed: train-images-idx3-ubyte, "
        f"train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, each perhaps "
        f"with .gz"
    )


def _sets_in(folder: Path, beginning: str = "") -> list[dict[str, Path]]:
    """Return the files of a folder by part and kind, such as ``train images``, one dict a data set.

    Data sets of one folder differ in what precedes ``train``, as EMNIST's six do.
    """
    sets: dict[str, dict[str, Path]] = {}
    # torchvision keeps the archive beside the file: the plain one sorts first.
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_litter(path.name) or not path.name.startswith(beginning) or not path.is_file():
            continue
        for name, pattern in _FILES.items():
            if match := pattern.fullmatch(path.name):
                sets.setdefault(match[1], {}).setdefault(name, path)
    return list(sets.values())


def _name_of(files: dict[str, Path]) -> str:
    """Return the path that chooses one of several data sets."""
    path = files["train images"]
    beginning = path.name.partition("train-images")[0].rstrip("-_.")
    return str(path.with_name(beginning) if beginning else path.parent)


def read_idx(path: Path, dimensions: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read one file of bytes: two zeros, the type, the dimensions, their sizes, the elements.

    Raises:
        UserError: it is no such file, or has more or fewer elements than it says.

    Source:
        Y. LeCun, C. Cortes, C. Burges, the MNIST database; big-endian sizes of 4 bytes.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    head = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, _UBYTE, dimensions]) or len(data) < head:
        raise UserError(
            f"{path}: not an IDX file of bytes with {dimensions} dimensions: it begins with "
            f"{data[:4]!r}"
        )
    shape = tuple(int(n) for n in np.frombuffer(data[4:head], dtype=">u4"))
    numel = 1
    for size in shape:
        numel *= size
    if len(data) != head + numel:
        raise UserError(
            f"{path}: {len(data) - head} elements; {numel} = {' × '.join(map(str, shape))} are "
            f"expected"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=head).reshape(shape)


@final
class IdxImages:
    """Grey images in memory, normalised; training images are shifted and perhaps mirrored.

    Args:
        files: the data set.
        shift: most pixels that a training image is moved to any side; the border is paper (0).
        flip: mirror half of the training images.
        seed: of both, with epoch and sample.
        val_fraction: of the training images to evaluate in place of the test images.

    Raises:
        UserError: images and labels do not fit together.
    """

    mixes_pairs = False

    def __init__(
        self,
        files: IdxFiles,
        shift: int,
        flip: bool,
        seed: int,
        val_fraction: float | None = None,
    ) -> None:
        self.unreadable: list[Unreadable] = []
        train, train_labels = _split(files.train_images, files.train_labels)
        val, val_labels = _split(files.val_images, files.val_labels)
        if train.shape[1:] != val.shape[1:]:
            raise UserError(
                f"{files.val_images}: images of {val.shape[1:]}, those of training are "
                f"{train.shape[1:]}"
            )
        classes = np.unique(train_labels)  # EMNIST's letters count from 1
        unknown = np.setdiff1d(val_labels, classes)
        if len(unknown):
            raise UserError(f"{files.val_labels}: label {unknown[0]}, which training has not")
        self.identity = DataIdentity(
            tuple(map(str, classes.tolist())),
            SplitIdentity(len(train), _digest(train, train_labels)),
            SplitIdentity(len(val), _digest(val, val_labels)),
        )
        if val_fraction is not None:
            kept, held, self.identity = choose(len(train), self.identity, val_fraction)
            val, val_labels = train[held], train_labels[held]
            train, train_labels = train[kept], train_labels[kept]
        self._train = torch.from_numpy(train.copy()), _positions(classes, train_labels)
        self._val = torch.from_numpy(val.copy()), _positions(classes, val_labels)
        self.shape = (1, *train.shape[1:])
        pixels = train.astype(np.float64) / 255.0
        self.mean, self.deviation = float(pixels.mean()), float(pixels.std()) or 1.0
        self._shift, self._flip, self._seed = shift, flip, seed
        self.num_train, self.num_eval, self.num_classes = len(train), len(val), len(classes)

    def train_batch(self, epoch: int, indices: Indices) -> Batch:
        """Return images (n, 1, height, width), normalised, and labels (n,)."""
        which = torch.from_numpy(indices)
        images, labels = self._train[0][which], self._train[1][which]
        draws = torch.from_numpy(uniforms(self._seed, epoch, indices, 3))
        if self._shift:
            images = _shifted(images, self._shift, draws[:, :2])
        if self._flip:
            images = torch.where(draws[:, 2, None, None] < 0.5, images.flip(2), images)
        return self._normalised(images), labels

    def eval_batch(self, indices: Indices) -> Batch:
        """Return test images (n, 1, height, width), normalised, and labels (n,)."""
        which = torch.from_numpy(indices)
        return self._normalised(self._val[0][which]), self._val[1][which]

    def on_device(self, images: Tensor, labels: Tensor, request: Request) -> Batch:
        """Return them as they are."""
        return images, labels

    def _normalised(self, images: Tensor) -> Tensor:
        return images.float().div_(255.0).sub_(self.mean).div_(self.deviation).unsqueeze(1)


def _shifted(images: Tensor, most: int, draws: Tensor) -> Tensor:
    """Move (n, height, width) images by up to ``most`` pixels; ``draws`` are (n, 2) in [0, 1)."""
    height, width = images.shape[1:]
    padded = torch.nn.functional.pad(images, (most, most, most, most))
    corner = (draws * (2 * most + 1)).long()
    rows = corner[:, :1] + torch.arange(height)
    columns = corner[:, 1:] + torch.arange(width)
    return padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _split(images: Path, labels: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Read the images (n, height, width) and labels (n,) of a split."""
    pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(numbers):
        raise UserError(f"{labels}: {len(numbers)} labels for {len(pixels)} images of {images}")
    if not pixels.size:
        raise UserError(f"{images}: no image in it")
    return pixels, numbers


def _positions(classes: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.searchsorted(classes, labels).astype(np.int64))


def _digest(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> str:
    digest = hashlib.sha256(images.tobytes())
    digest.update(labels.tobytes())
    return digest.hexdigest()
