"""Trees of plain values."""

from __future__ import annotations

from collections.abc import Iterator


def leaves(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted keys and values of a tree of mappings."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for name, value in tree.items():
        yield from leaves(value, f"{prefix}.{name}" if prefix else name)
