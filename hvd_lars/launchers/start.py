"""Starting training: the user's request, and the launcher's command for it."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hvd_lars.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def script(name: str) -> Path:
    """Return the path of a file of launch/: inside a wheel, or beside the package in a checkout."""
    inside = _PACKAGE / "launch"
    return (inside if inside.is_dir() else _PACKAGE.parent / "launch") / name


@dataclass(frozen=True)
class Request:
    """``hvd-lars train *training`` over ranks.

    Attributes:
        kind: the launcher, as ``--on`` names it.
        training: CONFIG, overrides and options of train.
        ranks: number of ranks; None for the slots of the hosts or allocation.
        hosts: ``a:4,b:4``; None for those of the allocation, or this machine.
        nic: network interface for all traffic.
        environment: environment variables, possibly a scheduler's.
        run_dir: the config's run.dir with its overrides; None if it names none.
    """

    kind: str
    training: Sequence[str]
    ranks: int | None
    hosts: str | None
    nic: str | None
    environment: Mapping[str, str]
    run_dir: str | None = None

    def variables(self) -> dict[str, str]:
        """Return the variables that pass hosts, ranks and interface to a script of launch/."""
        ranks = self.ranks and str(self.ranks)
        given = (("HOSTS", self.hosts), ("NP", ranks), ("NIC", self.nic))
        return {name: value for name, value in given if value}

    def check_hosts(self) -> None:
        """Raise UserError if the hosts are not a list of names with slots."""
        wanted = r"[\w.\-]+(:[1-9][0-9]*)?"
        if self.hosts is not None and not re.fullmatch(rf"{wanted}(,{wanted})*", self.hosts):
            raise UserError(f"--hosts: found {self.hosts!r}; write a:4,b:4: hosts with their slots")

    def refuse_hosts(self, why: str) -> None:
        """Raise UserError if hosts or an interface are given."""
        for option, value in (("--hosts", self.hosts), ("--nic", self.nic)):
            if value:
                raise UserError(f"{option}: not allowed with --on {self.kind}, {why}")

    def with_run_folder(self, root: str) -> Request:
        """Return the request with a run.dir, so that a restarted job finds its run."""
        if self.run_dir is not None:  # supervise looks for it among the words
            given = any(word.startswith("run.dir=") for word in self.training)
            own = [] if given else [f"run.dir={self.run_dir}"]
            return replace(self, training=[*self.training, *own])
        name = f"{Path(self.training[0]).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        return replace(self, training=[*self.training, f"run.dir={root}/{name}"])

    def without_resume(self) -> list[str]:
        """Return the training arguments for a script that always resumes."""
        return [word for word in self.training if word != "--resume"]

    def refuse_blanks(self) -> None:
        """Raise UserError if an argument cannot be passed in a scheduler's variables."""
        for word in self.training:
            if " " in word or "," in word:
                raise UserError(
                    f"{word!r}: --on {self.kind} cannot pass an argument with a blank or a comma; "
                    f"put it into the config (durations may be written 5epochs)"
                )


@dataclass(frozen=True)
class Start:
    """A command with its environment variables and standard input.

    ``stdin`` is a file, or the text itself.
    """

    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    stdin: Path | str | None = None

    def line(self) -> str:
        """Return the command as typed in a shell."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        words += [shlex.quote(word) for word in self.command]
        if isinstance(self.stdin, Path):
            words += ["<", shlex.quote(str(self.stdin))]
        elif self.stdin is not None:
            words += ["<<'EOF'\n" + self.stdin + "EOF"]
        return " ".join(words)
