"""Forecasts: exact where the answer is known, and against published runs."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import hvd_lars

from hvd_lars.errors import UserError
from hvd_lars.planning.comparison import Measured, compare
from hvd_lars.planning.cost import Compute, Links, step_seconds
from hvd_lars.planning.forecast import Work, forecast, worth_it_up_to, worth_of_a_sample
from hvd_lars.planning.site import Site, read_site

CHECK = Path(__file__).parents[1] / "benchmarks/plan_check.py"
CURVE = ((4e3, 1e-4), (1e6, 2e-4), (25e6, 2.6e-3), (100e6, 1.01e-2))
SITE = Site("digits", 8, 8, 25_000_000, ((16.0, 0.012), (64.0, 0.036)), CURVE, None, 4.0)
WORK = Work(4096, 64, 300, 27_000, 25e6)


def test_two_micro_batches_tell_the_fixed_cost_and_that_of_an_image():
    found = Compute.of_two((64, 0.036), (16, 0.012))
    assert (found.fixed, found.per_image) == (pytest.approx(0.004), pytest.approx(0.0005))
    assert Compute.of_one(64, 0.036, 0.004).per_image == pytest.approx(0.0005)
    with pytest.raises(ValueError, match="both have 8 images"):
        Compute.of_two((8, 0.1), (8, 0.2))


def test_an_all_reduce_moves_2_p_minus_1_of_p_bytes_over_the_slowest_link():
    links = Links(8, 200e9, 50e9)
    within, between = links.all_reduce_seconds(1, 1e9), links.all_reduce_seconds(4, 1e9)
    assert within == pytest.approx(1e9 * 2 * 7 / 8 / 200e9, rel=0.02)
    assert between == pytest.approx(1e9 * 2 * 31 / 32 / 50e9, rel=0.02)
    assert Links(1, 200e9).all_reduce_seconds(1, 1e9) == 0.0


def test_communication_hides_behind_two_thirds_of_the_compute():
    compute = Compute(0.0, 0.003)
    assert step_seconds(compute, 10, 0.015) == pytest.approx(0.045)
    assert step_seconds(compute, 10, 0.015, overlap=1.0) == pytest.approx(0.03)
    assert step_seconds(compute, 10, 0.025, overlap=1.0) == pytest.approx(0.035)


def test_one_rank_takes_its_compute():
    found = forecast(SITE, WORK, 1)
    seconds = 64 * 0.004 + 4096 * 0.0005
    assert found.step == (pytest.approx(0.95 * seconds), pytest.approx(1.05 * seconds))
    assert found.epoch.middle == pytest.approx(300 * seconds)
    assert found.binds == "compute"


def test_ranks_divide_the_compute_but_not_the_all_reduce():
    some, many = forecast(SITE, WORK, 8), forecast(SITE, WORK, 512)
    assert some.parts["compute"] == pytest.approx(64 * many.parts["compute"])
    assert some.parts["all-reduce bandwidth"] == pytest.approx(4 * (2.6e-3 - 1e-4))
    assert many.parts["all-reduce bandwidth"] > some.parts["all-reduce bandwidth"]
    assert many.parts["all-reduce latency"] == pytest.approx(3 * some.parts["all-reduce latency"])
    assert many.binds == "all-reduce bandwidth"
    assert some.step.low < some.step.high
    assert 64 <= worth_it_up_to(SITE, WORK) <= 512


def test_an_input_that_is_too_slow_binds():
    slow = replace(SITE, input_rate=1000.0)
    found = forecast(slow, WORK, 64)
    assert found.binds == "input"
    assert found.step == (pytest.approx(0.064), pytest.approx(0.064))
    assert found.rate_needed > 1000.0
    assert forecast(replace(SITE, input_rate=1e5), WORK, 64).binds != "input"


def test_a_sample_at_the_critical_batch_is_worth_half():
    assert worth_of_a_sample(100, 100.0) == 0.5
    assert worth_of_a_sample(32_768, 9_000.0) == pytest.approx(0.215, abs=1e-3)


def test_a_site_is_read_as_it_was_written(tmp_path):
    (tmp_path / "site.json").write_text(SITE.text())
    assert read_site(tmp_path / "site.json") == SITE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "the file: Invalid JSON"),
        ("[1]", "must be a file of bench --save"),
        ('{"ranks": 2}', "config: Field required"),
        ({"ranks": "two"}, "ranks: Input should be a valid integer"),
        ({"compute": [[16, 0.1], [16, 0.2]]}, "compute: two sizes are needed"),
        ({"compute": [[16, 0.1], [32, -0.2]]}, "is not above 0"),
        ({"input_cores": 0}, "is not above 0"),
        ({"input_rate": math.nan}, "is not above 0"),
        ({"ranks": 0}, "at least 1 is needed"),
        ({"ranks": 1}, "all_reduce: sizes must rise, and one rank has none"),
        ({"all_reduce": [[4, 0.1], [4, 0.2]]}, "all_reduce: sizes must rise"),
        ({"format": 7}, "format 7; this version reads 1"),
    ],
)
def test_what_is_no_site_is_one_line(tmp_path, text, message):
    path = tmp_path / "site.json"
    if isinstance(text, dict):
        path.write_text(SITE.text())
        text = json.dumps(json.loads(path.read_text()) | text)
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_site(path)
    assert str(caught.value).startswith(f"--from: {path}: ")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_published_runs_are_predicted_within_a_twentieth():
    done = subprocess.run([sys.executable, CHECK], capture_output=True, text=True, check=True)
    row = re.search(r"\*\*the model\*\* \| (\d+) \| ([\d.]+)% \| ([\d.]+)%", done.stdout)
    points, median, tenth = map(float, row.groups())
    assert points == 61
    assert median <= 6.0
    assert tenth <= 16.0


def test_the_command(tmp_path):
    code, output = hvd_lars("plan", "digits")
    assert code == 0
    assert "note: no time is predicted without a site's measurements" in output
    (tmp_path / "site.json").write_text(SITE.text())
    options = ["--from", tmp_path / "site.json", "--gpu-hour", "2.5", "--critical-batch", "400"]
    code, output = hvd_lars("plan", "digits", *options, "--ranks", "1,8,64")
    assert code == 0, output
    assert "about 72% of the samples are spent on the large batch" in output
    assert re.search(r"^ +64 +16 .*%", output, re.MULTILINE)
    assert "the network between nodes is not in the all-reduces of more than 8 ranks" in output
    code, output = hvd_lars("plan", "digits", *options, "--json")
    assert [each["ranks"] for each in json.loads(output)["forecasts"]] == [1, 8, 64, 512]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "8,x"], "--ranks: found '8,x'; write whole numbers above 0 as 8,64,512"),
        (["--gpu-hour", "-1"], "--gpu-hour: found -1; must be above 0"),
        (["--from", "/no/site.json"], "--from: /no/site.json: cannot be read: No such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    code, output = hvd_lars("plan", "digits", *arguments)
    assert code == 2
    assert message in output
    assert len(output.splitlines()) == 1


AS_PLANNED = Measured(8, 0.289, 0.0, 0.0005, [0.0] * 8, [0.288] * 8)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "as planned; largest loss: the fixed cost of small micro-batches"),
        ({"step": 0.4, "rank_data": [0.1] * 8}, "slower than planned; largest loss: waiting for"),
        ({"step": 0.4, "communication": 0.1}, "largest loss: communication that backward does not"),
        (
            {"step": 0.4, "communication": 0.1, "rank_busy": [0.288] * 5 + [0.388] + [0.288] * 2},
            "largest loss: rank 5, which is slower than the others, 100 ms a step (25 %)",
        ),
        ({"step": 0.4, "rank_busy": [0.39] * 8}, "computing slower than in the site's"),
        ({"step": 0.1, "rank_busy": [0.09] * 8}, "faster than planned"),
    ],
)
def test_a_run_is_compared_with_its_plan_and_the_likeliest_cause_told(change, told):
    found = compare(SITE, WORK, replace(AS_PLANNED, **change))
    assert found.expected == forecast(SITE, WORK, 8)
    assert told in found.sentence()
    # 512 images of 36 ms / 64, over the step.
    assert found.efficiency == pytest.approx(512 * 0.036 / 64 / change.get("step", 0.289))
    assert found.expected_efficiency.low < found.expected_efficiency.high


def test_one_rank_waits_for_no_other():
    alone = Measured(1, 3.0, 0.6, 0.0, [], [])
    found = compare(SITE, WORK, alone)
    assert "largest loss: waiting for images, 600 ms a step (20 %)" in found.sentence()
