"""Real parts around the project that not every machine has: tests marked ``part`` run them.

The last lines of a run say which ran.  ``bash launch/test.sh --apt`` installs Debian's.
"""

import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """All of the programs and modules that it needs, and where they come from."""

    source: str
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    root: bool = False

    def missing(self):
        """Why it cannot run here, or None."""
        if self.root and os.geteuid() != 0:
            return "needs root"
        absent = [name for name in self.programs if shutil.which(name) is None]
        absent += [name for name in self.modules if importlib.util.find_spec(name) is None]
        return f"no {absent[0]}: {self.source}" if absent else None


class Gpu(Part):
    def missing(self):
        return None if torch.cuda.is_available() else self.source


APT = "launch/test.sh --apt"
PARTS = {
    "two hosts by sshd": Part(APT, ("ip", "unshare", "sshd", "ssh", "ssh-keygen"), root=True),
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
