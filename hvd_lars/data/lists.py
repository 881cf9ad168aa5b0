"""Labels that are in a file of their own: lists of images, and test images without folders."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvd_lars.data.naming import ending_of, image_endings
from hvd_lars.errors import UserError

# First row of a list, in upper or lower case: names of columns and not an image.
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "imageid", "image_id")
_BOXES = "predictionstring"  # Kaggle's: the class, and the places of things in the image
_LABEL_COLUMNS = ("label", "class", "target", "category", "wnid", "class_name", _BOXES)
_KAGGLE, _TINY = "LOC_val_solution.csv", "val_annotations.txt"
_CLASSES, _PLACES_TRAIN, _PLACES_VAL = (
    "categories_places365.txt",
    "places365_train_standard.txt",
    "places365_val.txt",
)
_LEVELS = 3  # folders between Kaggle's CLS-LOC and the file of labels


@dataclass(frozen=True)
class ListFile:
    """A list of images: its file, and the folder that its paths start from."""

    path: Path
    base: str


@dataclass(frozen=True)
class Listed:
    """Lists found beside a data set, either perhaps None; ``classes`` are names by number."""

    train: ListFile | None
    val: ListFile | None
    classes: dict[int, str] | None = None


def read_list(path: Path) -> list[tuple[str, str]]:
    """Read a CSV of (path, label), or lines ``path label``; returns paths and labels as text.

    A first row of column names says which columns they are.  Of a label under Kaggle's head
    ``PredictionString``, such as ``n01978287 85 1 499 272``, the first word counts.

    Raises:
        UserError: the file cannot be read, or a line has no path or no label.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text: {error}") from None
    lines = text.splitlines()
    separated = path.suffix.lower() == ".csv" or all("," in line for line in lines if line.strip())
    rows = _csv_rows(path, lines) if separated else _plain_rows(path, lines)
    if not rows:
        raise UserError(f"{path}: no image in it")
    odd = next((name for name, _ in rows if "\0" in name), None)
    if odd is not None:
        raise UserError(f"{path}: {odd!r} is no name of a file")
    return rows


def _csv_rows(path: Path, lines: list[str]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    columns: tuple[int, int] | None = None
    boxes = False
    try:
        for number, row in enumerate(csv.reader(lines), start=1):
            if not row or not any(row):
                continue
            if columns is None:
                heads = [cell.strip().lower() for cell in row]
                found = (
                    next((i for i, head in enumerate(heads) if head in names), None)
                    for names in (_PATH_COLUMNS, _LABEL_COLUMNS)
                )
                a, b = found
                if a is not None and b is not None:
                    columns, boxes = (a, b), heads[b] == _BOXES
                    continue
                if ending_of(row[0].strip()) not in image_endings():
                    raise UserError(
                        f"{path}: line {number}: found {row!r}; needed: a path of an image and a "
                        f"label, or names of columns: {', '.join(_PATH_COLUMNS)}; "
                        f"{', '.join(_LABEL_COLUMNS)}"
                    )
                columns = 0, 1
            cells = [row[i].strip() if i < len(row) else "" for i in columns]
            if not all(cells):
                raise UserError(f"{path}: line {number}: found {row!r}; needed: a path and a label")
            rows.append((cells[0], cells[1].split()[0] if boxes else cells[1]))
    except csv.Error as error:
        raise UserError(f"{path}: not CSV: {error}") from None
    return rows


def _plain_rows(path: Path, lines: list[str]) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition("\t" if "\t" in line.strip() else " ")
        if not name.strip():
            raise UserError(f"{path}: line {number}: found {line!r}; needed: a path and a label")
        rows.append((name.strip(), label))
    if rows and rows[0][0].lower() in _PATH_COLUMNS and rows[0][1].lower() in _LABEL_COLUMNS:
        del rows[0]
    return rows


def flat_labels(folder: Path, val: str) -> tuple[Path, str, dict[str, str]] | None:
    """Find the labels of test images that are not in class folders.

    They are Kaggle's ``LOC_val_solution.csv``, in or above ``folder``, or tiny-imagenet's
    ``val_annotations.txt``.

    Args:
        folder: the data set's.
        val: the test images' folder, below it.

    Returns:
        The file, the folder of the images below ``folder``, and class names by the images' names
        without extension; None if no such file is there.

    Raises:
        UserError: the file is damaged.
    """
    tiny = folder / val / _TINY
    if tiny.is_file():
        labels = {}
        for number, line in enumerate(tiny.read_text(errors="replace").splitlines(), start=1):
            cells = line.split()
            if len(cells) < 2:
                raise UserError(f"{tiny}: line {number}: found {line!r}; needed: an image, a class")
            labels[cells[0].rpartition(".")[0]] = cells[1]
        return tiny, f"{val}/images", labels
    for above in [folder, *folder.absolute().parents][: _LEVELS + 1]:
        path = above / _KAGGLE
        if path.is_file():
            return path, val, dict(read_list(path))
    return None


def places(folder: Path) -> Listed | None:
    """Find Places365's standard lists, and the images at either size; None if not all are there."""
    if not all((folder / name).is_file() for name in (_CLASSES, _PLACES_TRAIN, _PLACES_VAL)):
        return None
    for size in ("256", "large"):
        train, val = f"data_{size}_standard", f"val_{size}"
        if (folder / train).is_dir() and (folder / val).is_dir():
            classes = {
                as_number(label, folder / _CLASSES): name.strip("/").replace("/", "-")
                for name, label in read_list(folder / _CLASSES)
            }
            lists = ListFile(folder / _PLACES_TRAIN, train), ListFile(folder / _PLACES_VAL, val)
            return Listed(*lists, classes)
    return None


def as_number(label: str, path: Path) -> int:
    """Return a label as a number; UserError names the list if it is none."""
    if not label.isdecimal():
        raise UserError(f"{path}: found label {label!r}; must be a number")
    return int(label)


def labels_of(
    path: Path, rows: list[tuple[str, str]], known: Mapping[str, int], count: int
) -> list[int]:
    """Return the label of every row: a class's name, or its number below ``count``.

    Raises:
        UserError: a label is neither.
    """
    labels = []
    for name, label in rows:
        number = known.get(label)
        if number is None:
            number = int(label) if label.isdecimal() and int(label) < count else None
        if number is None:
            numbers = f", or 0 to {count - 1}" if count else ""
            raise UserError(
                f"{path}: {name} has label {label!r}; allowed: a class of training{numbers}"
            )
        labels.append(number)
    return labels
