"""Momentum SGD as the config's optimizer."""

from __future__ import annotations

from typing import ClassVar, Literal

from hvd_lars.optimizers.lars import LarsSettings
from hvd_lars.settings.fields import key


class SgdSettings(LarsSettings):
    """Momentum SGD: the steps of LARS with a trust ratio of 1.

    Keys of the ratio (``adapt``, ``trust_coefficient``, ``eps``, ``denominator``, ``trust_clip``,
    ``zero_norm``) change nothing.
    """

    TRUST_RATIOS: ClassVar[bool] = False

    name: Literal["sgd"] = key(binds="run and recipe", description="which optimizer")  # type: ignore[assignment]


KINDS = (SgdSettings,)
