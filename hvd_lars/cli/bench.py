"""``hvd-lars bench``: how fast a config trains, and where the time goes."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_lars.cli.command import add_config, load_config
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import write_output
from hvd_lars.state.run_folder import environment_facts

if TYPE_CHECKING:
    from hvd_lars.assemble.bench import Bench
    from hvd_lars.comm import Communicator, Launch
    from hvd_lars.config.schema import Config

NAME, HELP = "bench", "measure images/s on synthetic images, and where a step's time goes"
EPILOG = "Example: mpirun -np 4 hvd-lars bench my.yaml --save site.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, overrides and the extent of the measurement."""
    add_config(parser, default="digits")
    for name, default, text in (
        ("--windows", 10, "measurements, default 10; their spread gives the confidence interval"),
        ("--steps", 10, "steps per measurement, default 10"),
        ("--accumulate", 1, "micro-batches per rank and step, default 1"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="SITE",
        help="measure two micro-batches, the input and all-reduces for hvd-lars plan, into a file",
    )


def read_config(options: argparse.Namespace) -> Config:
    """Read the config with its overrides."""
    return load_config(options.config, options.overrides)


def run(options: argparse.Namespace, config: Config, comm: Communicator, launch: Launch) -> int:
    """Measure; rank 0 prints the result."""
    from hvd_lars.assemble.bench import bench

    for name, least in (("windows", 2), ("steps", 1), ("accumulate", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}: found {getattr(options, name)}; must be {least} or more")
    if options.save is not None:
        return save(options, config, comm, launch)
    found = bench(config, comm, launch, options.windows, options.steps, options.accumulate)
    if comm.rank == 0:
        print_bench(options.config, found, options.json)
    return 0


def save(options: argparse.Namespace, config: Config, comm: Communicator, launch: Launch) -> int:
    """Measure the site and write it on rank 0."""
    from hvd_lars.assemble.site import measure_site
    from hvd_lars.comm.agree import on_root

    on_root(comm, lambda: _check_writable(options.save))
    site = measure_site(options.config, config, comm, launch, options.windows, options.steps)
    on_root(comm, lambda: write_output(options.save, site.text(), "--save: "))
    if comm.rank == 0:
        costs = site.costs
        print(f"fixed cost of a micro-batch  {1e3 * costs.fixed:.2f} ms")
        print(f"cost of an image             {1e3 * costs.per_image:.3f} ms")
        rate = "not measured" if site.input_rate is None else f"{site.input_rate:,.0f} images/s"
        print(f"input of a rank              {rate}")
        for size, seconds in site.all_reduce:
            print(f"all-reduce of {size / 1e6:>7g} MB     {1e3 * seconds:.3f} ms")
        print(f"{options.save}: written; hvd-lars plan {options.config} --from {options.save}")
    return 0


def _check_writable(path: Path) -> None:
    """Raise UserError if the file could not be written after minutes of measuring."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--save: {path}: cannot be written")


def facts(found: Bench) -> dict[str, Any]:
    """Return the measurement and its environment as plain values."""
    return asdict(found) | {"floor_ratio": found.floor_ratio, "environment": environment_facts()}


def print_bench(name: str, found: Bench, as_json: bool) -> None:
    """Print a few lines in columns, or one JSON object."""
    if as_json:
        print(json.dumps(facts(found), indent=2), flush=True)
        return
    per_rank = found.images_per_second / found.ranks
    parts = found.part_seconds
    rest = found.step_seconds - sum(parts.values())
    share = {part: took / found.step_seconds for part, took in parts.items()}
    rows = {
        "config": f"{name}, {found.parameters:,} parameters, {found.placement}, {found.kernel}",
        "ranks": f"{found.ranks}, micro-batch {found.micro_batch}, step of {found.global_batch:,}",
        "images/s": f"{found.images_per_second:,.1f} ± {found.half_interval:,.1f} "
        f"(95 %, {len(found.windows)} windows); {per_rank:,.1f} a rank",
        "step": f"{found.step_seconds * 1e3:.2f} ms",
    }
    rows |= {f"  {part}": f"{took * 1e3:.2f} ms  {share[part]:.1%}" for part, took in parts.items()}
    rows |= {
        "  rest": f"{rest * 1e3:.2f} ms  {rest / found.step_seconds:.1%}",
        "optimizer": f"{found.floor_ratio:.2f} × the floor of {found.floor_seconds * 1e3:.2f} ms "
        f"(28 bytes a parameter that a rank updates)",
        "peak memory": f"{found.peak_bytes / 1e9:.2f} GB, the largest rank's",
    }
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}", flush=True)
