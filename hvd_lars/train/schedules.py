"""Learning rates as pure functions of the global step.

A schedule is warmup followed by a main rule.  Steps count from 0; step ``t`` uses ``rate(t)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

Schedule = Callable[[int], float]
"""A function from the global step, an int from 0, to the learning rate γ of that step."""

Scaling = Literal["none", "linear", "sqrt"]


def scaled_rate(base_lr: float, scaling: Scaling, global_batch: int, reference_batch: int) -> float:
    """Return the target rate for a batch k times the reference: γ·k, γ·√k or γ.

    Reference: Goyal et al. 2017, arXiv 1706.02677, §2.1; √k: Krizhevsky 2014, arXiv 1404.5997.
    """
    k = global_batch / reference_batch
    return {"none": base_lr, "linear": base_lr * k, "sqrt": base_lr * math.sqrt(k)}[scaling]


def constant(base_lr: float) -> Schedule:
    """Keep the same rate at every step."""
    return lambda step: base_lr


def poly(
    base_lr: float, total_steps: int, power: float = 2.0, end_lr: float = 0.0, start_step: int = 0
) -> Schedule:
    """Decay as end + (base − end)·(1 − t/T)^power; end_lr from step T on.

    t and T count from ``start_step``: 0 is Caffe's rule, where a warmup eats into the decay
    (``poly_span: total``); the number of warmup steps gives MLPerf's (``post_warmup``).

    Reference: You, Gitman, Ginsburg 2017, arXiv 1708.03888, §5: power 2.
    """
    span = total_steps - start_step

    def rate(step: int) -> float:
        if step >= total_steps:
            return end_lr
        left = 1.0 - max(step - start_step, 0) / span
        return end_lr + (base_lr - end_lr) * math.pow(left, power)

    return rate


def cosine(base_lr: float, total_steps: int, end_lr: float = 0.0, start_step: int = 0) -> Schedule:
    """Decay by half a cosine from base_lr at ``start_step`` to end_lr at ``total_steps``.

    Reference: Loshchilov, Hutter 2017, arXiv 1608.03983, equation 5 without restarts.
    """
    span = total_steps - start_step

    def rate(step: int) -> float:
        if step >= total_steps:
            return end_lr
        done = max(step - start_step, 0) / span
        return end_lr + (base_lr - end_lr) * 0.5 * (1.0 + math.cos(math.pi * done))

    return rate


def multistep(base_lr: float, milestones: Sequence[int], factor: float = 0.1) -> Schedule:
    """Multiply base_lr by ``factor`` at every milestone (a step).

    Reference: Goyal et al. 2017, §5.1: ÷10 at epochs 30, 60 and 80 of 90.
    """
    return lambda step: base_lr * factor ** sum(step >= milestone for milestone in milestones)


def gradual_warmup(
    main: Schedule, warmup_steps: int, target_lr: float, start_lr: float = 0.0
) -> Schedule:
    """Rise linearly from start_lr at step 0 to target_lr at ``warmup_steps``, then follow main.

    Reference: Goyal et al. 2017, §2.2, gradual warmup, per iteration.
    """

    def rate(step: int) -> float:
        if step >= warmup_steps:
            return main(step)
        return start_lr + (target_lr - start_lr) * step / warmup_steps

    return rate


def constant_warmup(main: Schedule, warmup_steps: int, start_lr: float) -> Schedule:
    """Keep a low constant rate, then jump to the main rule.

    Reference: Goyal et al. 2017, §2.2, constant warmup.  They found that for large k the jump
    makes the training error spike; it helps fine-tuning.
    """
    return lambda step: start_lr if step < warmup_steps else main(step)
