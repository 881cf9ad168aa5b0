"""What a shell completes after TAB: bundled configs, YAML files, keys of a config, their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

VARIABLE = "_ARGCOMPLETE"  # set by the shell's function when it asks


def complete(parser: argparse.ArgumentParser) -> None:
    """Print what can follow the command line, and exit."""
    try:
        import argcomplete
    except ImportError:  # the shell was set up by another environment
        raise SystemExit(1) from None
    argcomplete.autocomplete(parser)


def configs(prefix: str, **_: object) -> list[str]:
    """Return bundled configs and YAML files that begin with ``prefix``."""
    from argcomplete.completers import FilesCompleter

    from hvd_lars.config.file import bundled_configs

    bundled = [name for name in bundled_configs() if name.startswith(prefix)]
    return [*bundled, *FilesCompleter(("yaml", "yml"))(prefix)]


def overrides(prefix: str, **_: object) -> list[str]:
    """Return ``section.key=``, or ``section.key=value`` once there is an equals sign."""
    key, equals, _value = prefix.partition("=")
    found = _keys()
    if not equals:
        return [f"{name}=" for name in found if name.startswith(prefix)]
    return [f"{key}={value}" for value in found.get(key, ())]


def configs_and_overrides(prefix: str, **_: object) -> list[str]:
    """Return what may stand where any number of configs and overrides may."""
    return [*configs(prefix), *overrides(prefix)]


def _keys() -> dict[str, list[str]]:
    """Return all keys of a config with the values of those that have a list of them."""
    from hvd_lars.config.schema import json_schema

    schema = json_schema()
    found: dict[str, list[str]] = {}
    for section, described in schema["properties"].items():
        for each in _sections(described, schema["$defs"]):
            for name, value in each.get("properties", {}).items():
                values = found.setdefault(f"{section}.{name}", [])
                values += [text for text in _values(value) if text not in values]
    return found


def _sections(described: dict[str, Any], defs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the objects that a schema allows: one for each kind of data set or optimizer."""
    if "$ref" in described:
        yield defs[described["$ref"].rpartition("/")[2]]
    for choice in (*described.get("anyOf", ()), *described.get("oneOf", ())):
        yield from _sections(choice, defs)


def _values(described: dict[str, Any]) -> Iterator[str]:
    """Yield the values that a schema lists."""
    yield from map(str, described.get("enum", ()))
    if "const" in described:
        yield str(described["const"])
    if described.get("type") == "boolean":
        yield from ("true", "false")
    for choice in described.get("anyOf", ()):
        yield from _values(choice)
