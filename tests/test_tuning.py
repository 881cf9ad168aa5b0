"""Studies: their settings, their trials after a kill at any byte, and their runs."""

import itertools
import json
import math
import random
import shutil

import optuna
import pytest
import torch
from commands import hvd_lars

from hvd_lars.assemble.studied import read_study
from hvd_lars.config.file import dump_config, load_config
from hvd_lars.config.trials import check_space, trial_config, tuned_config
from hvd_lars.errors import UserError
from hvd_lars.models import build_model
from hvd_lars.report.study import study_page
from hvd_lars.settings.durations import Duration
from hvd_lars.tuning import TuneSettings
from hvd_lars.tuning.settings import Range
from hvd_lars.tuning.study import JOURNAL, Study, best_of, read_trials

SPACE = {"schedule.base_lr": {"log": [1.0, 64.0]}, "train.global_batch": {"choices": [64, 256]}}
STEPS = ["train.duration=4 steps", "schedule.warmup_duration=1 steps", "train.eval_every=1 steps"]


def settings(**values):
    return TuneSettings.model_validate({"space": SPACE, "trials": 7} | values)


def curve(params, seed=0):
    """A made-up run: better near a rate of 8, and at each evaluation."""
    rate, batch = params["schedule.base_lr"], params["train.global_batch"]
    distance = abs(rate - 8.0) / 64.0 + (batch == 64) * 0.1 + 0.01 * seed
    return [(1.0 - distance) * done / 4.0 for done in (1, 2, 3, 4)]


def finish(folder, wanted):
    """Run a study's trials as ``tune`` does, to the end; returns them without Optuna's objects."""
    study = Study(folder, wanted)
    while (trial := study.ask()) is not None:
        values = list(trial.values)
        for seed in range(len(values), wanted.seeds):
            found = curve(trial.params, seed)
            pruned = seed == 0 and any(
                study.report(n, len(found), value) for n, value in enumerate(found, 1)
            )
            if pruned:
                study.tell(values, "pruned")
                break
            values.append(found[-1])
            study.run_done(values)
        else:
            study.tell(values, "finished")
    return read_trials(folder)


def test_a_range_has_one_kind_and_a_grid_its_ends():
    assert Range(log=(1.0, 100.0), points=3).grid() == (1.0, pytest.approx(10.0), 100.0)
    assert Range(uniform=(0.0, 1.0), points=3).grid() == (0.0, 0.5, 1.0)
    assert Range(integers=(2, 4)).grid() == (2, 3, 4)
    assert Range(choices=("a", None)).grid() == ("a", None)


@pytest.mark.parametrize(
    ("tune", "line"),
    [
        ("{space: {}}", "tune: space is empty"),
        ("{space: {base_lr: {log: [1, 2]}}}", "space has 'base_lr'; must be a section's key"),
        ("{space: {'schedule.base lr': {log: [1, 2]}}}", "space has 'schedule.base lr'; must be a"),
        ("{space: {schedule.base_lr: {log: [0, 2]}}}", "must be two numbers above 0"),
        ("{space: {schedule.base_lr: {uniform: [2, 1]}}}", "must be two numbers, lower one first"),
        ("{space: {schedule.base_lr: {}}}", "found none of them; give one of log, uniform"),
        ("{space: {schedule.base_lr: {log: [1, 2], points: 1}}}", "points: found 1; must be gr"),
        ("{space: {schedule.base_lr: {choices: [1, 1]}}}", "must be different values"),
        ("{space: {schedule.base_lr: {log: [1, 2]}}, trials: 0}", "tune.trials: found 0"),
        ("{space: {schedule.base_lr: {log: [1, 2]}}, duration: 9 steps}", "in epochs, as train"),
        ("{space: {schedule.base_lr: {log: [1, 2]}}, duration: 99 epochs}", "at most 20 epochs"),
        ("{space: {schedule.base_l: {log: [1, 2]}}}", "did you mean base_lr?"),
        ("{space: {schedule.base_lr: {uniform: [-1, 2]}}}", "base_lr: found -1.0; must be greater"),
        ("{space: {comm.bucket_mb: {log: [1, 2]}}}", "does not define what a run computes"),
        ("{space: {train.duration: {choices: [1 epochs]}}}", "tune.duration is the length"),
        ("null", "tune: missing; write the keys to tune and their ranges"),
    ],
)
def test_mistakes_in_the_section_are_one_line(tune, line):
    with pytest.raises(UserError) as error:
        check_space(load_config("digits", [f"tune={tune}"]))
    assert line in str(error.value)
    assert str(error.value).count("\n") == 0


def test_a_trial_is_the_run_made_shorter_with_its_schedule():
    config = load_config("digits", [f"tune={{space: {json.dumps(SPACE)}, duration: 5 epochs}}"])
    params = {"schedule.base_lr": 3.5, "train.global_batch": 64}
    found = trial_config(config, params, 2, "/there")
    assert (found.schedule.base_lr, found.train.global_batch, found.tune) == (3.5, 64, None)
    share = 5.0 / config.train.duration.value
    warmup = config.schedule.warmup_duration.value
    assert found.train.duration.value == 5.0
    assert found.schedule.warmup_duration.value == share * warmup
    assert (found.run.seed, found.run.dir) == (config.run.seed + 2, "/there")
    short = load_config("digits", [
        "train.duration=4 steps", "schedule.warmup_duration=1 steps",
        f"tune={{space: {json.dumps(SPACE)}, duration: 1 steps}}"])  # fmt: skip
    assert trial_config(short, params, 0, "/there").schedule.warmup_duration.value == 1.0
    half = config.model_copy(update={"tune": settings()})
    assert trial_config(half, params, 0, "/there").train.duration == Duration(10.0, "epochs")
    whole = tuned_config(config, params)
    assert whole.train.duration == config.train.duration
    assert whole.schedule.warmup_duration.value == warmup


def test_values_that_do_not_go_together_name_the_trial():
    with pytest.raises(UserError, match=r"^trial with schedule.warmup=none: schedule: warmup_dur"):
        tuned_config(load_config("digits"), {"schedule.warmup": "none"})


@pytest.mark.parametrize(
    ("sampler", "pruning"), [("tpe", "halving"), ("random", "median"), ("grid", "halving")]
)
def test_a_study_killed_at_any_byte_goes_on_as_it_would_have(tmp_path, sampler, pruning):
    space = {"schedule.base_lr": {"log": [1.0, 64.0], "points": 3}} | {
        key: value for key, value in SPACE.items() if key != "schedule.base_lr"
    }
    wanted = settings(space=space, sampler=sampler, seeds=2, trials=6, first=1, pruning=pruning)
    whole = tmp_path / "whole"
    whole.mkdir()
    trials = finish(whole, wanted)
    assert len(trials) == 6
    assert {trial.ended for trial in trials} == {"finished", "pruned"}
    journal = (whole / JOURNAL).read_bytes()
    # After a line, and in the middle of one.
    ends = [place + 1 for place, byte in enumerate(journal) if byte == ord("\n")]
    cuts = sorted([*ends, *(end - 20 for end in ends)])
    for number, cut in enumerate(cuts if sampler == "tpe" else cuts[::4]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / JOURNAL).write_bytes(journal[:cut])
        (folder / f"{JOURNAL}.lock").touch()  # as a killed job may leave it
        assert finish(folder, wanted) == trials
        shutil.rmtree(folder)


def test_the_first_trials_leave_no_large_gap(tmp_path):
    wanted = settings(trials=10, sampler_seed=3, space={
        "schedule.base_lr": {"log": [1.0, 1024.0]}, "train.warmup": {"uniform": [2.0, 3.0]},
        "train.global_batch": {"integers": [1, 5]}, "optimizer.name": {"choices": ["a", "b"]},
    })  # fmt: skip
    study = Study(tmp_path, wanted)
    found = []
    while (trial := study.ask()) is not None:
        found.append(trial.params)
        study.tell([0.5], "finished")
    for low, high, shares in (
        (0.0, 1.0, [math.log2(each["schedule.base_lr"]) / 10.0 for each in found]),
        (2.0, 3.0, [each["train.warmup"] for each in found]),
    ):
        places = [low, *sorted(shares), high]
        assert max(b - a for a, b in itertools.pairwise(places)) < 0.25
    assert {each["train.global_batch"] for each in found} == {1, 2, 3, 4, 5}
    assert {each["optimizer.name"] for each in found} == {"a", "b"}


def test_pruning_is_optunas_successive_halving(tmp_path):
    wanted = settings(trials=40, first=2, pruning="halving", sampler="random")
    study, random_ = Study(tmp_path, wanted), random.Random(0)
    pruner = optuna.pruners.SuccessiveHalvingPruner(2, 3)
    peer = optuna.create_study(direction="maximize", pruner=pruner)
    decisions = []
    while study.ask() is not None:
        trial = peer.ask()
        for evaluation in range(1, 13):
            value = random_.random()
            trial.report(value, evaluation)
            pruned = study.report(evaluation, 12, value)
            decisions.append(pruned)
            assert pruned == trial.should_prune()
            if pruned:
                break
        study.tell([value], "pruned" if pruned else "finished")
        peer.tell(trial, None if pruned else value, state=optuna.trial.TrialState.PRUNED if pruned
                  else None)  # fmt: skip
    assert 20 < sum(decisions) < 40


@pytest.mark.parametrize(("metric", "sign"), [("top1", 1.0), ("loss", -1.0)])
def test_a_trial_below_the_median_ends_after_half_of_its_evaluations(tmp_path, metric, sign):
    study = Study(tmp_path, settings(trials=9, metric=metric))
    for value, expected in (
        (0.1, False), (0.9, False),  # too few before them
        (0.49, True), (0.5, False),  # medians 0.5 and 0.49, of pruned trials too
        (0.48, True), (0.49, False), (0.0, True),
    ):  # fmt: skip
        study.ask()
        found = [study.report(evaluation, 7, sign * value) for evaluation in range(1, 8)]
        assert found == [False, False, expected, *4 * [False]]
        study.tell([value], "pruned" if expected else "finished")
    study.ask()
    assert not study.report(1, 1, sign * -1.0)  # it is done


def test_tpe_finds_a_better_value_than_chance_in_the_same_trials(tmp_path):
    best = {}
    for sampler in ("tpe", "random"):
        found = []
        for seed in range(3):
            folder = tmp_path / f"{sampler}-{seed}"
            folder.mkdir()
            wanted = settings(sampler=sampler, trials=20, sampler_seed=seed, pruning="none")
            found.append(best_of(finish(folder, wanted), True).value)
        best[sampler] = sum(found)
    assert best["tpe"] > best["random"]


def test_a_lower_loss_is_better_and_a_diverged_trial_the_worst(tmp_path):
    wanted = settings(metric="loss", trials=3, pruning="none")
    study = Study(tmp_path, wanted)
    for value in (0.5, None, 0.25):
        study.ask()
        study.tell([] if value is None else [value], "diverged" if value is None else "finished")
    trials = read_trials(tmp_path)
    assert [trial.ended for trial in trials] == ["finished", "diverged", "finished"]
    assert best_of(trials, False).number == 2
    assert Study(tmp_path, wanted).ask() is None


def test_a_file_that_is_no_journal_is_named(tmp_path):
    (tmp_path / JOURNAL).write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"journal.log: not a study's journal"):
        Study(tmp_path, settings())


def test_a_study_runs_reports_and_goes_on(tmp_path):
    folder = tmp_path / "study"
    space = (
        "{schedule.base_lr: {choices: [8.0, 1.0e+38]}, optimizer.weight_decay: {choices: [0.0]}}"
    )
    options = [
        "digits", f"run.dir={folder}", *STEPS, "train.max_skipped_steps=0",
        f"tune={{space: {space}, sampler: grid, seeds: 2, pruning: none, "
        "duration: 4 steps}",
    ]  # fmt: skip
    code, output = hvd_lars("tune", *options)
    assert code == 0, output
    assert "trial 1 of 2: base_lr 8, weight_decay 0: top1 0." in output
    assert "trial 2 of 2: base_lr 1e+38, weight_decay 0: diverged" in output
    assert f"hvd-lars train {folder}/best.yaml" in output
    finished, diverged = read_trials(folder)
    assert (len(finished.values), list(finished.curve)) == (2, [1, 2, 3, 4])
    assert diverged.ended == "diverged"
    assert not list(folder.glob("trials/*/*/checkpoints"))
    best = load_config(str(folder / "best.yaml"))
    assert (best.schedule.base_lr, best.tune, best.run.dir) == (8.0, None, None)

    code, output = hvd_lars("report", str(folder), "-o", str(tmp_path / "page.html"))
    assert code == 0, output
    page = (tmp_path / "page.html").read_text()
    assert "2 trials of 4 steps at a global batch of 1,024: 1 finished, 1 diverged." in page
    assert page.count("<circle") >= 4
    code, output = hvd_lars("report", str(folder), str(folder), "-o", str(tmp_path / "page.html"))
    assert code == 2
    assert "is a study of tune, which has a page of its own" in output

    before = read_trials(folder)
    code, output = hvd_lars("tune", *options)
    assert code == 2
    assert "holds a run already" in output
    code, output = hvd_lars("tune", *options[:-1], options[-1].replace("seeds: 2", "seeds: 3"),
                            "--resume")  # fmt: skip
    assert code == 2
    assert "tune.seeds: found 3, the study has 2" in output
    kept = [(folder / name).read_bytes() for name in ("config.yaml", "best.yaml")]
    code, output = hvd_lars("tune", *options, "optimizer.momentum=0.5", "--resume")
    assert code == 2
    assert "optimizer.momentum: found 0.5, the study has 0.9" in output
    assert kept == [(folder / name).read_bytes() for name in ("config.yaml", "best.yaml")]
    code, output = hvd_lars("tune", *options, "--resume")  # nothing is left to do
    assert code == 0, output
    assert "best: trial 1" in output
    assert read_trials(folder) == before


def test_values_that_cannot_be_run_are_a_trial_and_what_else_fails_does_not_end_the_study(tmp_path):
    folder = tmp_path / "study"
    space = "{train.global_batch: {choices: [1024, 20000, 512]}}"
    options = ["digits", f"run.dir={folder}", *STEPS, f"tune={{space: {space}, sampler: grid}}"]
    code, output = hvd_lars("tune", *options)
    assert code == 0, output
    assert "trial 2: train.global_batch: found 20000; must be at most 10,764" in output
    assert [trial.ended for trial in read_trials(folder)][:2] == ["finished", "impossible"]

    other = tmp_path / "other"
    space = "{model.name: {choices: [digits_alexnet, nothing, glyphs_alexnet]}}"
    options = ["digits", f"run.dir={other}", *STEPS, f"tune={{space: {space}, sampler: grid}}"]
    code, output = hvd_lars("tune", *options)
    assert code == 2
    assert "trial with model.name=nothing: model.name: " in output
    assert [trial.ended for trial in read_trials(other)] == ["finished", "impossible"]
    code, output = hvd_lars("tune", *options, "--resume")  # the third network is for 16×16
    assert code == 2
    assert "trial with model.name=glyphs_alexnet" in output


def test_a_trial_without_its_values_yet_is_not_reported(tmp_path):
    config = load_config("digits", [f"tune={{space: {json.dumps(SPACE)}, trials: 3}}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    wanted = config.tune
    finish(tmp_path, wanted)
    journal = (tmp_path / JOURNAL).read_bytes()
    for cut in [place + 1 for place, byte in enumerate(journal) if byte == ord("\n")][1:]:
        (tmp_path / JOURNAL).write_bytes(journal[:cut])
        assert study_page(read_study(tmp_path)).count("<section") == 4


def test_a_trial_that_is_stopped_in_order_is_not_given_up(tmp_path):
    wanted = settings(trials=2)
    for _ in range(5):
        study = Study(tmp_path, wanted)
        assert study.ask().number == 0
        study.interrupted()
        assert study.given_up == []
    assert [Study(tmp_path, wanted).ask().number for _ in range(4)] == [0, 0, 0, 1]


def test_what_is_missing_for_a_while_ends_no_trial(tmp_path):
    """Only where another trial could be run in the same job are its values to blame."""
    folder, weights = tmp_path / "study", tmp_path / "weights.pt"
    model = build_model("digits_alexnet", 10)
    torch.save(model.state_dict(), weights)
    options = ["digits", f"run.dir={folder}", *STEPS, f"model.init_from={weights}"]
    options.append("tune={space: {schedule.base_lr: {choices: [8.0, 16.0]}}, sampler: grid}")
    code, output = hvd_lars("tune", *options)
    assert code == 0, output
    shutil.rmtree(folder)
    weights.rename(tmp_path / "aside")
    for _ in range(2):
        code, output = hvd_lars("tune", *options, "--resume")
        assert code == 2, output
        assert "weights.pt" in output
    assert [trial.ended for trial in read_trials(folder)] == ["running"]
    (tmp_path / "aside").rename(weights)
    code, output = hvd_lars("tune", *options, "--resume")
    assert code == 0, output
    assert [trial.ended for trial in read_trials(folder)] == ["finished", "finished"]


def test_a_trial_that_ends_every_job_is_given_up(tmp_path):
    wanted = settings(trials=2)
    numbers = [Study(tmp_path, wanted).ask().number for _ in range(4)]  # each job is killed
    assert numbers == [0, 0, 0, 1]
    assert read_trials(tmp_path)[0].ended == "impossible"
    study = Study(tmp_path, wanted)
    study.ask()
    study.report(1, 4, 0.5)
    for _ in range(4):  # it gets as far as an evaluation, and may go on as often as it must
        assert Study(tmp_path, wanted).ask().number == 1
