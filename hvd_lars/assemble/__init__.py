"""From a Config and a Communicator to a Trainer: the one place that knows both."""

from hvd_lars.assemble.plan import Plan, make_plan, plan_facts
from hvd_lars.assemble.sources import build_source
from hvd_lars.assemble.training import build_trainer, evaluate_run

__all__ = ["Plan", "build_source", "build_trainer", "evaluate_run", "make_plan", "plan_facts"]
