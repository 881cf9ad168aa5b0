"""What was measured on a site: the cost of a step, of the input and of an all-reduce."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hvd_lars.errors import UserError
from hvd_lars.planning.cost import Compute

FORMAT = 1
Point = tuple[float, float]


@dataclass(frozen=True)
class Site:
    """Measurements of one config under one launcher, as ``bench --save`` makes them.

    Attributes:
        config: the config's name.
        ranks: how many measured.
        ranks_per_node: on each machine.
        parameters: of the network.
        compute: (images, seconds) of a step of one micro-batch on a rank, without waiting for other
            ranks or data; two sizes.
        all_reduce: (bytes, seconds) over all ranks, rising; empty for one rank.
        input_rate: images a second that a rank's workers prepare; None if there were no data.
        input_cores: cores of a rank.
        environment: machine and versions.
        format: version of this file.
    """

    config: str
    ranks: int
    ranks_per_node: int
    parameters: int
    compute: tuple[Point, Point]
    all_reduce: tuple[Point, ...]
    input_rate: float | None
    input_cores: float
    environment: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def costs(self) -> Compute:
        """Fixed cost and cost of an image; measured noise below 0 counts as 0."""
        found = Compute.of_two(*self.compute)
        if found.fixed < 0.0:
            images, seconds = max(self.compute)
            return Compute(0.0, seconds / images)
        return found

    def text(self) -> str:
        """Return the file's contents, JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def all_reduce_seconds(self, size: float, ranks: int) -> tuple[float, float]:
        """Return latency and transfer of ``size`` bytes over ``ranks``, in seconds.

        Latency grows as the depth of a tree, and bytes as 2(p − 1)/p, from the measured ranks.
        """
        if ranks == 1 or not self.all_reduce:
            return 0.0, 0.0
        latency = self.all_reduce[0][1]
        transfer = max(0.0, _interpolated(self.all_reduce, size) - latency)
        depth = (ranks - 1).bit_length() / max(1, (self.ranks - 1).bit_length())
        share = (ranks - 1) / ranks / ((self.ranks - 1) / self.ranks)
        return latency * max(1.0, depth), transfer * share


def read_site(path: Path, option: str = "--from") -> Site:
    """Read what ``bench --save`` has written; ``option`` is named in errors.

    Raises:
        UserError: it cannot be read or is something else.
    """
    try:
        site = TypeAdapter(Site).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{option}: {path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{option}: {path}: {where}: {first['msg']}; it must be a file of bench --save"
        ) from None
    if site.format != FORMAT:
        raise UserError(f"{option}: {path}: format {site.format}; this version reads {FORMAT}")
    if problem := _problem(site):
        raise UserError(f"{option}: {path}: {problem}; it must be a file of bench --save")
    return site


def _problem(site: Site) -> str | None:
    """Return what no measurement can be."""
    numbers = [*itertools.chain(*site.compute, *site.all_reduce), site.input_cores]
    numbers += [] if site.input_rate is None else [site.input_rate]
    sizes = [size for size, _ in site.all_reduce]
    if not all(math.isfinite(number) and number > 0.0 for number in numbers):
        return "a size, time, rate or number of cores is not above 0"
    if min(site.ranks, site.ranks_per_node, site.parameters) < 1:
        return "ranks, ranks_per_node and parameters: at least 1 is needed"
    if site.compute[0][0] == site.compute[1][0]:
        return "compute: two sizes are needed"
    if sizes != sorted(set(sizes)) or (site.ranks == 1 and sizes):
        return "all_reduce: sizes must rise, and one rank has none"
    return None


def _interpolated(curve: tuple[Point, ...], size: float) -> float:
    """Return the time of ``size`` bytes, linear between points and beyond the last two."""
    if len(curve) == 1 or size <= curve[0][0]:
        return curve[0][1]
    last = len(curve) - 1
    after = next((i for i, (upper, _) in enumerate(curve) if size <= upper), last)
    (low, fast), (high, slow) = curve[after - 1 : after + 1]
    return fast + (slow - fast) * (size - low) / (high - low)
