"""``hvd-lars check``: print the plans of one or more configs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hvd_lars.cli import completion
from hvd_lars.cli.command import completed, load_config
from hvd_lars.errors import UserError

if TYPE_CHECKING:
    from hvd_lars.assemble.check import Report
    from hvd_lars.config.schema import Config
    from hvd_lars.train.schedules import Schedule

NAME, HELP = "check", "print the plans of configs without training"
EPILOG = "Example: hvd-lars check my.yaml --ranks 64 --device-memory 80GB"
_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BARS = "▁▂▃▄▅▆▇█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add configs, overrides for all of them, and the machine to plan for."""
    configs = parser.add_argument(
        "configs",
        metavar="CONFIG",
        nargs="+",
        help="a YAML file, a bundled config's name, or key.sub=value for all of them",
    )
    completed(configs, completion.configs_and_overrides)
    parser.set_defaults(overrides=[])
    parser.add_argument(
        "--device-memory", metavar="80GB", help="warn if a rank would need more than this"
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks to plan for")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--get", metavar="KEY", help="print the value of a key alone, for scripts; empty for null"
    )


def run(options: argparse.Namespace) -> int:
    """Print the plans."""
    # An override contains an equals sign, but so may the name of a file.
    overrides = [t for t in options.configs if "=" in t and not os.path.exists(t)]
    overrides += options.overrides
    configs = [text for text in options.configs if text not in overrides]
    if not configs:
        raise UserError("check: no config is given, only overrides")
    if options.get is not None:
        for name in configs:
            print(value_of(load_config(name, overrides), options.get))
        return 0
    return check(configs, overrides, options.ranks, options.device_memory, options.json)


def check(
    configs: list[str], overrides: list[str], ranks: int, device_memory: str | None, as_json: bool
) -> int:
    """Print the plan of every config; return the exit code.

    Raises:
        UserError: an option is wrong, or a config cannot be run (after printing the others).
    """
    if ranks < 1:
        raise UserError(f"--ranks: found {ranks}; must be 1 or more")
    memory = None if device_memory is None else parse_bytes(device_memory)
    loaded: dict[str, tuple[Config, Config | None]] = {}
    problems: list[str] = []
    # Read all files before importing torch: most mistakes are in them.
    for name in configs:
        try:
            loaded[name] = load_config(name, overrides), None
        except UserError as error:
            problems.append(str(error))
            continue
        with contextlib.suppress(UserError):  # the file may be incomplete without overrides
            loaded[name] = loaded[name][0], load_config(name)
    if problems and not loaded:
        raise UserError("\n".join(problems))
    from hvd_lars.assemble.check import examine

    answers = []
    for name, (config, recipe) in loaded.items():
        try:
            report = examine(config, ranks, memory, recipe)
        except UserError as error:
            problems += [f"{name}: {line}" for line in str(error).splitlines()]
            continue
        if as_json:
            answers.append({"config": name} | facts(report))
        else:
            print_report(name if len(configs) > 1 else None, config, report)
    if as_json and answers:
        print(json.dumps(answers if len(configs) > 1 else answers[0], indent=2))
    sys.stdout.flush()
    if problems:
        raise UserError("\n".join(problems))
    return 0


def value_of(config: Config, key: str) -> str:
    """Return a key's value as text; raises UserError for a section, or where there is no such key.

    The home in ``~/…`` is written out.
    """
    found: Any = config.model_dump(mode="json")
    for name in key.split("."):
        if not isinstance(found, dict) or name not in found:
            raise UserError(f"--get: found {key!r}, which is no key of the config")
        found = found[name]
    if isinstance(found, dict | list):
        raise UserError(f"--get: found {key!r}, which has more than one value")
    return "" if found is None else os.path.expanduser(str(found))


def parse_bytes(text: str) -> float:
    """Parse ``80GB``, ``640 MB`` or ``16GiB`` to bytes; a UserError says what is allowed."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT])(i?)B?\s*", text)
    if match is None or float(match.group(1)) == 0:
        raise UserError(f"--device-memory: found {text!r}; write it as 80GB or 16GiB")
    number, unit, binary = match.groups()
    factor = 1024 ** "KMGT".index(unit) * 1024 if binary else _UNITS[unit]
    return float(number) * factor


def facts(report: Report) -> dict[str, Any]:
    """Return the report as plain values."""
    from hvd_lars.assemble.plan import plan_facts

    return plan_facts(report.plan) | {
        "optimizer_groups": [asdict(group) for group in report.groups],
        "memory_bytes": {key: round(value) for key, value in report.memory.items()},
        "memory_bytes_total": round(report.memory_total),
        "warnings": list(report.warnings),
        "notes": list(report.notes),
    }


def print_report(title: str | None, config: Config, report: Report) -> None:
    """Print the report in columns."""
    plan = report.plan
    intervals, rates = plan.intervals, facts(report)["lr"]
    parameters = sum(group.parameters for group in report.groups)
    rows = {
        "model": f"{config.model.name}, {parameters:,} parameters",
        "data": f"{config.data.name}, {plan.num_train:,} samples an epoch, "
        f"{report.num_classes:,} classes",
        "steps": f"{intervals.total:,} of {plan.global_batch:,} samples, "
        f"{plan.steps_per_epoch:,} an epoch",
        "ranks": f"{plan.ranks}, each up to {-(-plan.global_batch // plan.ranks):,} samples a step",
        "accumulation": f"{plan.accumulation} × micro-batch of up to {plan.largest_micro_batch:,}",
        "optimizer": config.optimizer.summary(),
        "groups": "; ".join(
            f"{g.tensors} tensors of {g.parameters:,}: trust ratio {g.adapt}, "
            f"decay {g.weight_decay:g}"
            for g in report.groups
        ),
        "learning rate": ", ".join(f"{when} {rate:.6g}" for when, rate in rates.items()),
        "": f"{curve(plan.schedule, intervals.total)}  {config.schedule.policy}",
        "warmup": f"{config.schedule.warmup}, {plan.warmup_steps:,} steps to {plan.target_lr:g}",
        "evaluation": f"every {intervals.evaluate:,} steps; checkpoint every "
        f"{intervals.checkpoint:,}; log every {intervals.log:,}",
        "memory a rank": f"{size(report.memory_total)} estimated: "
        + ", ".join(f"{key} {size(value)}" for key, value in report.memory.items() if value),
    }
    if config.recipe is not None:
        top1 = config.recipe.top1
        rows |= {
            "published": f"{'no figure' if top1 is None else f'top-1 {top1:g} %'}, "
            f"{config.recipe.source}"
        }
    if title is not None:
        print(f"\n{title}")
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    for label, lines in (("note", report.notes), ("warning", report.warnings)):
        for line in lines:
            print(f"{label:<{width}}  {line}")


def size(number: float) -> str:
    """Format bytes in GB, or in MB below 1 GB."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def curve(schedule: Schedule, total: int, width: int = 48) -> str:
    """Draw the learning rate over the run in ``width`` block characters."""
    rates = [schedule(i * (total - 1) // (width - 1)) for i in range(width)]
    top = max(rates)
    return "".join(_BARS[min(int(rate / top * len(_BARS)), len(_BARS) - 1)] for rate in rates)
