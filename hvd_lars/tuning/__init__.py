"""Search for the best values of a config's keys: its section of the YAML, and the study on disk."""

from hvd_lars.tuning.settings import TuneSettings

__all__ = ["TuneSettings"]
