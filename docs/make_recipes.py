#!/usr/bin/env python3
"""Write docs/recipes.md from configs/*.yaml: ``python docs/make_recipes.py``."""

from __future__ import annotations

from pathlib import Path

from hvd_lars.config.file import bundled_configs, load_config
from hvd_lars.config.schema import Config

HEAD = """# Recipes

Made by `python docs/make_recipes.py` from `configs/*.yaml`; not to be edited by hand. Each file
opens with its launch command. `hvd-lars check NAME --ranks N --device-memory 80GB` prints the plan.

**Published accuracies are those of their sources; none of the ImageNet or CIFAR-10 rows was run by
us.** Rows marked † hold values that were not read at the source; the list below says which, and
where a config leaves the published setting.

"""


def row(name: str, config: Config) -> str:
    """One line of the table."""
    optimizer, rates, train = config.optimizer, config.schedule, config.train
    rate = rates.base_lr
    if rates.scaling != "none":
        rate *= (train.global_batch / rates.reference_batch) ** (
            1.0 if rates.scaling == "linear" else 0.5
        )
    warmup = "–" if rates.warmup == "none" else str(rates.warmup_duration)
    if rates.warmup_start_lr:
        warmup += f" from {rates.warmup_start_lr:g}"
    kind = optimizer.name.upper() + (" Nesterov" if optimizer.nesterov else "")
    recipe = config.recipe
    top1 = "–" if recipe is None or recipe.top1 is None else f"{recipe.top1:g}"
    mark = " †" if recipe is not None and recipe.recalled else ""
    cells = [
        f"[`{name}`](../configs/{name}.yaml){mark}",
        f"{train.global_batch:,}",
        kind,
        f"{rate:.4g}",
        warmup,
        f"{rates.policy} {rates.poly_power:g}" if rates.policy == "poly" else rates.policy,
        str(train.duration),
        f"{optimizer.momentum:g}",
        f"{optimizer.weight_decay:g}",
        top1,
    ]
    return f"| {' | '.join(cells)} |\n"


def note(config: Config) -> str:
    """Source, how the accuracy was obtained, what is recalled and what departs."""
    recipe = config.recipe
    if recipe is None:
        return ""
    text = f"{recipe.source}. {recipe.obtained[0].upper()}{recipe.obtained[1:]}."
    text += f" † {recipe.recalled}." if recipe.recalled else ""
    return text + (f" Departs: {'; '.join(recipe.departures)}." if recipe.departures else "")


def page() -> str:
    """The whole page."""
    configs = {name: load_config(name) for name in bundled_configs()}
    nets: dict[str, list[str]] = {}
    for name, config in configs.items():
        net = config.recipe.net if config.recipe else config.model.name
        nets.setdefault(net, []).append(name)
    text = HEAD
    for net, names in nets.items():
        text += f"## {net}\n\n"
        text += "| config | B | optimizer | γ | warmup | decay | length | μ | β | top-1, % |\n"
        text += "|---|---|---|---|---|---|---|---|---|---|\n"
        names.sort(key=lambda name: (configs[name].train.global_batch, name))
        text += "".join(row(name, configs[name]) for name in names) + "\n"
        notes: dict[str, list[str]] = {}
        for name in names:
            notes.setdefault(note(configs[name]), []).append(f"`{name}`")
        text += "".join(f"- {', '.join(who)}: {what}\n" for what, who in notes.items() if what)
        text += "\n"
    return text.rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("recipes.md").write_text(page(), encoding="utf-8")
