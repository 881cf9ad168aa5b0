"""Field types of the config's sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from hvd_lars.settings.durations import Duration


def _schema(units: str, *examples: str) -> WithJsonSchema:
    pattern = rf"^\s*[0-9.]+([eE][+-]?[0-9]+)?\s*({units})s?\s*$"
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [*examples]})


DurationField = Annotated[
    Duration,
    BeforeValidator(lambda v: v if isinstance(v, Duration) else Duration.parse(v)),
    PlainSerializer(str),
    _schema("epoch|step|sample", "5 epochs", "600 steps", "1.28e6 samples"),
]
# A DurationField that also allows minutes.
PeriodField = Annotated[
    Duration,
    BeforeValidator(lambda v: v if isinstance(v, Duration) else Duration.parse(v, minutes=True)),
    PlainSerializer(str),
    _schema("epoch|step|sample|minute", "5 epochs", "600 steps", "30 minutes"),
]
Binds = Literal["run and recipe", "run", "recipe", "nothing"]
"""A key binds a run if resuming needs the same value, a recipe if another value departs from it."""


def key(default: Any = ..., *, binds: Binds, description: str) -> Any:
    """Return a section's field with its description and what it binds."""
    return Field(default, description=description, json_schema_extra={"binds": binds})


Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section of the config, frozen; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
