"""The command ``hvd-lars``: train, eval, check, bench, pack, schema, doctor.

Imports everything, late: a mistyped config is answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hvd_lars
from hvd_lars.errors import UserError

if TYPE_CHECKING:
    from hvd_lars.comm import Communicator, Launch
    from hvd_lars.config import Config

_USER_ERROR = 2
_GRACE_SECONDS = 3.0


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with 0, 1 (something broke), 2 (the user can mend it) or 75.

    75 is EX_TEMPFAIL of sysexits.h: the run was told to stop and can go on; requeue it.
    """
    options = _parse(arguments)
    try:
        if options.command in ("train", "eval", "bench"):
            sys.exit(_run_on_ranks(options))
        else:
            tools = {"check": _check, "pack": _pack, "schema": _schema, "doctor": _doctor}
            sys.exit(tools[options.command](options))
    except UserError as error:
        _fail_together(str(error))
    except KeyboardInterrupt:
        print("hvd-lars: interrupted", file=sys.stderr, flush=True)
        os._exit(130)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
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
    evaluate = commands.add_parser("eval", help="evaluate a run's newest checkpoint")
    evaluate.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    evaluate.add_argument("overrides", metavar="key.sub=value", nargs="*")
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
    schema = commands.add_parser("schema", help="write the JSON schema of configs, for editors")
    schema.add_argument("-o", "--output", type=Path, metavar="FILE", help="instead of the terminal")
    doctor = commands.add_parser("doctor", help="check the installation; exit 1 if it cannot train")
    doctor.add_argument("--megabytes", type=int, default=64, help="size of the test all-reduce")
    return parser


def _run_on_ranks(options: argparse.Namespace) -> int:
    """Join the ranks and train, evaluate or measure; returns the exit code."""
    # Read before torch is imported: most mistakes are in the config.
    if options.command != "eval":
        config = _config(options.config, options.overrides)
    else:
        if not (options.run_folder / "config.yaml").is_file():
            reason = "no config.yaml in it" if options.run_folder.is_dir() else "no such folder"
            raise UserError(f"{options.run_folder}: not a run folder: {reason}")
        # How many ranks trained, and over what, does not bind who evaluates.
        anywhere = ["comm.backend=auto", "run.expect_world_size=null"]
        path = str(options.run_folder / "config.yaml")
        config = _config(path, [*anywhere, *options.overrides])
    from hvd_lars.cli.elastic import is_elastic, train_elastic
    from hvd_lars.comm import connect, detect_launch

    if options.command == "train" and is_elastic(os.environ):
        return train_elastic(options, config, _guarded)
    launch = detect_launch(os.environ)
    groups = config.model.bn_sync_ranks > 1
    parts = options.command != "eval" and config.optimizer.placement != "replicated"
    comm = connect(config.comm.backend, config.run.expect_world_size, groups, parts)

    def work() -> int:
        if options.command == "train":
            from hvd_lars.cli.train import train

            return train(options, config, comm, launch)
        if options.command == "bench":
            return _bench(options, config, comm, launch)
        return _evaluate(options.run_folder, config, comm, launch)

    return _guarded(comm, work)


def _guarded(
    comm: Communicator, work: Callable[[], int], passed: tuple[type[BaseException], ...] = ()
) -> int:
    """Work on this rank; whatever goes wrong here ends all ranks, but for what is ``passed``."""
    from hvd_lars.replicas import ReplicasDifferError

    try:
        code = work()
    except passed:
        raise
    except (UserError, KeyboardInterrupt):
        raise
    except ReplicasDifferError as error:
        comm.abort(str(error))
    except OSError as error:  # on rank 0 alone: a full disk under metrics.jsonl
        comm.abort(f"{error.filename or 'file system'}: {error.strerror or error}")
    except BaseException:
        # Any other rank may be waiting for this one: say why, then end them all.
        comm.abort(traceback.format_exc())
    comm.close()
    return code


def _config(name: str, overrides: list[str]) -> Config:
    from hvd_lars.config_file import load_config

    return load_config(name, overrides)


def _bench(options: argparse.Namespace, config: Config, comm: Communicator, launch: Launch) -> int:
    from hvd_lars.assemble.bench import bench
    from hvd_lars.cli.bench import print_bench

    for name, least in (("windows", 2), ("steps", 1), ("accumulate", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}: found {getattr(options, name)}; must be {least} or more")
    found = bench(config, comm, launch, options.windows, options.steps, options.accumulate)
    if comm.rank == 0:
        print_bench(options.config, found, options.json)
    return 0


def _evaluate(folder: Path, config: Config, comm: Communicator, launch: Launch) -> int:
    from hvd_lars.assemble import evaluate_run
    from hvd_lars.metrics import finite

    result, average = evaluate_run(folder, config, comm, launch)
    record = result.record() | ({} if average is None else average.record("ema_"))
    if comm.rank == 0:
        print(json.dumps(finite(record)), flush=True)
    return 0


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
    from hvd_lars.doctor import diagnose

    if options.megabytes < 1:
        raise UserError(f"--megabytes: found {options.megabytes}; must be 1 or more")
    return diagnose(options.megabytes)


def _fail_together(message: str) -> NoReturn:
    """Print the message once and exit with 2 on every rank.

    Every rank usually meets the same mistake.  Rank 0 speaks at once; the launcher then ends the
    others, which take its signal for their turn to leave with the same code.  A rank that nobody
    ended by then is alone with its mistake, or has no launcher that ends it, and speaks too.
    """
    from hvd_lars.comm.launcher import ALONE, detect_launch

    try:
        launch = detect_launch(os.environ)
    except UserError:
        launch = ALONE
    prefix = "hvd-lars: "
    if launch.rank != 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(_USER_ERROR))
        time.sleep(_GRACE_SECONDS)
        prefix = f"hvd-lars: rank {launch.rank}: "
    for line in message.splitlines():
        print(f"{prefix}{line}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(_USER_ERROR)  # an orderly exit would wait for the other ranks in MPI's finalize
