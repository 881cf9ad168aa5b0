"""Completion by TAB, asked as bash does."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(sys.executable).parent


def complete(line, folder):
    """The completions of a command line that ends where the cursor is."""
    words = shlex.join(line.split(" "))
    script = f"""
        eval "$(register-python-argcomplete hvd-lars)"
        COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_TYPE=9
        COMP_WORDS=({words}) COMP_CWORD={line.count(" ")}
        _python_argcomplete hvd-lars "${{COMP_WORDS[-1]}}" train
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        [shutil.which("bash"), "-c", script], cwd=folder, env=os.environ | {"PATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {text.strip() for text in found.stdout.splitlines()}


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("hvd-lars tra", {"train"}, {"tune"}),
        ("hvd-lars train res", {"resnet50-lars-b32768"}, {"digits"}),
        ("hvd-lars train m", {"mine.yaml"}, {"notes.txt"}),
        ("hvd-lars train digits schedule.warmup_", {"schedule.warmup_duration="}, set()),
        ("hvd-lars train digits data.decode", {"data.decode="}, {"train.duration="}),
        ("hvd-lars check digits optimizer.n", {"optimizer.name=", "optimizer.nesterov="}, set()),
        ("hvd-lars launch --on s", {"slurm"}, {"mpirun"}),
    ],
)  # fmt: skip
def test_what_tab_completes(tmp_path, line, some, none):
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes.txt").touch()
    found = complete(line, tmp_path)
    assert some <= found
    assert not none & found


def test_values_follow_an_equals_sign(tmp_path):
    # bash splits words at an equals sign, and argcomplete answers what follows it
    found = complete("hvd-lars train digits schedule.policy=co", tmp_path)
    assert {each.rpartition("=")[2] for each in found} == {"cosine", "constant"}
