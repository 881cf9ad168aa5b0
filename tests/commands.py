"""The command as a user starts it, and what a run wrote."""

import json
import subprocess

from hvd_lars.launchers import launcher_environment, this_python

HANG_GUARD = 600


def hvd_lars(*arguments, cwd=None):
    """Run the command alone; returns (exit code, output)."""
    result = subprocess.run(
        this_python("-m", "hvd_lars", *map(str, arguments)),
        env=launcher_environment(),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_GUARD,
        check=False,
    )
    return result.returncode, result.stdout


def records_of(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
