"""Hugging Face's data sets on disk: Arrow files of ``save_to_disk``, and Parquet.

An Arrow file is a stream of record batches, not compressed, in which the bytes of an image lie in
one piece.  Parquet compresses and cuts them: it can be packed, but not read in place.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from hvd_lars.data.forms.scan import (
    Each,
    Files,
    Found,
    Scan,
    as_label,
    check_numbered,
    numbered_classes,
    without_test,
)
from hvd_lars.data.located import Located
from hvd_lars.data.naming import shown
from hvd_lars.data.source import Indices
from hvd_lars.errors import UserError

_TRAIN = ("train", "training")
# ImageNet's names have the class once more: n01440764_10026_n01440764.JPEG.
_WNID_AT_END = re.compile(r"_n\d{8}(?=\.[A-Za-z]+$)")
_VAL = ("validation", "valid", "val", "test")
DICT, _STATE = "dataset_dict.json", "state.json"
_BATCH, _BUFFER = 256, 2**20  # rows, and bytes of a file, read at once


class _Columns(NamedTuple):
    """The columns of images and labels, and the names of the classes, perhaps none."""

    image: str
    label: str
    classes: tuple[str, ...]


class Arrow:
    """A folder that ``DatasetDict.save_to_disk`` wrote; see the module."""

    name = "arrow"

    def find(self, root: Path) -> Files:
        """Return the Arrow files that each split's ``state.json`` names."""
        if (root / _STATE).is_file():
            raise UserError(
                f"data.root: {root}: is one split of a data set; give its parent folder, which has "
                f"{DICT}"
            )
        splits = _json(root / DICT).get("splits", [])
        train, val = (next((s for s in names if s in splits), None) for names in (_TRAIN, _VAL))
        if train is None:
            raise UserError(f"data.root: {root}: {DICT} has splits {splits}; train is needed")
        parts = [_split_files(root / name) if name else ([], []) for name in (train, val)]
        return Files(root, parts[0][0], parts[1][0], parts[0][1] + parts[1][1])

    def scan(self, files: Files, each: Each) -> Scan:
        """See :class:`Form`."""
        return _scan(files, each, _arrow_rows)


class Parquet:
    """``train-NNNNN-of-NNNNN.parquet`` and ``validation-…``, in ``root`` or in ``root/data``."""

    name = "parquet"

    def find(self, root: Path) -> Files:
        """Return the Parquet files by split."""
        folder = root / "data" if any(root.glob("data/*.parquet")) else root
        paths = sorted(path for path in folder.glob("*.parquet") if path.is_file())
        found = {names: [p for p in paths if p.name.startswith(names)] for names in (_TRAIN, _VAL)}
        found[_VAL] = without_test(found[_VAL])
        if not found[_TRAIN]:
            raise UserError(f"data.root: {root}: no train*.parquet in it or in its folder data")
        check_numbered(folder, [*found[_TRAIN], *found[_VAL]])
        return Files(root, found[_TRAIN], found[_VAL], [])

    def scan(self, files: Files, each: Each) -> Scan:
        """See :class:`Form`; an image's offset is its row."""
        return _scan(files, each, _parquet_rows)


FORM, PARQUET = Arrow(), Parquet()


@final
class ParquetImages:
    """The images of Parquet files in the order of ``split``; quick only in stored order."""

    def __init__(self, root: Path, split: Located) -> None:
        self._root, self.split = root, split
        self.labels = split.labels
        self._group: _RowGroup | None = None
        self._starts: dict[int, Indices] = {}

    def take(self, chosen: Indices) -> ParquetImages:
        """Return a store of some of the images."""
        return ParquetImages(self._root, self.split.take(chosen))

    def read(self, index: int) -> bytes:
        """Return an image file's bytes; raises UserError, which names the file, if that fails."""
        file, row = int(self.split.file[index]), int(self.split.offset[index])
        path = self._root / self.split.files[file]
        arrow = _pyarrow()
        try:
            group = self._group
            if group is None or group.file != file or not group.first <= row < group.end:
                self.close()
                group = self._group = self._open(file, path, row)
            data = group.image(row)
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {_line(error)}") from None
        if data is None:
            raise UserError(f"{path}: row {row} has no image")
        return data

    def where(self, index: int) -> str:
        """Return how messages call an image: by its file and row."""
        split = self.split
        return f"{self._root / split.files[split.file[index]]}: row {split.offset[index]}"

    def files(self) -> list[str]:
        """Return the names of the files that hold the images."""
        return [self.split.files[i] for i in sorted(set(self.split.file.tolist()))]

    def close(self) -> None:
        """Close the file of the row group that is being read."""
        if self._group is not None:
            self._group.parquet.close()
        self._group = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the row group that is being read."""
        return self.__dict__ | {"_group": None}

    def _open(self, file: int, path: Path, row: int) -> _RowGroup:
        """Return the row group of a row, at its beginning."""
        # pyarrow would otherwise read the whole group before its first batch.
        parquet = _pyarrow().parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
        if file not in self._starts:
            meta = parquet.metadata
            sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            self._starts[file] = np.cumsum([0, *sizes])
        starts = self._starts[file]
        number = int(np.searchsorted(starts, row, side="right")) - 1
        column = _columns(path, parquet.schema_arrow).image
        batches = parquet.iter_batches(_BATCH, row_groups=[number], columns=[column])
        return _RowGroup(file, parquet, int(starts[number]), int(starts[number + 1]), batches)


@final
class _RowGroup:
    """Rows of a row group, read on in batches, as a group of photographs may be larger than memory.

    Of the group one page is in memory, which pyarrow writes with up to some thousand rows.

    Args:
        file: number of the file.
        parquet: the open file.
        first: its first row, later that of the batch in memory.
        end: one after its last row.
        batches: its record batches, with a column of images.
    """

    def __init__(
        self, file: int, parquet: Any, first: int, end: int, batches: Iterator[Any]
    ) -> None:
        self.file, self.parquet, self.first, self.end = file, parquet, first, end
        self._batches = batches
        self._images: Any = ()

    def image(self, row: int) -> bytes | None:
        """Return the bytes of a row at or after ``first``, None if it has none; OSError if cut."""
        while row >= self.first + len(self._images):
            self.first += len(self._images)
            batch = next(self._batches, None)
            if batch is None:
                raise OSError(f"it has no row {row}")
            self._images = _bytes_of(batch.column(0))
        data: bytes | None = self._images[row - self.first].as_py()
        return data


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "data: Arrow and Parquet need pyarrow: pip install 'hvd_lars[arrow]'"
        ) from None
    return pyarrow


def _scan(files: Files, each: Each, rows_of: Any) -> Scan:
    _pyarrow()
    found = {}
    classes: tuple[str, ...] = ()
    for part, paths in (("train", files.train), ("val", files.val)):
        tables = each(rows_of, list(enumerate(paths)))
        found[part] = [row for rows, _ in tables for row in rows]
        for path, (_, names) in zip(paths, tables, strict=True):
            classes = classes or names
            if names and names != classes:
                raise UserError(
                    f"{path}: its classes are not those of {(files.train + files.val)[0]}: "
                    f"{_difference(names, classes)}"
                )
    return Scan(classes or numbered_classes(found["train"]), found["train"], found["val"])


def _difference(names: Sequence[str], others: Sequence[str]) -> str:
    """Say which is the first label of another name."""
    pairs = enumerate(itertools.zip_longest(names, others, fillvalue="none"))
    label, (here, there) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    return f"label {label} is {shown(here)} here, {shown(there)} there"


def _arrow_rows(item: tuple[int, Path]) -> tuple[list[Found], tuple[str, ...]]:
    number, path = item
    arrow = _pyarrow()
    rows: list[Found] = []
    try:
        with arrow.memory_map(os.fspath(path)) as file:
            whole = file.read_buffer()
            with arrow.ipc.open_stream(arrow.BufferReader(whole)) as stream:
                columns = _columns(path, stream.schema)
                for batch in stream:
                    batch.validate(full=True)  # offsets of a damaged file would lead anywhere
                    rows += _batch_rows(number, path, len(rows), batch, columns, whole)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: no stream of record batches, or damaged: {_line(error)}"
        ) from None
    return rows, columns.classes


def _batch_rows(
    number: int, path: Path, first: int, batch: Any, columns: _Columns, whole: Any
) -> list[Found]:
    """Return the images of a record batch, whose first row is the file's row ``first``."""
    if not batch.num_rows:
        return []
    column = batch.column(columns.image)
    images = _bytes_of(column)
    if images.null_count or column.null_count:
        absent = (images if images.null_count else column).is_null().to_pylist()
        row = first + absent.index(True)
        raise UserError(f"{path}: row {row} has the path of an image and not its bytes")
    width = np.int64 if str(images.type).startswith("large") else np.int32
    _, offsets, data = images.buffers()
    ends = np.frombuffer(offsets, width, len(images) + 1, images.offset * np.dtype(width).itemsize)
    begin = data.address - whole.address
    if not 0 <= begin <= begin + int(ends[-1]) <= whole.size:
        raise UserError(f"{path}: its record batches are compressed; write them without")
    starts, sizes = begin + ends[:-1].astype(np.int64), np.diff(ends)
    labels = _labels(path, first, batch.column(columns.label))
    names = _names_of(column)
    return [
        Found(label, name, number, int(start), int(size))
        for label, name, start, size in zip(labels, names, starts, sizes, strict=True)
    ]


def _parquet_rows(item: tuple[int, Path]) -> tuple[list[Found], tuple[str, ...]]:
    number, path = item
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as parquet:
            columns = _columns(path, parquet.schema_arrow)
            kind = parquet.schema_arrow.field(columns.image).type
            named = arrow.types.is_struct(kind) and kind.get_field_index("path") >= 0
            wanted = [columns.label, *([f"{columns.image}.path"] if named else [])]
            table = parquet.read(columns=wanted)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a Parquet file, or damaged: {_line(error)}") from None
    labels = _labels(path, 0, table.column(columns.label))
    names = _names_of(table.column(columns.image).combine_chunks()) if named else [""] * len(labels)
    rows = [
        Found(label, name, number, row, 0)
        for row, (label, name) in enumerate(zip(labels, names, strict=True))
    ]
    return rows, columns.classes


def _columns(path: Path, schema: Any) -> _Columns:
    """Choose the columns by Hugging Face's description of the features, or by their types."""
    arrow = _pyarrow()
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        plain = {name: value for name, value in features.items() if isinstance(value, dict)}
        kinds = {name: value.get("_type") for name, value in plain.items()}
        kinds = {name: kind for name, kind in kinds.items() if kind in ("Image", "ClassLabel")}
    except (KeyError, TypeError, ValueError, AttributeError):
        features, kinds = {}, {}
    types = arrow.types
    for field in schema:
        binary = types.is_binary(field.type) or types.is_large_binary(field.type)
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0 or binary:
            kinds.setdefault(field.name, "Image")
        elif types.is_integer(field.type) and field.name in ("label", "labels"):
            kinds.setdefault(field.name, "ClassLabel")
    names = set(schema.names)
    image, label = (
        next((name for name, kind in kinds.items() if kind == wanted and name in names), None)
        for wanted in ("Image", "ClassLabel")
    )
    if image is None or label is None or not types.is_integer(schema.field(label).type):
        found = ", ".join(f"{shown(field.name)} ({field.type})" for field in schema)
        raise UserError(
            f"{path}: found columns {found}; needed: one of images with their bytes, such as image "
            f"(struct<bytes: binary, path: string>), and one of integer labels, such as label "
            f"(int64)"
        )
    described = features.get(label)
    classes = (described.get("names") if isinstance(described, dict) else None) or ()
    return _Columns(image, label, tuple(map(str, classes)))


def _bytes_of(column: Any) -> Any:
    """Return the images' bytes from a column of them, or of (bytes, path)."""
    return column.field("bytes") if str(column.type).startswith("struct") else column


def _names_of(column: Any) -> list[str]:
    """Return the file names in a column of (bytes, path); empty where there is none."""
    if not str(column.type).startswith("struct") or column.type.get_field_index("path") < 0:
        return [""] * len(column)
    paths = column.field("path").to_pylist()
    return [_WNID_AT_END.sub("", (path or "").rpartition("/")[2]) for path in paths]


def _labels(path: Path, first: int, column: Any) -> list[int]:
    found = column.to_pylist()
    if None in found:
        raise UserError(f"{path}: row {first + found.index(None)} has no label")
    return [as_label(value, path, first + i, "row") for i, value in enumerate(found)]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"data.root: {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.root: {path}: damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"data.root: {path}: damaged: not a JSON object")
    return found


def _split_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return a split's Arrow files, and the file that names them."""
    state = folder / _STATE
    found = _json(state)
    if found.get("_indices_files") or found.get("_indices_data_files"):
        raise UserError(
            f"data.root: {state}: holds a selection of rows of other files; call the data set's "
            "flatten_indices(), then save_to_disk again"
        )
    try:
        names: Sequence[str] = [entry["filename"] for entry in found["_data_files"]]
        paths = [folder / name for name in names if os.path.basename(name) == name]
    except (KeyError, TypeError, ValueError):
        names, paths = [], []
    if not paths or len(paths) != len(names):
        raise UserError(f"data.root: {state}: damaged: it does not name Arrow files")
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"data.root: {missing}: missing; {state} names it")
    return paths, [state]
