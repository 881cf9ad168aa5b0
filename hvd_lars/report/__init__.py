"""A page that reports on runs."""

from hvd_lars.report.page import write_report

__all__ = ["write_report"]
