"""Standard error of a job's ranks: said once where all say it, else with the rank."""

import io
import subprocess
import sys
import warnings
from contextlib import suppress

import pytest
from commands import HANG_GUARD

from hvd_lars.launchers.local import run_here
from hvd_lars.runtime.rank_stderr import RankStderr


@pytest.fixture
def show(monkeypatch):
    """Warn through a rank's standard error."""

    def warn(errors, message):
        monkeypatch.setattr(sys, "stderr", errors)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", errors.warn)
            warnings.warn(message, RuntimeWarning, stacklevel=1)

    return warn


def test_rank_0_speaks_as_ever(show):
    stream = io.StringIO()
    errors = RankStderr(stream, 0)
    print("one\ntwo", file=errors)
    show(errors, "odd")
    assert stream.getvalue().startswith("one\ntwo\n")
    assert "RuntimeWarning: odd" in stream.getvalue()
    errors.settle([])
    assert stream.getvalue().count("odd\n") == 1


def test_every_line_of_another_rank_carries_it_once():
    stream = io.StringIO()
    errors = RankStderr(stream, 3)
    errors.write("half")
    errors.write(" line\nnext\nrank 3: Traceback\n")
    errors.writelines(["\n", "last"])
    assert stream.getvalue() == (
        "rank 3: half line\nrank 3: next\nrank 3: Traceback\nrank 3: \nrank 3: last"
    )


def test_warnings_wait_and_are_told_apart(show):
    streams = [io.StringIO(), io.StringIO()]
    ranks = [RankStderr(stream, rank) for rank, stream in enumerate(streams)]
    for errors in ranks:
        show(errors, "both")
    assert ranks[0].sample() == ranks[1].sample() != 0
    ranks[1].settle(ranks[0].sampled())
    assert streams[1].getvalue() == ""
    assert ranks[1].sample() == 0
    for message in ("alone", "both"):
        show(ranks[1], message)
    assert ranks[0].sample() != ranks[1].sample()
    show(ranks[1], "later")
    ranks[1].settle(ranks[0].sampled())
    assert "rank 1: " in streams[1].getvalue()
    assert "alone" in streams[1].getvalue()
    assert "both" not in streams[1].getvalue()
    assert "later" not in streams[1].getvalue()  # it is for the next time
    assert ranks[1].sample() != 0


def test_a_rank_that_becomes_another_forgets_nothing(show):
    stream = io.StringIO()
    errors = RankStderr(stream, 1)
    show(errors, "odd")
    errors.sample()
    errors.become(0)
    assert "rank 1: " in stream.getvalue()
    assert errors.sample() == 0
    errors.write("plain\n")
    assert stream.getvalue().endswith("\nplain\n")


def test_a_progress_bar_keeps_its_rank():
    stream = io.StringIO()
    RankStderr(stream, 1).write("\r 10%\r 20%")
    assert stream.getvalue() == "\rrank 1:  10%\rrank 1:  20%"


def test_a_full_disk_is_no_reason_to_stop(show):
    for rank in (0, 1):
        with open("/dev/full", "w", buffering=1) as stream:
            errors = RankStderr(stream, rank)
            show(errors, "odd")
            errors.sample()
            errors.settle([])
            assert errors.sample() == 0  # it was taken for shown
            with suppress(OSError):
                stream.close()


def test_what_waits_comes_before_anything_else_that_is_said(show):
    stream = io.StringIO()
    errors = RankStderr(stream, 1)
    show(errors, "first")
    errors.write("then\n")
    assert stream.getvalue().index("first") < stream.getvalue().index("rank 1: then")


def test_what_waits_is_not_lost_at_the_end():
    program = (
        "import warnings; from hvd_lars.runtime.rank_stderr import label_stderr;"
        "label_stderr(2); warnings.warn('late')"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "rank 2: <string>:1: UserWarning: late" in found.stderr


PROGRAM = """
import sys, warnings
from hvd_lars.train import trainer
import hvd_lars.cli
sys.modules["hvd_lars.cli.main"]._GRACE_SECONDS = 60.0
step = trainer.Trainer.train_step
def warns(self, batches):
    rank, number = self.comm.rank, self.state.progress.step
    if number in (3, 8):
        warnings.warn(f"met by all at {number}")
    if number == 8 and rank == 0:
        warnings.warn("met by rank 0")
    if number == 8 and rank == 1:
        warnings.warn("met by rank 1")
    if number == 11 and rank == 1:
        print("said by rank 1", file=sys.stderr)
    if number == 13 and sys.argv[2] == "fail":
        raise ArithmeticError("broken everywhere")
    return step(self, batches)
trainer.Trainer.train_step = warns
hvd_lars.cli.main(["train", "digits", "run.dir=" + sys.argv[1], "train.log_every=5 steps",
                   "train.duration=15 steps", "schedule.warmup_duration=2 steps"])
"""


@pytest.mark.parametrize("end", ["train", "fail"])
def test_two_ranks(tmp_path, end):
    program = tmp_path / "warns.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(tmp_path / "run"), end]
    found = run_here("mpirun", 2, command, HANG_GUARD)
    lines = found.stdout.splitlines()

    def carries_rank_1(message):
        return [line.startswith("rank 1: ") for line in lines if message in line]

    for message in ("met by all at 3", "met by all at 8", "UserWarning: met by rank 0"):
        assert carries_rank_1(message) == [False], found.stdout
    for message in ("UserWarning: met by rank 1", "said by rank 1"):
        assert carries_rank_1(message) == [True], found.stdout
    failed = end == "fail"
    assert carries_rank_1("ArithmeticError: broken") == [False] * failed, found.stdout
    assert (found.returncode != 0) == failed
