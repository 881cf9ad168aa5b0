"""The page about a study."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import stdev

from hvd_lars.assemble.studied import StudyRecord
from hvd_lars.report.charts import Dot, Series, line_chart, scatter_chart
from hvd_lars.report.html import figure, page_of, table
from hvd_lars.tuning.study import Trial, best_of, shown

# Colours of trials by how they ended; the best has its own.
_COLOURS = {"best": 1, "finished": 0, "pruned": 7, "running": 2, "diverged": 4, "impossible": 3}


def study_page(study: StudyRecord) -> str:
    """Return the page as HTML."""
    best = best_of(study.trials, study.settings.maximize)
    return page_of(
        study.name,
        [
            ("best", "Best trial", _best(study, best)),
            ("keys", "Each key", "".join(_key(study, best, key) for key in study.settings.space)),
            ("curves", "Trials", _curves(study, best)),
            ("table", "All trials", _all(study, best)),
        ],
    )


def _best(study: StudyRecord, best: Trial | None) -> str:
    counts = {
        ended: sum(trial.ended == ended for trial in study.trials)
        for ended in ("finished", "pruned", "diverged", "impossible", "running")
    }
    told = ", ".join(f"{count} {ended}" for ended, count in counts.items() if count)
    text = (
        f"<p>{len(study.trials)} trials of {study.duration} at a global batch of "
        f"{study.global_batch:,}: {told or 'none yet'}.</p>"
    )
    if best is None:
        return text + '<p class="none">No trial has finished yet.</p>'
    rows = [[key, shown(value)] for key, value in best.params.items()]
    name, _, unit = _label(study).partition(", ")
    value = f"{name} {_percents(study) * (best.value or 0.0):.4g}{_spread(study, best)} {unit}"
    return (
        text
        + f"<p>Trial {best.number + 1} is the best: {escape(value.strip())}. "
        + "Its whole config is best.yaml in the study's folder.</p>"
        + table(["key", "value"], rows)
    )


def _key(study: StudyRecord, best: Trial | None, key: str) -> str:
    """Draw the metric of all trials by one key, with the spread over seeds."""
    values = study.settings.space[key]
    names = [str(choice) for choice in values.choices or ()]
    dots, scale = [], _percents(study)
    for trial in study.trials:
        found = _seen(trial)
        if not found or key not in trial.params:
            continue
        name = _kind(trial, best)
        here = trial.params[key]
        x = float(names.index(str(here)) if names else here)
        mean = sum(found) / len(found)
        dots.append(
            Dot(name, x, scale * mean, scale * min(found), scale * max(found), _COLOURS[name])
        )
    dots.sort(key=lambda dot: dot.name == "best")  # drawn last, over the others
    log = values.log is not None
    chart = scatter_chart(f"{_label(study)} by {key}", dots, key, _label(study), names, log)
    last = "; of a pruned trial, its last evaluation"
    bars = ", bars from the worst to the best seed" if study.settings.seeds > 1 else ""
    return figure(chart, f"{key}: {_label(study)} of each trial{bars}{last}")


def _curves(study: StudyRecord, best: Trial | None) -> str:
    series = []
    for trial in sorted(study.trials, key=lambda trial: trial is best):
        name = _kind(trial, best)
        points = [(float(n), _percents(study) * y) for n, y in sorted((trial.curve or {}).items())]
        series.append(Series(name, points, _COLOURS[name], dashed=name == "pruned"))
    chart = line_chart(f"{_label(study)} by evaluation", series, "evaluation", _label(study))
    return figure(chart, f"{_label(study)} of each trial's first seed")


def _all(study: StudyRecord, best: Trial | None) -> str:
    keys, scale = list(study.settings.space), _percents(study)
    sign = -1.0 if study.settings.maximize else 1.0

    def order(trial: Trial) -> tuple[bool, float]:
        return (trial.value is None, sign * (trial.value or 0.0))

    rows = [
        [
            trial.number + 1,
            *(shown(trial.params.get(key, "–")) for key in keys),
            "–" if trial.value is None else f"{scale * trial.value:.4g}{_spread(study, trial)}",
            _kind(trial, best),
            len(trial.curve or {}),
        ]
        for trial in sorted(study.trials, key=order)
    ]
    return table(["trial", *keys, _label(study), "ended", "evaluations"], rows)


def _kind(trial: Trial, best: Trial | None) -> str:
    return "best" if trial is best else trial.ended


def _seen(trial: Trial) -> Sequence[float]:
    """Return the metrics of the finished runs, or the last evaluation of an unfinished one."""
    if trial.values:
        return trial.values
    curve = trial.curve or {}
    return [curve[max(curve)]] if curve else []


def _spread(study: StudyRecord, trial: Trial) -> str:
    if len(trial.values) < 2:
        return ""
    return f" ± {_percents(study) * stdev(trial.values):.2g} ({len(trial.values)} seeds)"


def _percents(study: StudyRecord) -> float:
    return 1.0 if study.settings.metric == "loss" else 100.0


def _label(study: StudyRecord) -> str:
    return {"top1": "top-1, %", "top5": "top-5, %", "loss": "test loss"}[study.settings.metric]
