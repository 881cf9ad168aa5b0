"""Read the records of a run back, for a report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lars.assemble.plan import Plan, make_plan
from hvd_lars.config.file import load_config
from hvd_lars.config.schema import Config
from hvd_lars.data.identity import DataIdentity
from hvd_lars.errors import UserError
from hvd_lars.state import run_folder

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The contents of a run folder."""

    name: str
    folder: Path
    config: Record  # the resolved config, as a tree of plain values
    plan: Plan | None  # with the epoch length of the records; None before one is known
    global_batch: int
    environment: Record
    train: list[Record]
    evaluations: list[Record]
    events: list[Record]
    layers: list[Record]

    @property
    def planned(self) -> list[tuple[float, float]]:
        """The config's schedule as (step, learning rate)."""
        if self.plan is None:
            return []
        total = self.plan.intervals.total
        steps = sorted({*range(0, total, max(1, total // 400)), total - 1})
        return [(step + 1, self.plan.schedule(step)) for step in steps]

    @property
    def critical_batches(self) -> list[tuple[float, float]]:
        """The noise scale S / |G|² by epoch, a ratio of averages over a tenth of the estimates."""
        found = [
            (r["epoch"], sum(r["noise_trace"].values()), sum(r["noise_signal"].values()))
            for r in self.layers
            if "noise_trace" in r and None not in (*r["noise_trace"].values(),)
        ]
        window = max(5, len(found) // 10)
        points = []
        for end in range(1, len(found) + 1):
            trace, signal = (sum(e[i] for e in found[max(0, end - window) : end]) for i in (1, 2))
            if trace > 0.0 and signal > 0.0:
                points.append((found[end - 1][0], trace / signal))
        return points


def read_run(folder: Path) -> Run:
    """Read a run folder; for an unfinished run, the records so far.

    Raises:
        UserError: it is not a run folder, or its files cannot be read.
    """
    run_folder.require_run(folder)
    config = load_config(str(folder / run_folder.CONFIG))
    records = _lines(folder / run_folder.METRICS)
    by_kind = {
        kind: [r for r in records if r.get("kind") == kind] for kind in ("train", "eval", "event")
    }
    if not by_kind["train"]:
        raise UserError(f"{folder / run_folder.METRICS}: no step has been recorded yet")
    return Run(
        name=folder.absolute().name,
        folder=folder,
        config=config.model_dump(mode="json", exclude={"recipe", "extends"}),
        plan=_plan(config, by_kind["train"][-1], by_kind["event"]),
        global_batch=config.train.global_batch,
        environment=_environment(folder / run_folder.ENVIRONMENT) | _prepared(folder),
        train=by_kind["train"],
        evaluations=by_kind["eval"],
        events=by_kind["event"],
        layers=_lines(folder / run_folder.LAYERS),
    )


# What a record of each kind has, beside what was added later.
_KEYS: dict[object, set[str]] = {
    "train": {"epoch", "images_per_second"},
    "eval": {"epoch"},
    "event": {"event"},
    "layers": {"trust_ratio"},
}


def _lines(path: Path) -> list[Record]:
    """Return the records of a JSON-lines file, without a last line that is still being written."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError
            if not record.keys() >= _KEYS.get(record.get("kind"), set()):
                raise ValueError
        except (ValueError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not a record: {line[:40]!r}") from None
        records.append(record)
    return records


def _environment(path: Path) -> Record:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _prepared(folder: Path) -> Record:
    """Return how the run's images were changed before they were packed, if they were."""
    try:
        found = DataIdentity.from_json((folder / run_folder.DATA).read_bytes()).prepared
    except (OSError, ValueError):  # of a run of an earlier version
        return {}
    return {"images packed with": found} if found else {}


def _plan(config: Config, last: Record, events: list[Record]) -> Plan | None:
    """Return the config's plan for the last world size and the records' epoch length."""
    if not last.get("epoch"):
        return None
    steps_per_epoch = round(last["step"] / last["epoch"])
    samples = steps_per_epoch * config.train.global_batch
    sizes = [event["world_size"] for event in events if "world_size" in event]
    return make_plan(config, samples, sizes[-1] if sizes else 1)
