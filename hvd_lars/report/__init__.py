"""One page about runs; imports assemble and errors."""

from hvd_lars.report.page import write_report

__all__ = ["write_report"]
