"""From a Config and a Communicator to a run: the one place that knows both."""

from hvd_lars.assemble.plan import Plan, make_plan, plan_facts
from hvd_lars.assemble.resuming import Resume
from hvd_lars.assemble.sources import build_source
from hvd_lars.assemble.training import build_run, evaluate_run

__all__ = [
    "Plan", "Resume", "build_run", "build_source", "evaluate_run", "make_plan", "plan_facts",
]  # fmt: skip
