"""The samples of a shard in WebDataset's layout."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hvd_lars.data.forms.tar import check_padding
from hvd_lars.data.naming import count_left_out, image_endings, is_litter, shown
from hvd_lars.errors import UserError

_MOST_JSON = 2**20  # bytes of a .json that are read


def scan_tar(path: Path, left_out: Counter[str] | None = None) -> list[tuple[int, int, int]]:
    """Return offset and size in bytes, and label, of every sample of a WebDataset shard.

    A sample is the files whose names agree up to the first dot of the last part: an image, and
    ``.cls``, which holds the label as text, or ``.json`` with a ``label``.  Hidden files and
    groups with neither are skipped and counted in ``left_out``.

    Raises:
        UserError: not an uncompressed tar file, truncated, or a sample is not one image and one
            label.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples = _samples(path, file.fileno(), tar, left_out)
            check_padding(file.fileno(), path, tar.offset, path.stat().st_size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: truncated, or not an uncompressed tar file: {error}") from None
    rows = []
    for key, sample in samples.items():
        if sample.image is not None and sample.label is not None:
            rows.append((sample.image.offset_data, sample.image.size, sample.label))
        elif sample.image is not None or sample.label is not None:
            lacks = "label (.cls, or .json)" if sample.image is not None else "readable image"
            others = f" (found {', '.join(map(shown, sample.others))})" if sample.others else ""
            raise UserError(f"{path}: sample {shown(key)} has no {lacks}{others}")
        elif left_out is not None:
            for name in sample.others:
                count_left_out(left_out, name)
    return rows


@dataclass
class _Sample:
    """The files of a shard under one key; ``others`` are names of files but image and ``.cls``."""

    image: tarfile.TarInfo | None = None
    label: int | None = None
    details: tarfile.TarInfo | None = None
    others: list[str] = field(default_factory=list)


def _samples(
    path: Path, file: int, tar: tarfile.TarFile, left_out: Counter[str] | None
) -> dict[str, _Sample]:
    """Return the samples of an open shard by key."""
    samples: dict[str, _Sample] = {}
    files: dict[str, tarfile.TarInfo] = {}
    end = path.stat().st_size
    for member in tar:
        if member.islnk():  # a second name of an earlier file
            target = files.get(member.linkname)
            if target is None:
                raise UserError(
                    f"{path}: {shown(member.name)} is a link to {shown(member.linkname)}, which "
                    f"does not precede it in the shard"
                )
            member.offset_data, member.size = target.offset_data, target.size
        elif member.isfile():
            files[member.name] = member
        else:
            if not member.isdir() and left_out is not None:
                left_out["links and devices"] += 1
            continue
        if member.offset_data + member.size > end:
            raise UserError(f"{path}: truncated: it ends inside {shown(member.name)}")
        _take(path, file, member, samples, left_out)
    # tarfile takes a damaged header for the end: the real end is a block of zeros.
    if os.pread(file, tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{path}: truncated or damaged at byte {tar.offset}")
    for sample in samples.values():
        if sample.image is not None and sample.label is None and sample.details:
            sample.label = _label_in_json(path, file, sample)
    return samples


def _take(
    path: Path,
    file: int,
    member: tarfile.TarInfo,
    samples: dict[str, _Sample],
    left_out: Counter[str] | None,
) -> None:
    """Add a member to its sample."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    hidden = next((part for part in parts if is_litter(part)), None)
    base = hidden or (parts[-1] if parts else "")
    stem, dot, extension = base.partition(".")
    if hidden is not None or not dot:  # no dot: a README, which WebDataset skips, too
        if left_out is not None:
            count_left_out(left_out, base)
        return
    key = "/".join([*parts[:-1], stem])
    sample = samples.setdefault(key, _Sample())
    if extension.lower() == "cls":
        if sample.label is not None:
            raise UserError(f"{path}: sample {shown(key)} has two labels (.cls); it must have one")
        sample.label = _label(path, file, member)
    elif f".{extension.lower()}" in image_endings():
        if sample.image is not None:
            raise UserError(
                f"{path}: sample {shown(key)} has two images, {shown(sample.image.name)} and "
                f"{shown(member.name)}; it must have one image and one label"
            )
        sample.image = member
    else:
        if extension.lower() == "json":
            sample.details = member
        sample.others.append(base)


def _label(path: Path, file: int, member: tarfile.TarInfo) -> int:
    text = os.pread(file, min(member.size, 99), member.offset_data)
    try:
        label = int(text)
        if abs(label) >= 2**31:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{path}: {shown(member.name)}: found {text[:40]!r}; a label must be a number"
        ) from None
    return label


def _label_in_json(path: Path, file: int, sample: _Sample) -> int | None:
    """Return the ``label`` in the sample's ``.json``; None if it has none."""
    member = sample.details
    assert member is not None
    try:
        found = json.loads(os.pread(file, min(member.size, _MOST_JSON), member.offset_data))
    except (ValueError, RecursionError):
        return None
    label = found.get("label") if isinstance(found, dict) else None
    if type(label) is not int or abs(label) >= 2**31:
        return None
    sample.others = [name for name in sample.others if not name.lower().endswith(".json")]
    return label
