"""What a run would be, without running it: plan, optimizer groups, memory, warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from hvd_lars.assemble.network import build_network, check_batch_norm, shapes_of
from hvd_lars.assemble.plan import Plan, make_plan
from hvd_lars.assemble.sources import build_source, place_of
from hvd_lars.assemble.training import optimizer_groups
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.config.data import Images
from hvd_lars.config.optimizer import Optimizer
from hvd_lars.config.schema import Config, Data, Model
from hvd_lars.models import batch_norms
from hvd_lars.models.footprint import Footprint, footprint

# Keys that change nothing in what is computed; all others belong to a recipe.
_FREE = ("recipe", "run", "comm", "checkpoint")
_FREE_KEYS = {
    "data.name",
    "data.root",
    "data.train_shards",
    "data.val_shards",
    "data.cache_dir",
    "data.workers",
    "data.expect",
    "data.download",
    "train.micro_batch",
    "train.eval_batch",
    "train.eval_every",
    "train.log_every",
    "train.threads",
    "train.channels_last",
    "train.compile",
    "model.ema_decay",
    "model.checkpoint_blocks",
    "optimizer.kernel",
    "optimizer.placement",
}


@dataclass(frozen=True)
class Group:
    """One optimizer group: what it holds and how it moves."""

    tensors: int
    parameters: int
    adapt: str
    weight_decay: float


@dataclass(frozen=True)
class Report:
    """A plan with what surrounds it; memory in bytes a rank, by what takes it."""

    plan: Plan
    num_classes: int
    groups: tuple[Group, ...]
    memory: dict[str, float]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def memory_total(self) -> float:
        """Bytes a rank."""
        return sum(self.memory.values())


def examine(
    config: Config, ranks: int, device_memory: float | None = None, recipe: Config | None = None
) -> Report:
    """Plan a run over ``ranks`` ranks.

    A data set that is not on this machine is taken to be what ``data.expect`` says.

    Args:
        config: what would run.
        ranks: over how many ranks.
        device_memory: bytes of a rank's device, to warn against.
        recipe: the bundled config without overrides, to tell where ``config`` leaves it.

    Raises:
        UserError: it could not run.
    """
    notes, warnings = [], []
    data = config.data
    expect = data.expect if isinstance(data, Images) else None
    place = place_of(data)
    if expect is not None and place is not None and not place.exists():
        num_train, num_classes = expect.train, expect.classes
        notes.append(f"{place} is not here: planned for the {num_train:,} images expected")
    else:
        # Looked at only: nothing is copied to a node or downloaded.
        still = {"cache_dir": None, "download": False}
        seen = data.model_copy(update={k: v for k, v in still.items() if hasattr(data, k)})
        source = build_source(config.model_copy(update={"data": seen}), LocalCommunicator())
        num_train, num_classes = source.num_train, source.num_classes
    plan = make_plan(config, num_train, ranks)
    groups, size, normalised = _measure(config.model, config.optimizer, data, num_classes)
    if plan.smallest_micro_batch == 1 and normalised:
        model = build_network(config.model, data, num_classes, torch.device("cpu"))
        check_batch_norm(model, config, plan)
    momentum = size.parameters if config.optimizer.momentum > 0 else 0
    if config.optimizer.placement == "sharded":
        momentum = -(-momentum // ranks)
    memory = {
        "weights": size.parameters + size.buffers,
        "gradients": size.parameters,
        "momentum": momentum,
        "average": size.parameters + size.buffers if config.model.ema_decay is not None else 0,
        "activations": size.activations(plan.largest_micro_batch),
    }
    fixed = sum(memory.values()) - memory["activations"]
    if device_memory is not None and sum(memory.values()) > device_memory:
        room = device_memory - fixed - size.activations_fixed
        fitting = int(room / size.activations_per_sample)
        advice = f"train.micro_batch={fitting} would fit" if fitting > 0 else "nothing would fit"
        warnings.append(
            f"{sum(memory.values()) / 1e9:.1f} GB a rank are estimated, the device has "
            f"{device_memory / 1e9:.1f} GB: {advice}"
        )
    if plan.global_batch < ranks:
        warnings.append(f"{ranks - plan.global_batch} of {ranks} ranks have no samples in a step")
    if config.recipe is not None:
        warnings += [f"not as published: {d}" for d in config.recipe.departures]
        if recipe is not None:
            warnings += _changes(config, recipe)
            span = plan.largest_micro_batch * config.model.bn_sync_ranks
            theirs = recipe.train.micro_batch * recipe.model.bn_sync_ranks
            if normalised and span != theirs:
                warnings.append(f"BatchNorm spans {span} samples in place of the recipe's {theirs}")
    return Report(plan, num_classes, groups, memory, tuple(warnings), tuple(notes))


@lru_cache(maxsize=64)  # the recipes share a few networks
def _measure(
    model_settings: Model, optimizer_settings: Optimizer, data: Data, num_classes: int
) -> tuple[tuple[Group, ...], Footprint, bool]:
    """Optimizer groups and memory of a network, and whether it has BatchNorm."""
    model = build_network(model_settings, data, num_classes, torch.device("cpu"))
    groups = tuple(
        Group(
            len(group["params"]),
            sum(param.numel() for param in group["params"]),
            group["adapt"],
            group["weight_decay"],
        )
        for group in optimizer_groups(model, optimizer_settings)
    )
    largest = max(shapes_of(data), key=math.prod)
    return groups, footprint(model, largest), bool(batch_norms(model))


def _changes(config: Config, recipe: Config) -> list[str]:
    """Keys that change what is computed and are not as the bundled file has them."""
    ours, theirs = _flat(config.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    return [
        f"{key} is {ours.get(key)} in place of the recipe's {theirs.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
        and key.partition(".")[0] not in _FREE
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)
    ]


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
