"""``hvd-lars doctor`` on this machine, and on a broken one."""

import os
import re
import subprocess

from hvd_lars.launchers.local import launcher_environment, this_python


def doctor(**environment):
    result = subprocess.run(
        this_python("-m", "hvd_lars", "doctor", "--megabytes", "4"),
        env=launcher_environment() | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "Traceback" not in result.stderr, result.stderr
    rows = dict(re.findall(r"^(\S+(?: \S+)*?(?:, \w+)?)  +(.+)$", result.stdout, re.MULTILINE))
    return result.returncode, rows, result.stdout


def test_it_runs_ranks_under_every_launcher():
    code, rows, output = doctor()
    assert code == 0, output
    for case in (
        "mpirun, horovod",
        "mpirun, mpi",
        "horovodrun, horovod",
        "horovodrun --gloo, horovod",
    ):
        assert re.fullmatch(r"4 MiB in \d+ ms, [\d.]+ GiB/s", rows[case]), output
    assert "MPI, Gloo" in rows["horovod"]
    assert "verdict: ready to train with mpirun, horovod" in output


def test_it_says_what_is_wrong_and_how_to_mend_it(tmp_path):
    """Packages that do not import stand before the real ones: as a wrong build would fail."""
    for name in ("horovod", "mpi4py"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('undefined symbol: x')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, rows, output = doctor(PYTHONPATH=path)
    assert code == 1
    assert rows["horovod"] == "does not import: ImportError: undefined symbol: x"
    assert "Horovod was built for another torch or MPI: python launch/build_horovod.py" in output
    assert "ERROR: no MPI or Horovod" in output
    assert "verdict: training over several ranks does not work" in output
