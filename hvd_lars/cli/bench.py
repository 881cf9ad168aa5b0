"""``hvd-lars bench``: how fast a config trains, and where the time goes; imports assemble."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from hvd_lars.assemble.bench import Bench
from hvd_lars.run_folder import environment_facts


def facts(found: Bench) -> dict[str, Any]:
    """The measurement as plain values, with where it was taken."""
    return asdict(found) | {"floor_ratio": found.floor_ratio, "environment": environment_facts()}


def print_bench(name: str, found: Bench, as_json: bool) -> None:
    """A few lines in columns, or one JSON object."""
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
