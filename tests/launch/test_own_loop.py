"""The programs of docs/own-loop.md, as they stand there, on one and two ranks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HANG_GUARD, warm_python

from hvd_lars.launchers.local import run_here

PAGE = (Path(__file__).parents[2] / "docs/own-loop.md").read_text()
PROGRAMS = dict(re.findall(r'```python title="(\w+\.py)"\n(.*?)```', PAGE, re.DOTALL))


@pytest.fixture
def programs(tmp_path):
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def loss_in(output):
    return float(re.findall(r"loss ([0-9.]+)", output)[-1])


def over_two_ranks(launcher, *program):
    result = run_here(launcher, 2, warm_python(*program), HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    return loss_in(result.stdout)


MORE_STEPS = """
import sys, torch, hvd_lars
comm = hvd_lars.connect(sys.argv[1], parts=True)
model = torch.nn.Linear(3, 2)
placement = getattr(hvd_lars, sys.argv[2])(model.parameters(), comm)
optimizer = hvd_lars.LARS(model.parameters(), placement=placement)
with hvd_lars.watching(comm, placement, stall_timeout=5):
    for step in range(3 + comm.rank):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
comm.close()
"""


@pytest.mark.parametrize(("placed", "backend"), [("Replicated", "horovod"), ("Sharded", "mpi")])
def test_a_rank_that_takes_more_steps_is_named(placed, backend):
    program = warm_python("-c", MORE_STEPS, backend, placed)
    result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
    assert result.returncode not in (0, 124), result.stdout
    assert "no rank made progress for 5 s (stall_timeout)" in result.stdout
    assert re.search(r"rank 0 .*: 3 steps done, then in the end of its loop", result.stdout)
    assert re.search(r"rank 1 .*: 3 steps done, then in communication", result.stdout)


@pytest.mark.parametrize("twice", ["comm.close()", "import horovod.torch as hvd; hvd.shutdown()"])
def test_a_loop_may_end_horovod_itself(twice):
    program = f"import hvd_lars; comm = hvd_lars.connect('horovod'); {twice}; comm.close()"
    done = subprocess.run(warm_python("-c", program), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_there_are_three():
    assert list(PROGRAMS) == ["plain.py", "horovod_optimizer.py", "placement.py"]


def test_one_process(programs):
    done = subprocess.run(
        [sys.executable, programs / "plain.py"], capture_output=True, text=True, check=True
    )
    assert loss_in(done.stdout) < 0.3
    assert done.stderr == ""


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun --gloo"])
def test_inside_horovods_optimizer(programs, launcher):
    first = over_two_ranks(launcher, programs / "horovod_optimizer.py", programs / "state.pt")
    second = over_two_ranks(launcher, programs / "horovod_optimizer.py", programs / "state.pt")
    assert second < first < 0.5


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_placement_goes_on_where_it_was(programs, kind):
    """30 steps and 30 more by two ranks, or by one and then two: the same loss as by one alone."""
    losses = []
    for name, ranks in (("two", (2, 2)), ("mixed", (1, 2)), ("one", (1, 1))):
        for count in ranks:
            arguments = [programs / "placement.py", programs / f"{name}.pt", kind]
            if count == 2:
                found = over_two_ranks("mpirun", *arguments)
            else:
                done = subprocess.run(
                    [sys.executable, *arguments], capture_output=True, text=True, check=True
                )
                found = loss_in(done.stdout)
        losses.append(found)
    assert losses[2] < 0.3
    assert losses == pytest.approx([losses[2]] * 3, abs=2e-3)
