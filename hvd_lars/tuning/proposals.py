"""Proposals for a study's first trials: spread evenly over the space."""

from __future__ import annotations

import math
import random
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial


def spread(trial: int, place: int, keys: int, seed: int) -> float:
    """Return coordinate ``place`` of point ``trial`` of an additive sequence in [0, 1)^keys.

    Each coordinate grows by a power of the generalised golden ratio, modulo 1 (Roberts 2018, R
    sequence; for one key Kronecker's sequence of the golden ratio): however many points there are,
    they leave no large gap, which random ones do.
    """
    ratio = 2.0
    for _ in range(60):  # the root of x^(keys + 1) = x + 1 above 1
        ratio = (1.0 + ratio) ** (1.0 / (keys + 1))
    start = random.Random(seed * 1_000_003 + place).random()
    return (start + (trial + 1) * ratio ** -(place + 1)) % 1.0


class Spread(BaseSampler):
    """Gives one key of one trial its coordinate of :func:`spread`.

    Args:
        coordinate: in [0, 1).
    """

    def __init__(self, coordinate: float) -> None:
        self._coordinate = coordinate

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return nothing: each key is proposed by itself."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return nothing: each key is proposed by itself."""
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the value at the coordinate's share of the range."""
        share, allowed = self._coordinate, param_distribution
        if isinstance(allowed, CategoricalDistribution):
            return allowed.choices[int(share * len(allowed.choices))]
        if isinstance(allowed, IntDistribution):
            return allowed.low + int(share * (allowed.high - allowed.low + 1))
        assert isinstance(allowed, FloatDistribution)
        if allowed.log:
            return math.exp(math.log(allowed.low) + share * math.log(allowed.high / allowed.low))
        return allowed.low + share * (allowed.high - allowed.low)
