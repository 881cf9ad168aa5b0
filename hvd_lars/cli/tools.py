"""The commands of ``hvd-lars`` that need no ranks: late imports, for a quick answer.

Imports everything.
"""

from __future__ import annotations

import argparse
import json
import os

from hvd_lars.errors import UserError


def _check(options: argparse.Namespace) -> int:
    from hvd_lars.cli.check import check

    # An override is what has a key before its equals sign; a file may hold one in its name.
    overrides = [t for t in options.configs if "=" in t and not os.path.exists(t)]
    overrides += options.overrides
    configs = [text for text in options.configs if text not in overrides]
    if not configs:
        raise UserError("check: no config is given, only overrides")
    return check(configs, overrides, options.ranks, options.device_memory, options.json)


def _pack(options: argparse.Namespace) -> int:
    from hvd_lars.cli.pack import pack

    return pack(
        options.source, options.target, options.workers, options.shard_samples, options.verify
    )


def _schema(options: argparse.Namespace) -> int:
    from hvd_lars.config import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if options.output is None:
        print(text, end="")
        return 0
    try:
        options.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{options.output}: cannot be written: {error.strerror}") from None
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from hvd_lars.assemble.sources import shared_bytes_of
    from hvd_lars.config_file import load_config
    from hvd_lars.doctor import diagnose

    for option in ("megabytes", "ranks"):
        if getattr(options, option) < 1:
            raise UserError(f"--{option}: found {getattr(options, option)}; must be 1 or more")
    config = load_config(options.config, options.overrides)
    needed = shared_bytes_of(config) * options.ranks
    return diagnose(options.megabytes, options.config, options.ranks, needed)


def _launch(options: argparse.Namespace) -> int:
    from hvd_lars.cli.launch import launch, start_of
    from hvd_lars.config_file import load_config

    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"-np: found {options.ranks}; must be 1 or more")
    load_config(options.config, options.overrides)  # a mistake is told before anything waits
    resume = ["--resume"] if options.resume else []
    training = [options.config, *options.overrides, *resume]
    start = start_of(options.on, training, options.ranks, options.hosts, options.nic, os.environ)
    return launch(start, options.print_only)


def _export(options: argparse.Namespace) -> int:
    from hvd_lars.config_file import load_config
    from hvd_lars.run_folder import ANYWHERE, config_of

    config = load_config(config_of(options.run_folder), ANYWHERE)
    if options.onnx and options.output.suffix != ".onnx":
        raise UserError(f"--onnx: -o {options.output}: must end in .onnx")
    from hvd_lars.assemble.export import export

    told = options.checkpoint, options.average
    print(export(options.run_folder, config, options.output, *told))
    return 0


def _report(options: argparse.Namespace) -> int:
    from hvd_lars.report import write_report

    write_report(options.runs, options.output)
    print(f"{options.output}: {len(options.runs)} run{'s' if len(options.runs) > 1 else ''}")
    return 0


TOOLS = {
    "check": _check,
    "doctor": _doctor,
    "export": _export,
    "launch": _launch,
    "pack": _pack,
    "report": _report,
    "schema": _schema,
}
