"""Examine a run without starting it: plan, optimizer groups, memory, warnings."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_lars.assemble.plan import Plan, make_plan
from hvd_lars.assemble.sizes import Group, NetworkSize, network_size
from hvd_lars.config.binding import changes
from hvd_lars.config.schema import Config
from hvd_lars.sources import BuildContext

# Bytes of a GPU beside the tensors counted here: workspaces of convolutions and what PyTorch's
# allocator holds, and what CUDA graphs add beside their gradients.  The larger of ResNet-50's and
# AlexNet's on one H200, in float32 (benchmarks/results/gpu-h200.md).
_LIBRARIES, _GRAPHS = 1.4e9, 1.0e9


@dataclass(frozen=True)
class Report:
    """A plan with optimizer groups, memory (bytes per rank, by use), warnings and notes."""

    plan: Plan
    num_classes: int
    groups: tuple[Group, ...]
    memory: dict[str, float]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def memory_total(self) -> float:
        """Estimated bytes per rank."""
        return sum(self.memory.values())


def examine(
    config: Config, ranks: int, device_memory: float | None = None, recipe: Config | None = None
) -> Report:
    """Plan a run over ``ranks`` ranks.

    If the data set is not on this machine, its size is taken from ``data.expect``.

    Args:
        config: config of the run.
        ranks: world size.
        device_memory: bytes of a rank's GPU; a larger estimate, with libraries, is a warning.
        recipe: the bundled config without overrides, to report departures from it.

    Raises:
        UserError: the config cannot be run.
    """
    num_train, num_classes, prepared, notes = size_of(config)
    plan = make_plan(config, num_train, ranks)
    size = network_size(config.model, config.optimizer, config.data, num_classes)
    if plan.smallest_micro_batch == 1 and size.has_batch_norm:
        _check_batch_norm(config, plan, num_classes)
    memory = _memory(config, size, plan)
    if device_memory is not None:
        memory["libraries"] = _LIBRARIES
        if config.train.cuda_graphs is not False and not config.why_no_graphs(ranks):
            memory["graphs"] = _GRAPHS + size.parameters  # which hold gradients, too
    warnings = []
    if device_memory is not None and sum(memory.values()) > device_memory:
        room = device_memory - sum(memory.values()) + memory["activations"] - size.activations_fixed
        fitting = int(room / size.activations_per_sample)
        advice = f"train.micro_batch={fitting} would fit" if fitting > 0 else "nothing would fit"
        warnings.append(
            f"{sum(memory.values()) / 1e9:.1f} GB a rank are estimated, the device has "
            f"{device_memory / 1e9:.1f} GB: {advice}"
        )
    if plan.global_batch < ranks:
        warnings.append(f"{ranks - plan.global_batch} of {ranks} ranks have no samples in a step")
    if prepared:
        warnings.append(f"images were packed with {prepared}, which published results do not have")
    warnings += _departures(config, recipe, plan, size.has_batch_norm)
    return Report(plan, num_classes, size.groups, memory, tuple(warnings), tuple(notes))


def size_of(config: Config) -> tuple[int, int, str, list[str]]:
    """Return training images, classes, how they were changed, notes; copy and download nothing."""
    expect, location = config.data.expected, config.data.location
    if expect is not None and location is not None and not location.exists():
        note = f"{location} is not here: planned for the {expect.train:,} images expected"
        return expect.train, expect.classes, "", [note]
    from hvd_lars.comm.local import LocalCommunicator

    context = BuildContext(LocalCommunicator(), config.run.seed)
    source = config.data.read_only().build(context)
    return source.num_train, source.num_classes, source.identity.prepared, []


def _check_batch_norm(config: Config, plan: Plan, num_classes: int) -> None:
    """Raise UserError if a BatchNorm would see one value per channel."""
    import torch

    from hvd_lars.assemble.network import build_network, check_batch_norm

    model = build_network(config.model, config.data, num_classes, torch.device("cpu"))
    check_batch_norm(model, config, plan)


def _memory(config: Config, size: NetworkSize, plan: Plan) -> dict[str, float]:
    """Return bytes per rank, by use."""
    slots = size.parameters * config.optimizer.num_slots
    if config.optimizer.placement == "sharded":
        slots = -(-slots // plan.ranks)
    return {
        "weights": size.parameters + size.buffers,
        "gradients": size.parameters,
        "momentum": slots,
        "average": size.parameters + size.buffers if config.model.ema_decay is not None else 0,
        "activations": size.activations(plan.largest_micro_batch),
    }


def _departures(config: Config, recipe: Config | None, plan: Plan, normalised: bool) -> list[str]:
    """Describe where a config departs from its recipe, and the recipe from the publication."""
    if config.recipe is None:
        return []
    lines = [f"not as published: {departure}" for departure in config.recipe.departures]
    if recipe is None:
        return lines
    lines += changes(
        recipe,
        config,
        "recipe",
        lambda key, theirs, ours: f"{key} is {ours} in place of the recipe's {theirs}",
    )
    span = plan.largest_micro_batch * config.model.bn_sync_ranks
    theirs = recipe.train.micro_batch * recipe.model.bn_sync_ranks
    if normalised and span != theirs:
        lines.append(f"BatchNorm spans {span} samples in place of the recipe's {theirs}")
    return lines
