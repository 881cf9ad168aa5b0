"""Loggers for a run's records: TensorBoard, MLflow, Weights & Biases.

Each is an extra of setup.py, imported only when selected.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from hvd_lars.errors import UserError
from hvd_lars.metrics.sinks import Sink
from hvd_lars.runtime.files import replace_text
from hvd_lars.runtime.terminal import warn

LOGGERS = ("tensorboard", "mlflow", "wandb")  # also the names of their packages
_IDS = "loggers.json"  # in the run folder: their ids of the run, by logger


def check_loggers(names: tuple[str, ...]) -> None:
    """Raise UserError if a logger is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"run.loggers: {name} is not installed: pip install {name} (or the extra "
                f"hvd_lars[{name}])"
            )


def make_logger(name: str, folder: Path, config: Mapping[str, Any], step: int = 0) -> Sink:
    """Return a sink that writes into the run folder; a failure warns once and stops only the sink.

    Args:
        name: one of ``LOGGERS``.
        folder: the run folder.
        config: dotted keys and their values, for loggers that show them.
        step: that the run goes on from; records of later steps, which are taken again, are hidden.
    """
    kinds: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {
        "tensorboard": lambda folder, config: _TensorBoard(folder, config, step),
        "mlflow": _MLflow,
        "wandb": _Wandb,
    }
    return Guarded(name, lambda: kinds[name](folder, config))


@final
class Guarded:
    """A third-party sink, which is not called again after its first failure."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        self._try(lambda: setattr(self, "_sink", make()))

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass the record on."""
        sink = self._sink
        if sink is not None:
            self._try(lambda: sink.write(record))

    def close(self) -> None:
        """Close the sink."""
        sink = self._sink
        if sink is not None:
            self._try(sink.close)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 -- no failure of a logger may stop the run
            self._sink = None
            reason = str(error).strip().splitlines()[:1] or [""]
            warn(f"{self._name}: {type(error).__name__}: {reason[0]}; continuing without it")


def scalars_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a record's numbers by ``kind/name``; those of layers by ``norm/name of the layer``."""
    kind = record["kind"]
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": float(number) for name, number in value.items()}
        elif isinstance(value, (int, float)) and key not in ("step", "unix_seconds"):
            found[f"{kind}/{key}"] = float(value)
    return found


@final
class _TensorBoard:
    """Writes scalars and histograms of the trust ratios to ``tensorboard/``."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = step + 1 if step else None
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=purged)
        self._writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()))

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the record, unless it is an event."""
        if record["kind"] == "event":
            return
        for name, value in scalars_of(record).items():
            self._writer.add_scalar(name, value, record["step"])
        if record["kind"] == "layers":
            import numpy as np

            ratios = np.array(list(record["trust_ratio"].values()))
            self._writer.add_histogram("trust_ratio", ratios, record["step"])

    def close(self) -> None:
        """Write buffered data."""
        self._writer.close()


def _kept_id(folder: Path, logger: str) -> str | None:
    """Return the id that a logger gave the run when it began; None if it begins now."""
    path = folder / _IDS
    found: str | None = json.loads(path.read_text()).get(logger) if path.exists() else None
    return found


def _keep_id(folder: Path, logger: str, found: str) -> None:
    path = folder / _IDS
    ids = json.loads(path.read_text()) if path.exists() else {}
    replace_text(path, json.dumps(ids | {logger: found}) + "\n")


@final
class _MLflow:
    """Writes parameters and metrics to ``mlflow.db``, or to MLFLOW_TRACKING_URI if set.

    A resumed run goes on in the run that it began, unless that was deleted.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            database = (folder / "mlflow.db").absolute()
            mlflow.set_tracking_uri(f"sqlite:///{database}")
        mlflow.set_experiment("hvd_lars")
        if (kept := _kept_id(folder, "mlflow")) is not None and self._go_on(kept):
            return
        run = mlflow.start_run(run_name=folder.name)
        _keep_id(folder, "mlflow", run.info.run_id)
        items = list(config.items())
        for begin in range(0, len(items), 100):  # MLflow's limit per call
            mlflow.log_params(dict(items[begin : begin + 100]))

    def _go_on(self, kept: str) -> bool:
        try:
            self._mlflow.start_run(run_id=kept)
        except self._mlflow.exceptions.MlflowException:  # deleted, or another server's
            return False
        return True

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the record, unless it is an event or of layers."""
        if record["kind"] in ("train", "eval"):
            self._mlflow.log_metrics(scalars_of(record), step=record["step"])

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


@final
class _Wandb:
    """Writes offline, to ``wandb/`` in the run folder, unless WANDB_MODE is set.

    A resumed run has the id of the run that it began: online it goes on there, offline
    ``wandb sync --append`` joins the parts.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        kept = os.environ.get("WANDB_RUN_ID") or _kept_id(folder, "wandb")
        self._run: Any = wandb.init(
            project="hvd_lars",
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            mode=mode,
            id=kept,
            resume="allow" if kept and mode == "online" else None,
        )
        _keep_id(folder, "wandb", self._run.id)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the record, unless it is an event."""
        if record["kind"] != "event":
            self._run.log(scalars_of(record), step=record["step"])

    def close(self) -> None:
        """End the run."""
        self._run.finish()
