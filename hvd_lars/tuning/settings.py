"""The config's ``tune`` section."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hvd_lars.settings.fields import DurationField, Positive, Section, key

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Value = str | int | float | bool | None


class Range(Section):
    """The values to try for a key; one of the first four keys is needed."""

    log: Annotated[tuple[Number, Number], Field(strict=False)] | None = key(
        binds="nothing", default=None, description="bounds, searched on a logarithmic scale"
    )
    uniform: Annotated[tuple[Number, Number], Field(strict=False)] | None = key(
        binds="nothing", default=None, description="bounds, searched on a linear scale"
    )
    integers: Annotated[tuple[Whole, Whole], Field(strict=False)] | None = key(
        binds="nothing", default=None, description="bounds of whole numbers, both included"
    )
    choices: Annotated[tuple[Value, ...], Field(strict=False)] | None = key(
        binds="nothing", default=None, description="list of values without an order"
    )
    points: Annotated[int, Field(ge=2)] = key(
        binds="nothing", default=5, description="values that a grid takes from log or uniform"
    )

    @model_validator(mode="after")
    def _is_one_range(self) -> Range:
        given = [
            name
            for name in ("log", "uniform", "integers", "choices")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"found {found}; give one of log, uniform, integers and choices")
        if self.choices is not None:
            if len(set(map(repr, self.choices))) != len(self.choices) or not self.choices:
                raise ValueError(f"choices: found {list(self.choices)}; must be different values")
            return self
        low, high = self.bounds
        if not low < high or (self.log is not None and low <= 0):
            above = "two numbers above 0" if self.log is not None else "two numbers"
            raise ValueError(f"{given[0]}: found [{low}, {high}]; must be {above}, lower one first")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of a range of numbers."""
        bounds = self.log or self.uniform or self.integers
        assert bounds is not None
        return bounds

    def extremes(self) -> tuple[Value, ...]:
        """Return the values to check before a search: the bounds, or all choices."""
        return self.bounds if self.choices is None else self.choices

    def grid(self) -> tuple[Value, ...]:
        """Return the values of a grid, in order."""
        if self.choices is not None:
            return self.choices
        if self.integers is not None:
            return tuple(range(self.integers[0], self.integers[1] + 1))
        low, high = self.bounds
        shares = [i / (self.points - 1) for i in range(self.points)]
        inner = [
            low * (high / low) ** share if self.log is not None else low + share * (high - low)
            for share in shares[1:-1]
        ]
        return (low, *inner, high)


class TuneSettings(Section):
    """The search of ``hvd-lars tune``; other commands ignore it."""

    space: dict[str, Range] = key(
        binds="nothing",
        description="values to try by key, as {schedule.base_lr: {log: [1, 64]}}",
    )
    sampler: Literal["tpe", "random", "grid"] = key(
        binds="nothing",
        default="tpe",
        description="tpe: ten trials spread evenly over the space, then a tree-structured Parzen "
        "estimator (Bergstra et al. 2011)",
    )
    trials: Positive = key(
        binds="nothing", default=20, description="trials of tpe and random; a grid tries all"
    )
    duration: DurationField | None = key(
        binds="nothing",
        default=None,
        description="length of a trial, in train.duration's unit, by default half of it; the "
        "schedule is scaled to it",
    )
    metric: Literal["top1", "top5", "loss"] = key(
        binds="nothing", default="top1", description="of a trial's last evaluation"
    )
    seeds: Positive = key(
        binds="nothing",
        default=1,
        description="runs of a trial, with seeds from run.seed on; their mean counts",
    )
    pruning: Literal["median", "halving", "none"] = key(
        binds="nothing",
        default="median",
        description="median: at evaluation first, end a trial that is below the median of those "
        "before it; halving: end all but the best 1/reduction at evaluations first, "
        "first·reduction, … (asynchronous successive halving, Li et al. 2020)",
    )
    first: Positive | None = key(
        binds="nothing",
        default=None,
        description="evaluation at which trials are first pruned; by default that after half of "
        "a trial for median, after a quarter for halving",
    )
    reduction: Annotated[int, Field(ge=2)] = key(
        binds="nothing", default=3, description="of the trials, halving lets one in this many go on"
    )
    sampler_seed: Annotated[int, Field(ge=0, lt=2**31)] = key(
        binds="nothing", default=0, description="seeds the proposals"
    )

    @model_validator(mode="after")
    def _space_has_keys(self) -> TuneSettings:
        if not self.space:
            raise ValueError("space is empty; it must have a key, such as schedule.base_lr")
        for name in self.space:
            if not all(map(str.isidentifier, name.split("."))) or "." not in name:
                raise ValueError(f"space has {name!r}; must be a section's key: schedule.base_lr")
        return self

    @model_validator(mode="after")
    def _duration_is_positive(self) -> TuneSettings:
        if self.duration is not None and self.duration.value <= 0:
            raise ValueError(f"duration is {self.duration}; it must be above 0")
        return self

    @property
    def maximize(self) -> bool:
        """Whether a greater metric is better."""
        return self.metric != "loss"

    def grid(self) -> list[dict[str, Any]]:
        """Return the parameters of all trials of a grid, the last key varying fastest."""
        values = [each.grid() for each in self.space.values()]
        return [dict(zip(self.space, point, strict=True)) for point in itertools.product(*values)]
