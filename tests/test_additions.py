"""An addition is one file and one registry line: each kind is added to a copy of the package."""

import json
import shutil
import subprocess
from pathlib import Path

from hvd_lars.launchers.local import launcher_environment, this_python

PACKAGE = Path(__file__).parents[1] / "hvd_lars"

FILES = {
    "sources/spots.py": '''
from typing import Literal

from hvd_lars.settings.fields import key
from hvd_lars.sources.settings import SourceSettings


class SpotsData(SourceSettings):
    """Images with one bright pixel, whose place is the class."""

    name: Literal["spots"] = key(binds="run", description="which data set")
    side: int = key(binds="run and recipe", default=4, description="side, in pixels")

    def build(self, context):
        import torch

        from hvd_lars.data.warps import WarpedImages

        labels = torch.arange(64) % self.side**2
        images = torch.nn.functional.one_hot(labels, self.side**2).float()
        made = images.view(-1, 1, self.side, self.side), labels
        return WarpedImages(made, made, self.side**2, 1, context.seed, "spots")

    @property
    def shapes(self):
        return [(1, self.side, self.side)]


KINDS = (SpotsData,)
''',
    "launchers/kinds/flux.py": """
from hvd_lars.launchers.start import Start


def start(request):
    return Start(["flux", "run", "hvd-lars", "train", *request.training])
""",
    "optimizers/plain.py": '''
from typing import Literal

from hvd_lars.optimizers.settings import OptimizerSettings
from hvd_lars.settings.fields import key


class PlainSettings(OptimizerSettings):
    """SGD without momentum."""

    name: Literal["plain"] = key(binds="run", description="which optimizer")

    def build(self, model, lr, placement):
        return Plain(self.groups(model), placement)

    def groups(self, model):
        return [{"params": list(model.parameters()), "adapt": "none", "weight_decay": 0.0}]

    @property
    def num_slots(self):
        return 0


class Plain:
    slots = ()

    def __init__(self, groups, placement):
        from hvd_lars.optim.device_step import StepReport

        self.param_groups, self._placement, self.report = groups, placement, StepReport()

    def zero_grad(self):
        self._placement.gradients.zero()

    def step(self, closure=None, loss_scale=None):
        import torch

        self._placement.complete_parameters()
        self._placement.gradients.finish()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    weight, gradient = self._placement.block(param)
                    weight.sub_(gradient, alpha=group["lr"])
        self._placement.publish_parameters()

    def slot(self, name, param):
        return None

    def new_slot(self, name, param):
        raise AssertionError("it has no slots")

    def set_slots(self, param, values):
        pass


KINDS = (PlainSettings,)
''',
}
# file, text in it, the line that is added before it
LINES = [
    ("sources/__init__.py", '    "glyphs",\n', '    "spots",\n'),
    ("optimizers/__init__.py", '"lars", "sgd"', '"plain", '),
    ("launchers/kinds/__init__.py", '    "local": ', '    "flux": "flux",\n'),
    (
        "metrics/evaluation.py",
        '    "top5": ',
        '    "top3": EvalMetric("top-3", correct_in_top(3)),\n',
    ),
    ("launchers/environment.py", '    Environment("jsrun"', '    Environment("flux", *FLUX),\n'),
    (
        "launchers/environment.py",
        "ENVIRONMENTS = (",
        'FLUX = "FLUX_RANK", "FLUX_SIZE", "FLUX_LOCAL"\n',
    ),
]


def test_a_data_set_an_optimizer_a_metric_and_a_launcher(tmp_path):
    package = tmp_path / "hvd_lars"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parent / "configs", tmp_path / "configs")
    for name, text in FILES.items():
        (package / name).write_text(text)
    for name, line, added in LINES:
        text = (package / name).read_text()
        assert text.count(line) == 1, name
        (package / name).write_text(text.replace(line, added + line))

    def run(*arguments):
        environment = launcher_environment() | {"PYTHONPATH": str(tmp_path)}
        environment |= {"FLUX_RANK": "0", "FLUX_SIZE": "1"}
        command = this_python("-m", "hvd_lars", *arguments)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ["data={name: spots, side: 8}", "optimizer.name=plain", "train.global_batch=16"]
    options += ["train.duration=2 epochs", "schedule.warmup_duration=1 steps", "run.dir=run"]
    assert "top-3 " in run("train", "digits", *options, "schedule.base_lr=0.1")
    rows = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert all(row["top1"] <= row["top3"] <= row["top5"] for row in evaluations)
    facts = json.loads((tmp_path / "run/environment.json").read_text())
    assert facts["launcher"] == "flux"
    assert "top3" in run("eval", "run")
    assert "flux run hvd-lars train" in run("launch", "--on", "flux", "digits", "--print-only")
