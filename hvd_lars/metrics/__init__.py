"""The records of a run."""

from hvd_lars.metrics.bar import Bar
from hvd_lars.metrics.loggers import check_loggers, make_logger
from hvd_lars.metrics.sinks import Console, JsonLines, Sink, finite

__all__ = ["Bar", "Console", "JsonLines", "Sink", "check_loggers", "finite", "make_logger"]
