"""``hvd-lars export``: write a run's weights for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from hvd_lars.cli.command import add_run_folder, load_config
from hvd_lars.errors import UserError
from hvd_lars.state.run_folder import ANYWHERE, config_of

NAME, HELP = "export", "write a run's weights for other programs"
EPILOG = "Example: hvd-lars export runs/a -o weights.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folder, its checkpoint, and the file to write."""
    add_run_folder(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE",
        help="weights.safetensors, weights.pth, or model.onnx (with the extra [onnx])",
    )  # fmt: skip
    parser.add_argument(
        "--average", action="store_true", help="write the average that model.ema_decay keeps"
    )
    parser.add_argument("--onnx", action="store_true", help="require an .onnx FILE")


def run(options: argparse.Namespace) -> int:
    """Write the file and print a summary."""
    config = load_config(config_of(options.run_folder), ANYWHERE)
    if options.onnx and options.output.suffix != ".onnx":
        raise UserError(f"--onnx: -o {options.output}: must end in .onnx")
    from hvd_lars.assemble.export import export

    chosen = options.checkpoint, options.average
    print(export(options.run_folder, config, options.output, *chosen))
    return 0
