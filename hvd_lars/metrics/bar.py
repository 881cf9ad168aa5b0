"""A progress bar in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, final

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@final
class Bar:
    """Shows epoch, loss, top-1, learning rate, images/s, exposed communication and time left.

    Args:
        total_steps: steps of the run.
        terminal: draws the bar; standard output if None.
    """

    def __init__(self, total_steps: int, terminal: Terminal | None = None) -> None:
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]:.2f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f} %  {task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=terminal,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, epoch=0.0, text="")
        self._step, self._epoch = 0, 0.0
        self._loss = self._top1 = self._pace = ""
        self._progress.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Show the record; a closed terminal does not stop training."""
        if record["kind"] == "train":
            share = record["communication_seconds"] / max(record["step_seconds"], 1e-9)
            self._step, self._epoch = record["step"], record["epoch"]
            self._loss = f"loss {record['loss']:.4f}  "
            self._pace = (
                f"lr {record['lr']:.4g}  {record['images_per_second']:,.0f} images/s  "
                f"waits {100 * share:.0f} %"
            )
            if (batch := record.get("critical_batch")) is not None:
                self._pace += f"  critical batch {batch:,.0f}"
        elif record["kind"] == "eval":
            self._top1 = f"top-1 {record['top1']:.4f}  "
        else:
            return
        text = self._loss + self._top1 + self._pace
        with suppress(OSError):
            self._progress.update(
                self._task, completed=self._step, epoch=self._epoch, text=text, refresh=True
            )

    def close(self) -> None:
        """Leave the last state on the screen."""
        with suppress(OSError):
            self._progress.stop()
