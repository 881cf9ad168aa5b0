"""Read a Config from a YAML file and command-line overrides, or report all mistakes at once."""

from __future__ import annotations

import copy
import difflib
import json
import re
import reprlib
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hvd_lars.config.schema import KINDS, Config
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user

_PACKAGE = Path(__file__).resolve().parents[1]
_MUST = "; must be "
_TYPE = re.compile(r"constrained-\w+|literal\[.*\]|float|int|str|bool")  # a union's, in pydantic
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as YAML 1.2 does and refuses a key given twice.

    1e-4 is a number there; 010, which YAML 1.1 takes as 8, and 1:30, which it takes as 90, are not.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            problem = None
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be plain text"
            elif key_node.tag != "tag:yaml.org,2002:merge" and key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
            if problem:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, problem, mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$",
    "tag:yaml.org,2002:float": r"""[-+]?(\.[0-9_]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?$
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$""",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, found) for tag, found in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern, re.VERBOSE), list("-+0123456789."))


def _bundled_folder() -> Path:
    """Return the folder of bundled configs: in the package, or beside it in a checkout."""
    folder = _PACKAGE / "configs"
    return folder if folder.is_dir() else _PACKAGE.parent / "configs"


def bundled_configs() -> dict[str, Path]:
    """Return the paths of the configs that come with hvd_lars, by bare name."""
    return {path.stem: path for path in sorted(_bundled_folder().glob("*.yaml"))}


def _find_base(path: Path, name: str) -> Path:
    """Resolve ``extends: name`` in ``path``: a file beside it, or else a bundled config."""
    beside, bundled = path.parent / name, _bundled_folder() / name
    return bundled if bundled.is_file() and not beside.is_file() else beside


def find_config(name: str) -> Path:
    """Resolve CONFIG to a file: a path, or the bare name of a bundled config.

    Raises:
        UserError: no readable file and no bundled config; names the nearest ones.
    """
    path = expand_user(name, "CONFIG")
    bundled = bundled_configs()
    mode = 0
    try:
        mode = path.stat().st_mode  # is_file() would be silent about errors from Python 3.14 on
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a NUL in it
        pass
    except OSError as error:  # the name is too long, or the folder not searchable
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    if stat.S_ISREG(mode):
        return path
    if stat.S_ISDIR(mode):
        raise UserError(f"{name}: is a folder; a YAML file or a bundled config is needed")
    if name in bundled:
        return bundled[name]
    near = difflib.get_close_matches(path.stem, bundled, n=3)
    hint = f"nearest: {', '.join(near)}" if near else f"{len(bundled)} are bundled, such as digits"
    raise UserError(f"{name}: no such file, nor a bundled config ({hint})")


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Parse one YAML document; a UserError names the source, line and column of a mistake."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise UserError(f"{source}:{place} not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read CONFIG and apply ``key.sub=value`` overrides, whose values are YAML.

    Raises:
        UserError: one line for every mistake in the file and the overrides.
    """
    path = find_config(name)
    tree = _read(path)
    own, base_path, base = tree, path, dict[Any, Any]()
    if isinstance(tree.get("extends"), str):
        base_path = _find_base(path, tree.pop("extends"))
        if not base_path.is_file():
            raise UserError(f"{path}: extends: {base_path}: no such file, nor a bundled one")
        base = _read(base_path)
        if "extends" in base:
            raise UserError(f"{base_path}: extends: an extended file cannot extend another")
        own, tree = tree, _merge(base, tree)
    # Choose the kind of a section before its keys, which depend on the kind.
    choices = tuple(f"{section}.name=" for section in KINDS)
    overrides = sorted(overrides, key=lambda text: not text.startswith(choices))
    own = copy.deepcopy(own)  # as it is in the file
    overridden = {_override(tree, text) for text in overrides}
    overridden |= {section for section in KINDS if f"{section}.name" in overridden}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = []
        for key, message, missing in _explained(error):
            # A section's own error may come from any override inside the section, and so may a
            # key that it lacks, if the files have no such section.
            section = key.rpartition(".")[0]
            made = missing and not _holds(own, section) and not _holds(base, section)
            inside = f"{section if made else key}."
            given = any(f"{key}.".startswith(f"{k}.") or k.startswith(inside) for k in overridden)
            file = base_path if _holds(base, key) and not _holds(own, key) else path
            lines.append(f"{'command line' if given else file}: {message}")
        raise UserError("\n".join(lines)) from None


def with_keys(config: Config, values: Mapping[str, object], source: str) -> Config:
    """Return the config with other values by dotted key, validated.

    Args:
        config: the config.
        values: plain values by key; a section's ``name`` changes its kind, as an override does.
        source: of the values, for errors.

    Raises:
        UserError: one line for every mistake.
    """
    tree = config.model_dump(mode="json")
    for key in sorted(values, key=lambda key: not key.endswith(".name")):
        _override(tree, f"{key}={json.dumps(values[key])}", source)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{source}: {message}" for _, message, _ in _explained(error))
        ) from None


def _read(path: Path) -> dict[Any, Any]:
    """Return the mapping in a YAML file."""
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else _SHORT.repr(tree)
        sections = ", ".join(Config.model_fields)
        raise UserError(f"{path}: found {found}; the sections {sections} are allowed")
    return tree


def _merge(base: dict[Any, Any], tree: dict[Any, Any]) -> dict[Any, Any]:
    """Merge ``tree`` over ``base``; a section that changes its kind keeps only shared keys."""
    merged = dict(base)
    for key, value in tree.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            if key in KINDS and value.get("name", below.get("name")) != below.get("name"):
                below = _kept(key, below, value["name"])
            value = _merge(below, value)
        merged[key] = value
    return merged


def _kept(section: str, tree: dict[Any, Any], name: object) -> dict[Any, Any]:
    """Return the keys that a section keeps when its kind changes: those shared in its family."""
    kinds: dict[object, Any] = {_tag_of(kind): kind for kind in KINDS[section]}
    default = next(iter(kinds)) if section == "optimizer" else None
    old = tree.get("name", default)
    if not isinstance(old, str) or not isinstance(name, str):  # refused later
        return {}
    before, after = kinds.get(old), kinds.get(name)
    if before is None or after is None or not before.FAMILY or before.FAMILY != after.FAMILY:
        return {}
    return {key: value for key, value in tree.items() if key in after.model_fields}


def _holds(tree: dict[Any, Any], key: str) -> bool:
    """Return whether the tree contains a dotted key."""
    node: Any = tree
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def _override(tree: dict[Any, Any], text: str, source: str = "command line") -> str:
    """Set one ``key.sub=value`` in the tree; return the key."""
    key, equals, value = text.partition("=")
    names = key.split(".")
    if not equals or not all(map(str.isidentifier, names)):
        raise UserError(f"{source}: {text!r} is not an override; write key.sub=value")
    node = tree
    for name in names[:-1]:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"{source}: {key}: {name} is a value, not a section")
    found = parse_yaml(value, f"{source}: {key}")
    if key == "extends":
        raise UserError(f"{source}: extends: only a file can extend another")
    if names[1:] == ["name"] and names[0] in KINDS and node.get("name") != found:
        kept = _kept(names[0], node, found)
        node.clear()
        node.update(kept)
    node[names[-1]] = found
    return key


def _explained(error: ValidationError) -> list[tuple[str, str, bool]]:
    """Return for each mistake its key, a line about it, and whether the key is missing.

    What one key may be instead is joined, where it may be of several types.
    """
    lines: list[tuple[str, str, bool]] = []
    for detail in error.errors(include_url=False):
        key, message = _explain(detail)  # type: ignore[arg-type]
        start, must, allowed = message.partition(_MUST)
        if must and lines and lines[-1][1].startswith(start + _MUST):
            lines[-1] = key, f"{lines[-1][1]} or {allowed}", False
        else:
            lines.append((key, message, detail["type"] == "missing"))
    return lines


def _explain(detail: dict[str, Any]) -> tuple[str, str]:
    """Return the key path and a line that says what was found there and what is allowed."""
    # A union adds a tag or a type to the path (data.digits.copies, comm.bucket_mb.float); the file
    # has no such key.
    parts = [_printable(str(part)) for part in detail["loc"]]
    if detail["type"] != "extra_forbidden" and _TYPE.fullmatch(parts[-1] if parts else ""):
        del parts[-1]
    if len(parts) > 1 and parts[0] in KINDS:
        del parts[1]
    key = ".".join(parts)
    kind, context = detail["type"], detail.get("ctx", {})
    found = f"found {_SHORT.repr(detail['input'])}"
    if kind == "extra_forbidden":
        allowed = _fields_at(detail["loc"][:-1])
        near = difflib.get_close_matches(parts[-1], allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return key, f"{key}: unknown key; {hint}allowed: {', '.join(allowed)}"
    if kind == "invalid_key":
        return key, f"{key}: found a key that is not text"
    if kind == "missing":
        return key, f"{key}: missing; it is required"
    if kind == "union_tag_invalid":
        tags = context["expected_tags"].replace("'", "")
        return f"{key}.name", f"{key}.name: found {context['tag']!r}; allowed: {tags}"
    if kind == "union_tag_not_found":
        return f"{key}.name", f"{key}.name: missing; it is required"
    if kind == "value_error":  # of the whole config if there is no key
        return key, f"{key}: {context['error']}".removeprefix(": ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return key, f"{key}: {found}; must be a section of keys and values"
    message = detail["msg"].removeprefix("Input should be ")
    return key, f"{key}: {found}{_MUST}{message}"


def _printable(key: str) -> str:
    """Return the key on one line, escaped if necessary."""
    return key if key.isprintable() else repr(key)


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Return the names allowed in the section at a pydantic error location."""
    model: type[BaseModel] = Config
    candidates: list[type[BaseModel]] = [Config]
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None:
            candidates = _models_in(field.annotation)
            model = candidates[0]
        else:  # a union's tag, or a list index
            model = next((m for m in candidates if part == _tag_of(m)), model)
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models of an annotation: itself, or the members of a union."""
    members = getattr(annotation, "__args__", (annotation,))
    return [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]


def _tag_of(model: type[BaseModel]) -> str | None:
    """Return the value of ``name`` that selects a member of a tagged union."""
    field = model.model_fields.get("name")
    return getattr(field.annotation, "__args__", (None,))[0] if field else None


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that ``load_config`` reads back to the same values."""
    tree = config.model_dump(mode="json", exclude={"extends"})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
