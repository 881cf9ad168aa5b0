"""``hvd-lars bench`` and the faster ways to train, as a user starts them."""

import json

import pytest
from commands import HANG_GUARD, hvd_lars, records_of, warm_python

from hvd_lars.launchers.local import run_here
from hvd_lars.runtime.stopwatch import PARTS


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_bench_over_two_ranks_says_where_the_time_goes(placement):
    program = warm_python(
        "-m", "hvd_lars", "bench", "digits", f"optimizer.placement={placement}",
        "--windows", "3", "--steps", "2", "--accumulate", "2", "--json",
    )  # fmt: skip
    result = run_here("mpirun", 2, program, HANG_GUARD)
    assert result.returncode == 0, result.stdout
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert found["ranks"] == 2
    assert found["placement"] == placement
    assert found["global_batch"] == 4 * found["micro_batch"]
    assert len(found["windows"]) == 3
    assert min(found["windows"]) <= found["images_per_second"] <= max(found["windows"])
    assert found["half_interval"] > 0
    assert set(found["part_seconds"]) == set(PARTS)
    assert 0 < sum(found["part_seconds"].values()) <= found["step_seconds"] * 1.01
    rate = found["global_batch"] / found["step_seconds"]
    assert rate == pytest.approx(found["images_per_second"], rel=0.3)  # means of different things
    assert found["peak_bytes"] > 50e6
    assert found["floor_ratio"] > 0
    assert found["environment"]["processor"]


def test_bench_prints_columns_for_people():
    code, output = hvd_lars("bench", "digits", "--windows", "2", "--steps", "1")
    assert code == 0, output
    for title in ("images/s", "95 %", "forward", "communication", "peak memory", "the floor of"):
        assert title in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windows", "1"], "--windows: found 1; "),
        (["--steps", "0"], "--steps: found 0; "),
        (["--accumulate", "-3"], "--accumulate: found -3; "),
        (["optimizer.kernel=fast"], "optimizer.kernel: "),
        (["--json", "no-such-config"], "no-such-config"),
    ],
)
def test_bench_refuses_what_cannot_be_measured(arguments, message):
    config = [] if arguments[-1] == "no-such-config" else ["digits"]
    code, output = hvd_lars("bench", *config, *arguments)
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output


def test_a_compiled_network_in_half_precision_trains_alike(tmp_path):
    """torch.compile, bfloat16 and channels_last together, against neither."""
    ends = {}
    for name, options in (
        ("plain", []),
        ("fast", ["train.compile=true", "train.precision=bf16", "train.channels_last=true"]),
    ):
        code, output = hvd_lars(
            "train", "digits", f"run.dir={tmp_path / name}", "train.duration=12 steps",
            "schedule.warmup_duration=2 steps", "train.log_every=1 steps",
            "checkpoint.every=12 steps", *options,
        )  # fmt: skip
        assert code == 0, output
        ends[name] = [record["loss"] for record in records_of(tmp_path / name, "train")]
    assert len(ends["plain"]) == len(ends["fast"]) == 12
    assert ends["fast"] == pytest.approx(ends["plain"], rel=0.02)
    assert ends["fast"] != ends["plain"]


def test_a_site_is_measured_over_ranks_and_planned_for(tmp_path):
    site = tmp_path / "site.json"
    arguments = ["bench", "digits", "--save", str(site), "--windows", "2", "--steps", "3"]
    program = warm_python("-m", "hvd_lars", *arguments, "train.micro_batch=64")
    result = run_here("mpirun", 2, program, 600, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    found = json.loads(site.read_text())
    assert (found["ranks"], found["ranks_per_node"]) == (2, 2)
    assert [images for images, _ in found["compute"]] == [16.0, 64.0]
    assert min(seconds for _, seconds in found["compute"]) > 0
    times = [seconds for _, seconds in found["all_reduce"]]
    assert len(times) == 6
    assert times == sorted(times)
    assert found["input_rate"] > 100
    assert found["parameters"] == 39_530
    code, output = hvd_lars("plan", "digits", "--from", site, "--ranks", "2,8")
    assert code == 0, output
    assert "the site was measured on one node of 2" in output
    missing = tmp_path / "no/site.json"
    code, output = hvd_lars("bench", "digits", "--save", missing)
    assert code == 2
    assert output.splitlines() == [f"hvd-lars: --save: {missing}: cannot be written"]
