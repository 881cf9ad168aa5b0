"""Keys that bind a run or a recipe; the definition of each key says which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Literal

from pydantic import BaseModel

from hvd_lars.config.schema import Config
from hvd_lars.settings.tree import leaves


def values_of(config: Config) -> dict[str, object]:
    """Return the values of a config by dotted key, as plain values; lists are not split."""
    return dict(leaves(config.model_dump(mode="json")))


def changes(
    before: Config,
    after: Config,
    bound: Literal["run", "recipe"],
    describe: Callable[[str, object, object], str],
    allowed: Collection[str] = (),
) -> list[str]:
    """Describe every changed key that binds a run, or a recipe; one line each.

    Args:
        before: config of the run or the recipe.
        after: config to compare with it.
        bound: whether to report keys that bind a run or those that bind a recipe.
        describe: makes the line from the key and its values before and after.
        allowed: keys and sections that may change.
    """
    was, now = values_of(before), values_of(after)
    binds = dict(_binds(before)) | dict(_binds(after))
    return [
        describe(key, was.get(key), now.get(key))
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
        and bound in (_binding_of(key, binds) or "").split(" and ")
        and not any(_overlap(key, other) for other in allowed)
    ]


def binding_of(config: Config, key: str) -> str | None:
    """Return what a key of the config binds; None if there is no such key."""
    return _binding_of(key, dict(_binds(config)))


def _binding_of(key: str, binds: dict[str, str]) -> str | None:
    """Return what a key binds; one of a mapping of options binds as the mapping does."""
    while key and key not in binds:
        key = key.rpartition(".")[0]
    return binds.get(key)


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _binds(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key with its binding, including the keys of optional sections."""
    for name, field in type(section).model_fields.items():
        extra, value = field.json_schema_extra, getattr(section, name)
        if isinstance(extra, dict):
            yield f"{prefix}{name}", str(extra["binds"])
        if isinstance(value, BaseModel):
            yield from _binds(value, f"{prefix}{name}.")
