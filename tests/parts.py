"""Real parts around the project that not every machine has: tests marked ``part`` run them.

The last lines of a run say which ran.  ``bash launch/test.sh --apt`` installs Debian's.
"""

import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """What it needs, and where that comes from; ``probe`` is a command that must succeed."""

    source: str
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    root: bool = False
    probe: tuple[str, ...] = ()

    def missing(self):
        """Why it cannot run here, or None."""
        if self.root and os.geteuid() != 0:
            return "needs root"
        absent = [name for name in self.programs if shutil.which(name) is None]
        absent += [name for name in self.modules if importlib.util.find_spec(name) is None]
        if absent:
            return f"no {absent[0]}: {self.source}"
        if self.probe and subprocess.run(self.probe, capture_output=True, check=False).returncode:
            return f"not allowed here: {' '.join(self.probe)}"
        return None


class Gpu(Part):
    def missing(self):
        return None if torch.cuda.is_available() else self.source


APT = "launch/test.sh --apt"
PARTS = {
    "two hosts by sshd": Part(
        APT,
        ("ip", "unshare", "sshd", "ssh", "ssh-keygen"),
        root=True,
        probe=("unshare", "--net", "--uts", "--mount", "true"),
    ),
    "SLURM": Part(APT, ("slurmctld", "slurmd", "sbatch", "munged"), root=True),
    "Chromium": Part(APT, ("chromium",)),
    "uv": Part("pip install uv", ("uv",)),
    "MLflow": Part("pip install mlflow", modules=("mlflow",)),
    "Weights & Biases": Part("pip install wandb", modules=("wandb",)),
    "GPU": Gpu("needs one"),
}


def lines(counts):
    """What ran and what did not, from ``{part: [passed or failed, skipped]}``."""
    for name, part in PARTS.items():
        ran, skipped = counts.get(name, (0, 0))
        if ran or skipped:
            why = part.missing() or "see its reason"
            left = f"{skipped} skipped ({why})" if skipped else ""
            yield f"{name}: " + ", ".join(filter(None, [f"{ran} ran" if ran else "", left]))
