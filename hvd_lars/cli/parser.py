"""The command line of ``hvd-lars``; imports cli.launch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import hvd_lars
from hvd_lars.cli.launch import KINDS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line on which overrides and options stand in any order."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(late) < len(rest) or (late and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        options.overrides += late
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvd-lars",
        description="Train image classifiers with enormous batches: LARS over Horovod and MPI.",
        epilog="Start several ranks with: horovodrun -np N hvd-lars train CONFIG",
    )
    parser.add_argument("--version", action="version", version=f"hvd-lars {hvd_lars.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_config(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "config", metavar="CONFIG", help="a YAML file or a bundled config's name"
        )
        command.add_argument(
            "overrides", metavar="key.sub=value", nargs="*", help="replaces a value of the config"
        )

    train = commands.add_parser("train", help="train, on every rank that the launcher starts")
    add_config(train)
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on in run.dir from its newest checkpoint, or begin there if it has none",
    )
    train.add_argument(
        "--resume-from", type=Path, metavar="PATH", help="start from a run or a checkpoint of it"
    )
    train.add_argument("--quiet", action="store_true", help="same as run.console=none")
    evaluate = commands.add_parser("eval", help="evaluate a checkpoint of a run")
    evaluate.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    evaluate.add_argument("overrides", metavar="key.sub=value", nargs="*")
    _add_checkpoint(evaluate)
    export = commands.add_parser("export", help="write a run's weights for other programs")
    export.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    export.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE",
        help="weights.safetensors, weights.pth, or model.onnx (with the extra [onnx])",
    )  # fmt: skip
    export.add_argument(
        "--average", action="store_true", help="the average that model.ema_decay keeps"
    )
    export.add_argument("--onnx", action="store_true", help="FILE is to be an .onnx file")
    _add_checkpoint(export)
    check = commands.add_parser("check", help="print the plans of configs without training")
    check.add_argument(
        "configs",
        metavar="CONFIG",
        nargs="+",
        help="a YAML file, a bundled config's name, or key.sub=value for all of them",
    )
    check.set_defaults(overrides=[])
    check.add_argument(
        "--device-memory", metavar="80GB", help="warn where a rank would need more than this"
    )
    check.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks to plan for")
    check.add_argument("--json", action="store_true", help="print the plan as JSON")
    bench = commands.add_parser(
        "bench", help="measure images/s on made-up images, and where a step's time goes"
    )
    bench.add_argument("config", metavar="CONFIG", nargs="?", default="digits", help="as for train")
    bench.add_argument("overrides", metavar="key.sub=value", nargs="*")
    for name, default, what in (
        ("--windows", 10, "measurements, whose spread gives the interval"),
        ("--steps", 10, "steps a window"),
        ("--accumulate", 1, "micro-batches a rank and step"),
    ):
        bench.add_argument(name, type=int, default=default, metavar="N", help=what)
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    pack = commands.add_parser(
        "pack", help="write an image folder as tar shards; run again, it goes on where it was"
    )
    pack.add_argument("source", metavar="SRC", help="root/train/CLASS/image, root/val/CLASS/image")
    pack.add_argument("target", metavar="DST", type=Path, help="folder of the shards")
    cores = len(os.sched_getaffinity(0))
    pack.add_argument("--workers", type=int, default=cores, metavar="N", help="processes")
    pack.add_argument(
        "--shard-samples", type=int, default=4096, metavar="N", help="images a shard; default 4096"
    )
    pack.add_argument(
        "--verify", action="store_true", help="then read every shard and compare checksums"
    )
    _add_launch(commands)
    report = commands.add_parser("report", help="write one page about runs, for a browser")
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run folder")
    report.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="report.html"
    )
    schema = commands.add_parser("schema", help="write the JSON schema of configs, for editors")
    schema.add_argument("-o", "--output", type=Path, metavar="FILE", help="instead of the terminal")
    doctor = commands.add_parser("doctor", help="check the installation; exit 1 if it cannot train")
    recipe = "resnet50-lars-b8192"
    doctor.add_argument(
        "config", metavar="CONFIG", nargs="?", default=recipe, help=f"what is to run; {recipe}"
    )
    doctor.add_argument("overrides", metavar="key.sub=value", nargs="*")
    doctor.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks on this machine")
    doctor.add_argument("--megabytes", type=int, default=64, help="size of the test all-reduce")
    return parser


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest (the newest sound one), best (greatest top-1), a step, or a path",
    )


def _add_launch(commands: Any) -> None:
    launch = commands.add_parser(
        "launch",
        help="start training where one is: here, on hosts, in a scheduler's queue",
        epilog="CONFIG, overrides and --resume are those of train.",
    )
    launch.add_argument("--on", choices=KINDS, required=True, help="what starts the ranks")
    launch.add_argument("-np", type=int, metavar="N", dest="ranks", help="ranks")
    launch.add_argument("--hosts", metavar="a:4,b:4", help="hosts with their slots")
    launch.add_argument("--nic", metavar="NAME", help="interface that all traffic keeps to")
    launch.add_argument("--print-only", action="store_true", help="print the command")
    launch.add_argument("--resume", action="store_true", help="as for train")
    launch.add_argument("config", metavar="CONFIG")
    launch.add_argument("overrides", metavar="key.sub=value", nargs="*")
