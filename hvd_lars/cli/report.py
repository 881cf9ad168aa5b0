"""``hvd-lars report``: write a page about runs."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME, HELP = "report", "write an HTML page about runs, or about a study of tune"
EPILOG = "Example: hvd-lars report runs/a runs/b -o report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add run folders and the page."""
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="a run folder, or one study"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="page to write; default report.html",
    )
    parser.add_argument(
        "--site",
        type=Path,
        metavar="SITE",
        help="file that bench --save wrote: compare each run's step time with the forecast",
    )


def run(options: argparse.Namespace) -> int:
    """Write the page."""
    from hvd_lars.planning.site import read_site
    from hvd_lars.report import write_report
    from hvd_lars.tuning.study import is_study

    site = None if options.site is None else read_site(options.site, "--site")
    write_report(options.runs, options.output, site)
    runs = f"{len(options.runs)} run{'s' if len(options.runs) > 1 else ''}"
    print(f"{options.output}: {'1 study' if is_study(options.runs[0]) else runs}")
    return 0
