"""``hvd-lars report``: write a page about runs."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME, HELP = "report", "write an HTML page about runs, or about a study of tune"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add run folders and the page."""
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="a run folder, or one study"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="report.html"
    )


def run(options: argparse.Namespace) -> int:
    """Write the page."""
    from hvd_lars.report import write_report

    write_report(options.runs, options.output)
    print(f"{options.output}: {len(options.runs)} run{'s' if len(options.runs) > 1 else ''}")
    return 0
