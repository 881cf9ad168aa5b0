"""benchmarks/gpu.py runs where there is no GPU, says so, and survives a part that fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmarks/gpu.py"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, BENCHMARK, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would write its results")
def test_it_measures_what_a_cpu_can():
    done = run("--parts", "step", "memory")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "There is no GPU here" in done.stdout
    assert "| native / floor |" in done.stdout
    assert "## Memory against the estimate of `check`\n\nnot run: it needs a GPU" in done.stdout
    assert done.stdout.rstrip().endswith("failed: none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would write its results")
def test_a_part_that_fails_leaves_the_others(tmp_path):
    (tmp_path / "simplejpeg.py").write_text("raise ImportError('broken here')")
    done = run("--parts", "decode", "tests", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "broken here" in done.stdout
    assert "FAILED with code 1" in done.stdout
    assert done.stdout.rstrip().endswith("failed: decode")
