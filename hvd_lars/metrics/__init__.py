"""What a run writes down; imports nothing of hvd_lars."""

from hvd_lars.metrics.sinks import Console, JsonLines, Sink, finite

__all__ = ["Console", "JsonLines", "Sink", "finite"]
