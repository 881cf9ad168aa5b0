"""``hvd-lars plan``: how long, how many GPUs, and what binds."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_lars.cli.command import add_config, load_config
from hvd_lars.errors import UserError

if TYPE_CHECKING:
    from hvd_lars.assemble.plan import Plan
    from hvd_lars.config.schema import Config
    from hvd_lars.planning.forecast import Forecast, Range
    from hvd_lars.planning.site import Site

NAME, HELP = "plan", "predict how long a config takes on how many GPUs"
EPILOG = (
    "Example: mpirun -np 8 hvd-lars bench my.yaml --save site.json; "
    "hvd-lars plan my.yaml --from site.json --ranks 8,64,512"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, overrides, the site and the ranks."""
    add_config(parser)
    parser.add_argument(
        "--from", dest="site", type=Path, metavar="SITE", help="file that bench --save wrote"
    )
    parser.add_argument(
        "--ranks", default="1,8,64,512", metavar="N,…", help="numbers of ranks; default 1,8,64,512"
    )
    parser.add_argument(
        "--gpu-hour", type=float, metavar="PRICE", help="price of one rank for an hour"
    )
    parser.add_argument(
        "--critical-batch", type=float, metavar="B", help="in samples, from a run's report"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the forecast."""
    ranks = parse_ranks(options.ranks)
    for name in ("gpu_hour", "critical_batch"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')}: found {value:g}; must be above 0")
    config = load_config(options.config, options.overrides)
    from hvd_lars.planning.site import read_site

    site = None if options.site is None else read_site(options.site)
    from hvd_lars.assemble.check import size_of
    from hvd_lars.assemble.plan import make_plan

    num_train, _, _, notes = size_of(config)
    plan = make_plan(config, num_train, 1)
    found = facts(config, plan, site, ranks, options)
    found["notes"] = notes + found["notes"]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_plan(found, options.gpu_hour)
    return 0


def parse_ranks(text: str) -> list[int]:
    """Parse ``8,64,512``; a UserError says what is allowed."""
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1:
        raise UserError(f"--ranks: found {text!r}; write whole numbers above 0 as 8,64,512")
    return sorted(set(ranks))


def facts(
    config: Config, plan: Plan, site: Site | None, ranks: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the whole forecast as plain values."""
    from hvd_lars.assemble.compared import work_of
    from hvd_lars.planning.forecast import (
        IMAGENET_CRITICAL_BATCH,
        IMAGENET_IMAGES,
        efficiency,
        forecast,
        worth_it_up_to,
        worth_of_a_sample,
    )

    critical, source = options.critical_batch, "given"
    if critical is None and plan.num_train == IMAGENET_IMAGES:
        critical, source = IMAGENET_CRITICAL_BATCH, "ResNet-50 in MLPerf"
    found: dict[str, Any] = {
        "config": options.config,
        "global_batch": plan.global_batch,
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": plan.intervals.total,
        "critical_batch": critical,
        "critical_batch_from": None if critical is None else source,
        "worth_of_a_sample": None
        if critical is None
        else worth_of_a_sample(plan.global_batch, critical),
        "images_a_rank": {n: -(-plan.global_batch // n) for n in ranks},
        "forecasts": [],
        "notes": [],
    }
    if site is None:
        found["notes"].append(
            "no time is predicted without a site's measurements: hvd-lars bench "
            f"{options.config} --save site.json, under the launcher of the run, then --from it"
        )
        return found
    work = work_of(plan, config.train.micro_batch, config.comm.bucket_mb)
    forecasts = [forecast(site, work, n) for n in ranks if n <= plan.global_batch]
    if not forecasts:
        raise UserError(
            f"--ranks: found {ranks}; at most {plan.global_batch}, the samples of a step"
        )
    shares = efficiency(forecasts)
    for each, share in zip(forecasts, shares, strict=True):
        hours = each.run.times(1.0 / 3600.0)
        entry = asdict(each) | {
            "binds": each.binds, "efficiency": share, "hours": hours,
            "gpu_hours": hours.times(each.ranks),
        }  # fmt: skip
        if options.gpu_hour is not None:
            entry["cost"] = hours.times(each.ranks * options.gpu_hour)
        found["forecasts"].append(entry)
    found["worth_it_up_to"] = worth_it_up_to(site, work)
    found["notes"] += _doubts(site, options.config, forecasts)
    return found


def _doubts(site: Site, config: str, forecasts: list[Forecast]) -> list[str]:
    """Return what the measurements do not cover, and an input that is too slow."""
    notes = []
    if site.config != config:
        notes.append(
            f"the site was measured with {site.config}: all times are those of its network of "
            f"{site.parameters:,} parameters, its images and precision"
        )
    largest = forecasts[-1].ranks
    if site.ranks == 1 and largest > 1:
        notes.append(
            "the site was measured on 1 rank: all-reduces are left out, so times of several ranks "
            "are too short; measure under the launcher, over two nodes or more"
        )
    elif site.ranks <= site.ranks_per_node < largest:
        notes.append(
            f"the site was measured on one node of {site.ranks_per_node}: the network between "
            f"nodes is not in the all-reduces of more than {site.ranks_per_node} ranks"
        )
    if site.input_rate is None:
        notes.append("the input was not measured, as the data was not there: it may bind")
    for each in forecasts:
        if site.input_rate and each.binds == "input":
            cores = each.rate_needed / (site.input_rate / site.input_cores)
            notes.append(
                f"{each.ranks} ranks: the input binds: {each.rate_needed:,.0f} images/s a rank are "
                f"needed, {site.input_rate:,.0f} there: about {cores:.1f} cores a rank instead of "
                f"{site.input_cores:g}"
            )
    return notes


def print_plan(found: dict[str, Any], price: float | None) -> None:
    """Print the forecast as a table."""
    print(
        f"{found['config']}: {found['total_steps']:,} steps of {found['global_batch']:,}, "
        f"{found['steps_per_epoch']:,} an epoch"
    )
    if found["critical_batch"] is not None:
        print(
            f"batch: about {1 - found['worth_of_a_sample']:.0%} of the samples are spent on the "
            f"large batch (critical batch {found['critical_batch']:,.0f}, "
            f"{found['critical_batch_from']})"
        )
    head = ["ranks", "images a rank", "ms a step", "s an epoch", "hours", "rank-hours"]
    head += ["cost"] * (price is not None) + ["efficiency", "binds"]
    rows = [head]
    for each in found["forecasts"]:
        row = [f"{each['ranks']:,}", f"{each['images']:,}", _range(each["step"], 1e3)]
        row += [_range(each["epoch"]), _range(each["hours"]), _range(each["gpu_hours"])]
        if price is not None:
            row.append(_range(each["cost"]))
        rows.append([*row, f"{each['efficiency']:.0%}", each["binds"]])
    if not found["forecasts"]:
        rows = [["ranks", "images a rank"]]
        rows += [[f"{n:,}", f"{images:,}"] for n, images in found["images_a_rank"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if "worth_it_up_to" in found:
        print(f"beyond {found['worth_it_up_to']:,} ranks, doubling them saves less than 10 %")
    for note in found["notes"]:
        print(f"note: {note}")


def _range(bounds: Range | tuple[float, float], factor: float = 1.0) -> str:
    """Return two bounds with two or three significant digits, once if they look alike."""
    low, high = (_short(factor * bound) for bound in bounds)
    return low if low == high else f"{low}–{high}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"
