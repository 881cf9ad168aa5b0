"""Build a run from a Config and a Communicator; the only package that knows both."""

from hvd_lars.assemble.evaluation import evaluate_run
from hvd_lars.assemble.plan import Plan, make_plan, plan_facts
from hvd_lars.assemble.resuming import Resume
from hvd_lars.assemble.run import build_run

__all__ = [
    "Plan", "Resume", "build_run", "evaluate_run", "make_plan", "plan_facts",
]  # fmt: skip
