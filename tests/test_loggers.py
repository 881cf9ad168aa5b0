"""Loggers of other people: what they are told, and that none can stop a run."""

import importlib.util
import json

import pytest

from hvd_lars.errors import UserError
from hvd_lars.metrics import check_loggers, make_logger
from hvd_lars.metrics.loggers import LOGGERS, Guarded, scalars_of

LAYERS = {"kind": "layers", "step": 3, "epoch": 0.3, "lr": 1.0,
          "trust_ratio": {"a.weight": 0.5, "b.weight": 0.25},
          "weight_norm": {"a.weight": 2.0}}  # fmt: skip
TRAIN = {"kind": "train", "step": 3, "epoch": 0.3, "loss": 0.5, "unix_seconds": 1.0,
         "rank_busy_seconds": [1.0, 2.0]}  # fmt: skip


class Failing:
    """A sink that fails from its ``first`` call on."""

    def __init__(self, first):
        self.calls, self.first = 0, first

    def write(self, record):
        self.calls += 1
        if self.calls >= self.first:
            raise ConnectionError("the server\nhas gone")

    def close(self):
        raise AssertionError("not asked any more")


def test_a_logger_that_fails_warns_once_and_is_left_alone(capsys):
    sink = Failing(2)
    guarded = Guarded("theirs", lambda: sink)
    for _ in range(4):
        guarded.write(TRAIN)
    guarded.close()
    assert sink.calls == 2
    assert capsys.readouterr().err == (
        "hvd-lars: theirs: ConnectionError: the server; continuing without it\n"
    )


def test_a_logger_that_cannot_be_made_warns_once(capsys):
    def make():
        raise PermissionError("no")

    guarded = Guarded("theirs", make)
    guarded.write(TRAIN)
    guarded.close()
    assert capsys.readouterr().err.count("theirs: PermissionError: no") == 1


def test_numbers_of_a_record():
    assert scalars_of(TRAIN) == {"train/epoch": 0.3, "train/loss": 0.5}
    assert scalars_of(LAYERS) == {
        "layers/epoch": 0.3, "layers/lr": 1.0, "trust_ratio/a.weight": 0.5,
        "trust_ratio/b.weight": 0.25, "weight_norm/a.weight": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_that_is_not_installed_is_one_line(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"run.loggers: {name} is not installed: pip install"):
        check_loggers((name,))
    check_loggers(())


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_holds_scalars_and_histograms(tmp_path, capsys):
    logger = make_logger("tensorboard", tmp_path, {"a.b": 1})
    for record in (TRAIN, LAYERS, {"kind": "event", "step": 3, "event": "stop"}):
        logger.write(record)
    logger.close()
    assert capsys.readouterr().err == ""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == set(scalars_of(TRAIN) | scalars_of(LAYERS))
    [value] = found.Scalars("train/loss")
    assert (value.step, value.value) == (3, 0.5)
    assert found.Tags()["histograms"] == ["trust_ratio"]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_forgets_steps_that_a_resumed_run_takes_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begun, loss, steps in ((0, 1.0, (10, 20, 30)), (20, 2.0, (30, 40))):
        logger = make_logger("tensorboard", tmp_path, {}, begun)
        for step in steps:
            logger.write(TRAIN | {"step": step, "loss": loss})
        logger.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in found] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        pytest.param("mlflow", "mlflow.db", marks=pytest.mark.part("MLflow")),
        pytest.param("wandb", "wandb", marks=pytest.mark.part("Weights & Biases")),
    ],
)
def test_mlflow_and_wandb_write_into_the_run_folder(tmp_path, capsys, monkeypatch, name, file):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = make_logger(name, tmp_path, {"a.b": 1})
    for record in (TRAIN, LAYERS):
        logger.write(record)
    logger.close()
    assert "continuing without it" not in capsys.readouterr().err
    assert (tmp_path / file).exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.part("MLflow")
def test_mlflow_goes_on_in_the_run_that_a_resumed_run_began(tmp_path, capsys, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for begun, config, steps in ((0, {"a": 1}, (3, 6)), (6, {"a": 2}, (9,))):
        logger = make_logger("mlflow", tmp_path, config, begun)
        for step in steps:
            logger.write(TRAIN | {"step": step})
        logger.close()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'hvd_lars'")

    def runs():
        return client.search_runs([experiment.experiment_id])

    [run] = runs()
    curve = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in curve] == [3, 6, 9]
    assert run.data.params == {"a": "1"}  # as it began: MLflow refuses other values
    client.delete_run(run.info.run_id)
    make_logger("mlflow", tmp_path, {}, 9).close()
    assert len(runs()) == 1
    assert runs()[0].info.run_id != run.info.run_id
    assert "continuing without it" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.part("Weights & Biases")
def test_wandb_gives_a_resumed_run_the_id_of_the_run_it_began(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    for step in (0, 6):
        make_logger("wandb", tmp_path, {}, step).close()
    [kept] = json.loads((tmp_path / "loggers.json").read_text()).values()
    parts = list((tmp_path / "wandb").glob("offline-run-*"))
    assert parts
    assert [part.name for part in parts if kept not in part.name] == []
