"""The head of every table: what was measured, where, with which versions, by which command."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import torch

from hvd_lars.state.run_folder import environment_facts


def print_head(title: str, packages: list[str]) -> None:
    """Title, machine, commit, versions and command, as Markdown."""
    facts = environment_facts()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    commit, _, edited = facts["commit"].partition("-")
    commit = f"{commit[:12]}{edited and ', edited'}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    print(f"# {title}\n")
    print(f"{facts['processor']}, {os.cpu_count()} cores, {gpu}; commit {commit}; "
          f"{versions}; `{command}`\n", flush=True)  # fmt: skip
