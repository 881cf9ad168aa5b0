"""Networks by name; imports errors only."""

from hvd_lars.models.build import build_model, check_model_name, model_names

__all__ = ["build_model", "check_model_name", "model_names"]
