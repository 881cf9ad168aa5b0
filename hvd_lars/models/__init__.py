"""Networks by name, and the changes that recipes make to them."""

from hvd_lars.models.activation_checkpointing import checkpoint_activations
from hvd_lars.models.build import build_model, check_model_name, model_names
from hvd_lars.models.options import (
    batch_norms,
    initialise_last_layer,
    set_batch_norm_momentum,
    zero_last_gammas,
)
from hvd_lars.models.weights import Taken, load_weights

__all__ = [
    "Taken",
    "batch_norms",
    "build_model",
    "check_model_name",
    "initialise_last_layer",
    "load_weights",
    "model_names",
    "checkpoint_activations",
    "set_batch_norm_momentum",
    "zero_last_gammas",
]
