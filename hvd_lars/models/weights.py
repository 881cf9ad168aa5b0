"""Starting from somebody's weights."""

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

# Wrappers that leave a part of their own anywhere in a name.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# torchvision's names of before: DenseNet's until 0.2, ViT's blocks until 0.13.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of Inception and GoogLeNet
_SHOWN = 4


@dataclass(frozen=True)
class Taken:
    """What became of a file's tensors and of the model's, and by which rules.

    Attributes:
        count: tensors that were copied.
        rules: what was done to find them, in words.
        left: names of the model's tensors that stay as they start, by the reason.
        unused: names of the file's tensors that nothing takes, by the reason.
    """

    count: int
    rules: tuple[str, ...]
    left: dict[str, tuple[str, ...]]
    unused: dict[str, tuple[str, ...]]

    def lines(self) -> list[str]:
        """For people."""
        total = self.count + sum(map(len, self.left.values()))
        by = f": {'; '.join(self.rules)}" if self.rules else ""
        lines = [f"{self.count:,} of the network's {total:,} tensors taken{by}"]
        lines += [f"left as they start ({why}): {_some(n)}" for why, n in self.left.items()]
        lines += [f"not taken from the file ({why}): {_some(n)}" for why, n in self.unused.items()]
        return lines


def load_weights(model: nn.Module, path: str, num_classes: int) -> Taken:
    """Copy the weights in ``path`` into ``model``; no code in the file is run.

    Names may carry prefixes and be those of before; the file may be of a backbone alone, have a
    head of another width, or auxiliary heads.  All else must be there, and fit.

    Args:
        model: changed in place, or not at all.
        path: a run folder or one of its checkpoints, a ``.safetensors`` file, or what torch.save
            wrote: a state dict, one in a dictionary, or a whole module.
        num_classes: of ``model``; a classifying layer of another width is left as it is.

    Raises:
        UserError: nothing can be read there, or a tensor is missing, unknown or of another shape.
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
        raise UserError(f"model.init_from: {path}: {name} is not in {where}: it is another model")
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
        "beside the network": outside,
    }
    return Taken(len(taken), tuple(rules), _non_empty(left), _non_empty(unused))


def _renamed(
    stored: Mapping[str, Tensor], live: Collection[str], rules: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by today's names without prefix, and names of those that stand beside them."""
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in stored.items()}
    if plain.keys() != stored.keys():
        rules.append("names of wrappers removed (such as _orig_mod.)")
    new = dict[str, Tensor]()
    for name, tensor in plain.items():
        for old, today in _OLD_NAMES:
            name = old.sub(today, name)
        new[name] = tensor
    if new.keys() != plain.keys():
        rules.append("names of before renamed")
    prefix = _prefix(new, live)
    if prefix:
        rules.append(f"prefix {prefix} removed")
    inside = {n.removeprefix(prefix): t for n, t in new.items() if n.startswith(prefix)}
    return inside, [name for name in new if not name.startswith(prefix)]


def _prefix(stored: Iterable[str], live: Collection[str]) -> str:
    """What stands before the most names of the model; of several, the shortest."""
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
    """Whether all that the file lacks is the model's head, and it has the rest."""
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
    """Every tensor can be copied: its shape fits, and it is a plain tensor of real numbers."""
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
