"""The identity of a run's data, to compare when it is used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_SHOWN = 3  # class names in a line


@dataclass(frozen=True)
class SplitIdentity:
    """The number of images, and a SHA-256 that identifies them in order."""

    images: int
    sha256: str


@dataclass(frozen=True)
class DataIdentity:
    """The identity of a data set: class names by label, and its splits.

    Equal identities mean the same samples in the same order with the same labels, as far as names
    show.  The images' bytes are covered only in shards that an earlier version of ``pack`` wrote.
    """

    classes: tuple[str, ...]
    train: SplitIdentity
    val: SplitIdentity
    prepared: str = ""
    """How the images were changed before they were stored; empty if they were not."""

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> DataIdentity:
        """Parse the JSON of :meth:`record`; raises ValueError for anything else.

        Folder names need not be valid Unicode, so no validation library parses them here.
        """
        try:
            found = json.loads(text)
            classes = found["classes"]
            if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise ValueError("classes are not names")
            splits = _split(found["train"]), _split(found["val"])
            return cls(tuple(classes), *splits, str(found.get("prepared", "")))
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a data identity: {type(error).__name__} {error}") from None


def _split(found: Any) -> SplitIdentity:
    images, digest = found["images"], found["sha256"]
    if type(images) is not int or not isinstance(digest, str):
        raise ValueError("images is not a number, or sha256 not text")
    return SplitIdentity(images, digest)


def hash_of(names: Sequence[bytes], labels: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    """Return the SHA-256 of a split by the names (``train/CLASS/name``) and labels of its images.

    Every form of a data set has this hash, so that a run may go on from another form.
    """
    digest = hashlib.sha256(b"\0".join(names))
    digest.update(labels.tobytes())
    return digest.hexdigest()


def made_identity(description: str, train: int, val: int, classes: int) -> DataIdentity:
    """Return the identity of generated or fixed images, by a ``description`` of them."""
    digest = hashlib.sha256(description.encode()).hexdigest()
    return DataIdentity(
        tuple(map(str, range(classes))), SplitIdentity(train, digest), SplitIdentity(val, digest)
    )


def differences(then: DataIdentity, now: DataIdentity, only_eval: bool = False) -> list[str]:
    """Return the differences, a phrase each; ``only_eval`` ignores the training images."""
    found = _class_differences(then.classes, now.classes)
    if then.prepared != now.prepared:
        said, says = (one.prepared or "as they are" for one in (then, now))
        found.append(f"images {said} then, {says} now")
    for name in ("val",) if only_eval else ("train", "val"):
        before: SplitIdentity = getattr(then, name)
        after: SplitIdentity = getattr(now, name)
        if before.images != after.images:
            found.append(f"{before.images:,} images in {name} then, {after.images:,} now")
        elif before != after and not found:
            found.append(f"other images in {name}, or in another order")
    return found


def _class_differences(then: Sequence[str], now: Sequence[str]) -> list[str]:
    if tuple(then) == tuple(now):
        return []
    gone, new = (sorted(set(a) - set(b)) for a, b in ((then, now), (now, then)))
    parts = [f"{len(then):,} classes then, {len(now):,} now"] if len(then) != len(now) else []
    for names, what in ((gone, "gone"), (new, "new")):
        if names:
            rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            parts.append(f"{what}: class {', '.join(names[:_SHOWN])}{rest}")
    label = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), None)
    if label is not None:
        parts.append(f"label {label} was {then[label]} and is {now[label]}")
    return parts
