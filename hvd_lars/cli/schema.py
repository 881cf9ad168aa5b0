"""``hvd-lars schema``: write the JSON schema of configs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hvd_lars.runtime.files import write_output

NAME, HELP = "schema", "write the JSON schema of configs, for editors"
EPILOG = "Example: hvd-lars schema -o schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file to write."""
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: standard output"
    )


def run(options: argparse.Namespace) -> int:
    """Print or write the schema."""
    from hvd_lars.config.schema import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if options.output is None:
        print(text, end="")
        return 0
    write_output(options.output, text)
    return 0
