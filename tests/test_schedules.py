"""Learning rates against literal lists."""

import pytest

from hvd_lars.settings.durations import Duration
from hvd_lars.train.schedules import (
    constant,
    constant_warmup,
    cosine,
    gradual_warmup,
    multistep,
    poly,
    scaled_rate,
)


def rates(schedule, steps):
    return [schedule(t) for t in range(steps)]


def test_poly_2_reaches_zero_at_the_end():
    wanted = [16.0, 12.25, 9.0, 6.25, 4.0, 2.25, 1.0, 0.25, 0.0, 0.0]
    assert rates(poly(16.0, total_steps=8), 10) == pytest.approx(wanted, abs=1e-12)


def test_poly_takes_a_power_and_an_end():
    assert rates(poly(5.0, 4, power=1.0, end_lr=1.0), 6) == pytest.approx([5, 4, 3, 2, 1, 1])


def test_poly_after_a_warmup_counts_from_its_end():
    schedule = gradual_warmup(poly(8.0, 6, start_step=2), 2, target_lr=8.0)
    assert rates(schedule, 7) == pytest.approx([0.0, 4.0, 8.0, 4.5, 2.0, 0.5, 0.0])


def test_poly_over_the_total_drops_when_the_ramp_ends():
    schedule = gradual_warmup(poly(8.0, 4), 2, target_lr=8.0, start_lr=1.0)
    assert rates(schedule, 5) == pytest.approx([1.0, 4.5, 2.0, 0.5, 0.0])


def test_constant_warmup_jumps_onto_the_main_rule():
    schedule = constant_warmup(poly(8.0, 4), 2, start_lr=0.5)
    assert rates(schedule, 4) == pytest.approx([0.5, 0.5, 2.0, 0.5])


def test_cosine():
    wanted = [4.0, 3.4142135623730951, 2.0, 0.58578643762690485, 0.0, 0.0]
    assert rates(cosine(4.0, 4), 6) == pytest.approx(wanted, abs=1e-12)
    assert cosine(4.0, 4, end_lr=1.0)(2) == pytest.approx(2.5)
    assert cosine(4.0, 6, start_step=2)(4) == pytest.approx(2.0)


def test_multistep_divides_at_its_milestones():
    wanted = [3.2, 3.2, 0.32, 0.32, 0.032, 0.032]
    assert rates(multistep(3.2, [2, 4]), 6) == pytest.approx(wanted)


def test_constant():
    assert rates(constant(0.3), 3) == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(
    ("rule", "wanted"), [("none", 0.1), ("linear", 3.2), ("sqrt", 0.5656854249492381)]
)
def test_scaling_rules_from_a_reference_batch(rule, wanted):
    assert scaled_rate(0.1, rule, global_batch=8192, reference_batch=256) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("5 epochs", 50),
        ("1 epoch", 10),
        ("2.5 epochs", 25),
        ("600 steps", 600),
        ("1 step", 1),
        ("10240 samples", 10),
        ("1.024e4samples", 10),
        ("0.14 epochs", 1),
    ],
)
def test_durations_become_steps(text, steps):
    duration = Duration.parse(text)
    assert duration.steps(steps_per_epoch=10, global_batch=1024) == steps
    assert Duration.parse(str(duration)) == duration


def test_minutes_are_for_what_a_clock_can_say():
    assert Duration.parse("2.5 minutes", minutes=True) == Duration(2.5, "minutes")
    assert str(Duration(30, "minutes")) == "30 minutes"
    with pytest.raises(ValueError, match="is not a duration"):
        Duration.parse("30 minutes")
    with pytest.raises(ValueError, match="or '30 minutes'"):
        Duration.parse("30 hours", minutes=True)
    with pytest.raises(ValueError, match="cannot be converted to steps"):
        Duration(30, "minutes").steps(10, 1024)


@pytest.mark.parametrize(
    "text", ["5", "epochs", "-1 epochs", "1.5 steps", "1..2 epochs", "1e400 epochs", 5, None]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is not a duration; write it as '5 epochs'"):
        Duration.parse(text)
