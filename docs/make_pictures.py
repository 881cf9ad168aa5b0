#!/usr/bin/env python3
"""Pictures of what one sees of a run: the page of ``hvd-lars report``, and the bar in a terminal.

    python docs/make_pictures.py        # needs chromium, and Horovod's or Open MPI's mpirun

Trains the digits by LARS and by SGD at 1,024 on two ranks, and writes docs/pictures/report.png,
report-phone.png and terminal.svg.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hvd_lars.launchers.local import run_here, run_in_terminal, this_python

PICTURES = Path(__file__).parent / "pictures"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def train(config: str, run: Path) -> None:
    """One run on two ranks."""
    program = this_python(
        "-m", "hvd_lars", "train", config, f"run.dir={run}", "train.log_every=5 steps"
    )
    result = run_here("mpirun", 2, program, 600, {"OMP_NUM_THREADS": "1"})
    if result.returncode != 0:
        sys.exit(result.stdout)


def photograph(page: Path, picture: Path, width: int, height: int, dark: bool = False) -> None:
    """The page as a browser shows it."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *scheme,
         f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip


def capture_terminal(folder: Path, picture: Path) -> None:
    """A short run alone in a terminal of 110 columns, as it looks at its end."""
    command = ["hvd-lars", "train", "digits"]
    _, shown = run_in_terminal(this_python("-m", "hvd_lars", *command[1:]), 110, folder)
    # The last state of every line: a carriage return begins it anew.
    lines = [line.rpartition("\r\x1b[2K")[2] for line in shown.replace("\r\n", "\n").split("\n")]
    console = Console(record=True, width=110, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(f"$ {' '.join(command)}")
    console.print(Text.from_ansi("\n".join(line for line in lines if line.strip())))
    console.save_svg(str(picture), title="hvd-lars train")


def main() -> None:
    """Train, draw, and say where the pictures are."""
    if BROWSER is None:
        sys.exit("make_pictures.py: no chromium on PATH")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {"digits": folder / "lars-b1024", "digits-sgd-b1024": folder / "sgd-b1024"}
        for config, run in runs.items():
            train(config, run)
        page = folder / "report.html"
        program = this_python("-m", "hvd_lars", "report", *map(str, runs.values()), "-o", str(page))
        subprocess.run(program, check=True)
        photograph(page, PICTURES / "report.png", 1000, 1500)
        photograph(page, PICTURES / "report-phone.png", 390, 900, dark=True)
        capture_terminal(folder, PICTURES / "terminal.svg")


if __name__ == "__main__":
    main()
