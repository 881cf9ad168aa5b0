"""Initialise a network from a weight file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvd_lars.errors import UserError
from hvd_lars.models.options import classifier_name
from hvd_lars.models.weight_files import read_weights

# Parts that wrappers add anywhere in a name.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# torchvision's old names: DenseNet's until 0.2, ViT's blocks until 0.13.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of Inception and GoogLeNet
_SHOWN = 4


@dataclass(frozen=True)
class Taken:
    """The tensors that were copied from a file to a model, and the others of both.

    Attributes:
        count: number of tensors copied.
        rules: how they were found, in words.
        left: names of the model's tensors that keep their initial values, by reason.
        unused: names of the file's tensors that were not copied, by reason.
    """

    count: int
    rules: tuple[str, ...]
    left: dict[str, tuple[str, ...]]
    unused: dict[str, tuple[str, ...]]

    def lines(self) -> list[str]:
        """Return lines for the user."""
        total = self.count + sum(map(len, self.left.values()))
        by = f": {'; '.join(self.rules)}" if self.rules else ""
        lines = [f"{self.count:,} of the network's {total:,} tensors loaded{by}"]
        lines += [f"left as initialised ({why}): {_some(n)}" for why, n in self.left.items()]
        lines += [f"not loaded from the file ({why}): {_some(n)}" for why, n in self.unused.items()]
        return lines


def load_weights(model: nn.Module, path: str, num_classes: int) -> Taken:
    """Copy the weights in ``path`` into ``model``; no code in the file is run.

    Names may have prefixes or be old ones; the file may hold a backbone alone, a head of another
    width, or auxiliary heads.  All other tensors must be present and fit.

    Args:
        model: changed in place, or not at all.
        path: a run folder or one of its checkpoints, a ``.safetensors`` file, or a file of
            torch.save: a state dict, one in a dictionary, or a whole module.
        num_classes: of ``model``; a classifying layer of another width keeps its initial values.

    Raises:
        UserError: the file cannot be read, or a tensor is missing, unknown or of another shape.
    """
    stored = read_weights(path)
    live = model.state_dict()
    rules = [f"from {where}" for where in stored.found]
    named, outside = _renamed(stored.tensors, live, rules)
    head = classifier_name(model, num_classes)
    absent = [n for n in live if n not in named and not n.endswith("num_batches_tracked")]
    headless = _headless(absent, head, live, named)
    unknown = [name for name in named if name not in live]
    auxiliary = [name for name in unknown if name.startswith(_AUXILIARY)]
    tops = {name.partition(".")[0] for name in live}
    other_head = [
        name
        for name in unknown
        if headless and name not in auxiliary and name.partition(".")[0] not in tops
    ]
    wrong = [] if headless else absent
    wrong_file = [name for name in unknown if name not in auxiliary and name not in other_head]
    if wrong or wrong_file:
        name, where = (wrong[0], "the file") if wrong else (wrong_file[0], "the model")
        problem = f"tensor {name} is not in {where}; the file is of another model"
        raise UserError(f"model.init_from: {path}: {problem}")
    another_width = [
        name
        for name in named
        if name in live
        and head is not None
        and name.startswith(f"{head}.")
        and named[name].shape != live[name].shape
    ]
    taken = [name for name in live if name in named and name not in another_width]
    _check(path, live, named, taken)
    with torch.no_grad():
        for name in taken:
            live[name].copy_(named[name])
    uncounted = [n for n in live if n not in named and n.endswith("num_batches_tracked")]
    left = {
        "the file has a head of another width": another_width,
        "not in the file": absent,
        "older files do not count batches": uncounted,
    }
    unused = {
        "auxiliary heads": auxiliary,
        "a head that the network does not have": other_head,
        "outside the network": outside,
    }
    return Taken(len(taken), tuple(rules), _non_empty(left), _non_empty(unused))


def _renamed(
    stored: Mapping[str, Tensor], live: Collection[str], rules: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by current names without prefix, and the names outside that prefix."""
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in stored.items()}
    if plain.keys() != stored.keys():
        rules.append("names of wrappers removed (such as _orig_mod.)")
    new = dict[str, Tensor]()
    for name, tensor in plain.items():
        for old, today in _OLD_NAMES:
            name = old.sub(today, name)
        new[name] = tensor
    if new.keys() != plain.keys():
        rules.append("old names updated")
    prefix = _prefix(new, live)
    if prefix:
        rules.append(f"prefix {prefix} removed")
    inside = {n.removeprefix(prefix): t for n, t in new.items() if n.startswith(prefix)}
    return inside, [name for name in new if not name.startswith(prefix)]


def _prefix(stored: Iterable[str], live: Collection[str]) -> str:
    """Return the prefix of most of the model's names, the shortest of several."""
    found: Counter[str] = Counter()
    for name in stored:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in live:
                found["".join(f"{part}." for part in parts[:i])] += 1
    return min(found, key=lambda prefix: (-found[prefix], len(prefix)), default="")


def _headless(
    absent: Collection[str], head: str | None, live: Collection[str], named: Collection[str]
) -> bool:
    """Return whether the file lacks only the model's head."""
    if not absent or head is None:
        return False
    top = f"{head.partition('.')[0]}."
    for prefix in (f"{head}.", top):
        rest = [name for name in live if not name.startswith(prefix)]
        if rest and all(n.startswith(prefix) for n in absent) and any(n in named for n in rest):
            return True
    return False


def _check(
    path: str, live: Mapping[str, Tensor], named: Mapping[str, Tensor], taken: Iterable[str]
) -> None:
    """Check that tensors can be copied: their shapes fit, and they are plain and real."""
    for name in taken:
        found, wanted = named[name], live[name]
        if found.shape != wanted.shape:
            raise UserError(
                f"model.init_from: {path}: {name} is {tuple(found.shape)}, the model has "
                f"{tuple(wanted.shape)}"
            )
        plain = found.layout == torch.strided and not (found.is_quantized or found.is_complex())
        if not plain or found.is_meta:
            kind = "without values" if found.is_meta else f"{found.dtype}, {found.layout}"
            raise UserError(
                f"model.init_from: {path}: {name} is {kind}; a plain tensor of real numbers is "
                f"needed"
            )
        if found.isnan().any():
            raise UserError(f"model.init_from: {path}: {name} holds values that are not a number")


def _non_empty(groups: Mapping[str, Collection[str]]) -> dict[str, tuple[str, ...]]:
    return {why: tuple(names) for why, names in groups.items() if names}


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
