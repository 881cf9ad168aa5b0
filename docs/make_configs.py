#!/usr/bin/env python3
"""Write docs/configs.md from the config's models: ``python docs/make_configs.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvd_lars.config.schema import json_schema

HEAD = """# Configs

Made by `python docs/make_configs.py`; not to be edited by hand.

A config is a YAML file of the sections below. `data`, `schedule` and `train` have to be there;
every other key has a default. `hvd-lars schema -o schema.json` gives editors completion, and
`hvd-lars check FILE` prints the plan of a file, or all its mistakes at once: key, what was found,
what is allowed.

```yaml
data: {name: digits}
optimizer: {adapt: layer, weight_decay: 5.0e-4}   # of a network without normalisation
schedule: {base_lr: 32.0, warmup: gradual, warmup_duration: 4 epochs}
train: {duration: 20 epochs, global_batch: 1024}
```

- **A bundled file** goes by its name: `hvd-lars train digits`. [Recipes](recipes.md) lists them.
- **`extends: FILE`** takes every key that this file does not have from another, beside it or
  bundled. Sections are merged key by key.
- **Overrides** stand behind the file, `section.key=value` with YAML on the right:
  `schedule.base_lr=16`, `data.copies=3`, `"data={name: digits, copies: 3}"`.
- **Durations** have a unit: `5 epochs`, `600 steps` or `1.28e6 samples`. A step is
  `train.global_batch` samples, however many ranks share them.
- **The resolved config** of a run, with all defaults, is the `config.yaml` in its folder:
  `hvd-lars train runs/a/config.yaml run.dir=runs/b` repeats it.

"""


def kind(field: dict[str, Any]) -> str:
    """What a value may be, in few words."""
    if "anyOf" in field:
        parts = [kind(option) for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(parts)
    if "$ref" in field:
        name = titled(field["$ref"])
        return f"[{name}](#{name.lower()})"
    if "enum" in field:
        return " ".join(f"`{value}`" for value in field["enum"])
    if "examples" in field:
        return f"duration: `{field['examples'][-1]}`"
    if "additionalProperties" in field:
        inner = field["additionalProperties"]
        return "mapping" if inner is True else f"mapping to {kind(inner)}"
    if field["type"] == "array":
        inner = field.get("items") or field["prefixItems"][0]
        return f"list of {kind(inner)}"
    words = {"integer": "whole number", "number": "number", "boolean": "true or false"}
    word = words.get(field["type"], "text")
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:.12g}" for key, sign in bounds.items() if key in field]
    return ", ".join([word, *limits])


def titled(reference: str) -> str:
    """The heading of a model."""
    return reference.rpartition("/")[2]


def default(field: dict[str, Any], required: bool) -> str:
    """The default as a config would say it."""
    if required:
        return "needed"
    value = field.get("default")
    if value is None or value == [] or (isinstance(value, dict) and len(value) > 3):
        return "–"
    if isinstance(value, dict):
        value = "{" + ", ".join(f"{key}: {number}" for key, number in value.items()) + "}"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def table(model: dict[str, Any], prefix: str = "") -> list[str]:
    """The rows of one model."""
    lines = ["| key | default | allowed | |", "|---|---|---|---|"]
    for key, field in model["properties"].items():
        if "const" in field:  # the name that a variant goes by stands in its heading
            continue
        told = field.get("description", "")
        needed = default(field, key in model.get("required", []))
        lines.append(f"| `{prefix}{key}` | {needed} | {kind(field)} | {told} |")
    return lines


def page() -> str:
    """The whole page."""
    schema = json_schema()
    models, lines = schema["$defs"], []
    for section, field in schema["properties"].items():
        if section in ("extends", "recipe"):
            continue
        lines.append(f"## {section}\n")
        if "discriminator" in field:
            lines.append(f"By `{section}.name`; the kinds share most keys.\n")
            for name, reference in field["discriminator"]["mapping"].items():
                model = models[titled(reference)]
                lines += [f"### {section}.name: {name}\n", f"{model['description']}\n"]
                lines += [*table(model, f"{section}."), ""]
            continue
        reference = field.get("$ref") or field["anyOf"][0]["$ref"]
        model = models[titled(reference)]
        lines += [f"{model['description']}\n", *table(model, f"{section}."), ""]
    lines.append("## Parts\n")
    for name in ("AugmentSettings", "CifarAugmentSettings", "Resize", "Expected", "Range"):
        lines += [f"### {name}\n", f"{models[name]['description']}\n"]
        lines += [*table(models[name]), ""]
    return HEAD + "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    path = Path(__file__).parent / "configs.md"
    path.write_text(page(), encoding="utf-8")
    print(f"{path}: written")
