"""Read the records of a run back, for a report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lars.assemble.plan import make_plan
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
    global_batch: int
    environment: Record
    train: list[Record]
    evaluations: list[Record]
    events: list[Record]
    layers: list[Record]
    planned: list[tuple[float, float]]  # (step, learning rate)


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
        global_batch=config.train.global_batch,
        environment=_environment(folder / run_folder.ENVIRONMENT) | _prepared(folder),
        train=by_kind["train"],
        evaluations=by_kind["eval"],
        events=by_kind["event"],
        layers=_lines(folder / run_folder.LAYERS),
        planned=_planned(config, by_kind["train"][-1], by_kind["event"]),
    )


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
        except ValueError:
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


def _planned(config: Config, last: Record, events: list[Record]) -> list[tuple[float, float]]:
    """Return the config's schedule, with the epoch length of the run's records."""
    if not last.get("epoch"):
        return []
    steps_per_epoch = round(last["step"] / last["epoch"])
    samples = steps_per_epoch * config.train.global_batch
    sizes = [event["world_size"] for event in events if "world_size" in event]
    plan = make_plan(config, samples, sizes[-1] if sizes else 1)
    total = plan.intervals.total
    steps = sorted({*range(0, total, max(1, total // 400)), total - 1})
    return [(step + 1, plan.schedule(step)) for step in steps]
