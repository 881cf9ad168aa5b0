#!/usr/bin/env python3
"""At which batch does a method lose accuracy, all tuned with the same number of trials?

    horovodrun -np 2 python benchmarks/large_batch.py digits [-o FILE]          # 20 minutes
    horovodrun -np 2 python benchmarks/large_batch.py fashion --full --root DIR [-o FILE]

For every batch and method ``tune`` searches on images held out of the training set; then runs on
seeds of their own, trained on the whole training set, give mean and standard deviation of the test
accuracy.  SGD's best rate at the smallest batch is also tried times k and times √k, untuned.  The
noise scale and trust ratios of a run are kept.  ``--vary B`` runs LARS at the batch B again with
one thing of it changed: warmup, decay, momentum, weight decay.

Everything lies in ``--folder``: a study that was stopped or killed goes on where it was, in any
number of pieces, with the same command, and with more trials it adds them.  FILE is written after
every method; a method that stands in it is not run again, even where the folder is gone.
``benchmarks/plot_large_batch.py`` draws it.

The short form searches the rate only, with 8 trials of one seed; ``--full`` searches the warmup and
the weight decay too, with 20 trials of three seeds: of one seed, a search may choose a rate at the
edge where training diverges.  A trial is half as long as a run, with its whole schedule, unless
``--trial-epochs`` says otherwise: of a shorter one, a search may choose a longer warmup.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lars.assemble.recorded import read_run
from hvd_lars.assemble.resuming import Resume
from hvd_lars.assemble.run import build_run
from hvd_lars.assemble.tune import tune
from hvd_lars.comm import Communicator, connect, detect_launch
from hvd_lars.comm.agree import on_root
from hvd_lars.config.file import load_config, with_keys
from hvd_lars.config.trials import tuned_config
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import replace_text
from hvd_lars.state.run_folder import environment_facts

Row = dict[str, Any]  # of the table
FIRST_HELD_OUT = 101  # tuning uses the seeds from 0 on
HELD_OUT_IMAGES = 0.15  # of the training set, for tuning
WARMUP = 0.25  # share of a run


@dataclass(frozen=True)
class Case:
    """A data set and a network.

    Attributes:
        config: a bundled config.
        overrides: of it.
        batches: the first one is the reference.
        short: batches of the short form.
        epochs: of every run.
    """

    config: str
    overrides: tuple[str, ...]
    batches: tuple[int, ...]
    short: tuple[int, ...]
    epochs: int


@dataclass(frozen=True)
class Method:
    """An optimizer and the bounds of its rate."""

    optimizer: str
    rates: tuple[float, float]


_FASHION = "data={{name: idx, root: {root}, flip: true}}"
_NET, _NORM = "model.name=mnist_alexnet", "model.options={batch_norm: true}"
_FAST = "train.channels_last=true"  # 1.5 times as fast on two cores
_LARGE = (64, 512, 1024, 2048, 4096, 8192)
CASES = {
    "digits": Case("digits-sgd-b32", (), (32, 256, 1024, 4096), (32, 1024, 4096), 20),
    "glyphs": Case("glyphs-sgd-b32", (), (32, 256, 1024), (32, 1024), 20),
    "fashion": Case("digits-sgd-b32", (_FASHION, _NET, _FAST), _LARGE, (256, 4096), 30),
    "fashion-bn": Case("digits-sgd-b32", (_FASHION, _NET, _NORM, _FAST), _LARGE, (256, 4096), 30),
}
METHODS = {
    "SGD": Method("name: sgd, adapt: weights, momentum: 0.9", (0.005, 1.0)),
    "Nesterov": Method("name: sgd, adapt: weights, momentum: 0.9, nesterov: true", (0.005, 1.0)),
    "LARS": Method("name: lars, adapt: layer, momentum: 0.9", (2.0, 64.0)),
    "LAMB": Method("name: lamb, adapt: layer", (0.001, 0.1)),
}
SHORT_METHODS = ("SGD", "LARS")
VARIANTS: dict[str, dict[str, Any]] = {
    "no warmup": {"schedule.warmup": "none", "schedule.warmup_duration": "0 epochs"},
    "warmup over a tenth": {"schedule.warmup_duration": 0.1},
    "warmup over a half": {"schedule.warmup_duration": 0.5},
    "linear decay": {"schedule.poly_power": 1.0},
    "cosine decay": {"schedule.policy": "cosine"},
    "momentum 0.8": {"optimizer.momentum": 0.8},
    "momentum 0.95": {"optimizer.momentum": 0.95},
    "weight decay 1e-4": {"optimizer.weight_decay": 1e-4},
    "weight decay 2.5e-3": {"optimizer.weight_decay": 2.5e-3},
}


class Stopped(Exception):
    """The job was asked to stop."""


class Bench:
    """One case's studies and runs in a folder; every method is collective."""

    def __init__(self, comm: Communicator, case: Case, folder: Path, options: Any) -> None:
        self.comm, self.case, self.folder, self.options = comm, case, folder, options
        self.launch = detect_launch(os.environ)

    def search(
        self, batch: int, name: str, search: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the best values for a method, and all its trials; ``search`` is a tune section."""
        config = load_config(self.case.config, self._overrides(batch, name, search))
        config = config.with_values("run", dir=str(self.folder / f"b{batch}-{name}/tune"))

        def note(trial: Any, seconds: float) -> None:
            print(f"  {batch} {name} trial {trial.number}: {dict(trial.params)} {trial.ended} "
                  f"{trial.value} {seconds:.0f} s", file=sys.stderr, flush=True)  # fmt: skip

        found = tune(config, self.comm, self.launch, True, note)
        if found.stopped is not None:
            raise Stopped(found.stopped)
        if found.best is None:
            return {}, []
        trials = [
            {"params": dict(t.params), "values": list(t.values), "ended": t.ended,
             "evaluations": len(t.curve or {})}
            for t in found.trials
        ]  # fmt: skip
        return dict(found.best.params), trials

    def held_out(self, batch: int, name: str, values: dict[str, Any], seed: int) -> float:
        """Return the test accuracy of one run in percent; it is not run again once it is done."""
        optimizer = "SGD" if name in ("linear", "sqrt") else name
        config = load_config(self.case.config, self._overrides(batch, optimizer))
        # A run whose steps are all skipped ends with the accuracy of chance, as it should here.
        changes = {"data.val_fraction": None, "train.max_skipped_steps": 10**9}
        config = with_keys(tuned_config(config, values), changes, name)
        folder = self._folder(batch, name, values) / f"seed-{seed}"
        config = config.with_values("run", dir=str(folder), seed=seed)
        done = folder / "top1.json"
        found = on_root(self.comm, lambda: json.loads(done.read_text()) if done.exists() else None)
        if found is None:
            loop, _ = build_run(config, self.comm, self.launch, Resume(None, ()))
            with loop.agreement.stops.listening():
                summary = loop.run()
            if summary.stopped is not None:
                raise Stopped(summary.stopped)
            evaluations = on_root(self.comm, lambda: read_run(folder).evaluations)
            found = 100.0 * evaluations[-1]["top1"]
            on_root(self.comm, lambda: done.write_text(json.dumps(found)))
        return float(found)

    def observed(self, batch: int, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the critical batch by epoch and the trust ratios of the first held-out run."""
        run = read_run(self._folder(batch, name, values) / f"seed-{FIRST_HELD_OUT}")
        keep = ("step", "epoch", "trust_ratio")
        ratios = [{key: record[key] for key in keep} for record in run.layers]
        return {"critical_batches": run.critical_batches, "ratios": ratios}

    def _folder(self, batch: int, name: str, values: dict[str, Any]) -> Path:
        """Return where runs with these values lie: a search with more trials finds others."""
        return self.folder / f"b{batch}-{name}/{zlib.crc32(json.dumps(values).encode()):08x}"

    def settings(self) -> list[str]:
        """Return what all methods and batches have in common, as overrides of the config."""
        epochs = self.options.epochs
        return [
            *self.case.overrides,
            f"schedule.warmup_duration={self.options.warmup * epochs:g} epochs",
            f"train.duration={epochs} epochs",
            f"train.eval_every={0.1 * epochs:g} epochs",  # each takes a twentieth of an epoch
            "train.micro_batch=512",
            f"data.val_fraction={HELD_OUT_IMAGES}",
        ]

    def variant(self, change: str) -> dict[str, Any]:
        """Return the values of a change, by key."""
        key, ramp = "schedule.warmup_duration", VARIANTS[change].get("schedule.warmup_duration")
        share = {key: f"{ramp * self.options.epochs:g} epochs"} if isinstance(ramp, float) else {}
        return VARIANTS[change] | share

    def _overrides(self, batch: int, name: str, search: dict[str, Any] | None = None) -> list[str]:
        options, epochs, method = self.options, self.options.epochs, METHODS[name]
        low, high = method.rates
        space: dict[str, Any] = {"schedule.base_lr": {"log": [low, high]}}
        if options.full:
            ramps = [f"{share * epochs:g} epochs" for share in (0.1, 0.25, 0.5)]
            space["schedule.warmup_duration"] = {"choices": ramps}
            space["optimizer.weight_decay"] = {"log": [5e-5, 5e-3]}
        search = search or {
            "space": space, "trials": options.trials, "seeds": options.search_seeds
        }  # fmt: skip
        if options.trial_epochs is not None:
            search = search | {"duration": f"{options.trial_epochs:g} epochs"}
        return [
            *(text.format(root=options.root) if "root" in text else text
              for text in self.settings()),
            f"optimizer={{{method.optimizer}, weight_decay: 5.0e-4}}",
            f"train.global_batch={batch}",
            f"tune={json.dumps(search)}",
            "run.console=none",
        ]  # fmt: skip


class Table:
    """The rows of a study, which a file keeps from one call to the next.

    Args:
        comm: rank 0 reads and writes.
        path: the file; None keeps nothing.
        study: what all rows have in common; the file's must be the same.
        facts: of this call's machine, software and command, which each row keeps.

    Raises:
        UserError: the file is of another study, or cannot be read.
    """

    def __init__(
        self, comm: Communicator, path: Path | None, study: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        self.comm, self.path, self.study, self.facts = comm, path, study, facts
        self.rows: list[Row] = on_root(comm, self._read)

    def _read(self) -> list[Row]:
        if self.path is None or not self.path.exists():
            return []
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            rows: list[Row] = kept["rows"]
            for key, here in self.study.items():
                if (found := kept.get(key)) != here:
                    raise UserError(
                        f"{self.path}: holds another study: {key} is {found!r}, here {here!r}; "
                        f"name another file with -o"
                    )
            for row in rows:
                say_row(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: not a file of this script: {error!r}") from None
        return rows

    def find(self, batch: int, name: str, change: str | None = None) -> Row | None:
        """Return a row, None if it is not there."""
        key = (batch, name, change)
        found = (r for r in self.rows if (r["batch"], r["method"], r.get("change")) == key)
        return next(found, None)

    def found(self, batch: int, name: str) -> dict[str, Any]:
        """Return the values that the search found, {} if all its trials diverged."""
        row = self.find(batch, name)
        assert row is not None  # cells() yields it first
        return dict(row["params"])

    def add(self, row: Row) -> None:
        """Print a row, and write the file anew."""
        self.rows.append(row | {"environment": self.facts})
        on_root(self.comm, self._write)

    def _write(self) -> None:
        say_row(self.rows[-1])
        if self.path is not None:
            replace_text(self.path, json.dumps(self.study | {"rows": self.rows}) + "\n")


def cells(options: argparse.Namespace) -> Iterator[tuple[int, str, str | None]]:
    """Yield batch, method and change: the reference first, then the untuned runs."""
    reference = min(options.batches)
    for batch in sorted(options.batches):
        for name in options.methods:
            if batch != reference or name == "SGD":
                yield batch, name, None
    for batch in sorted(options.batches):
        if batch != reference and "SGD" in options.methods:
            yield batch, "sqrt", None
            yield batch, "linear", None
    for change in VARIANTS if options.vary is not None else ():
        yield options.vary, "LARS", change


def parse() -> argparse.Namespace:
    """Return the options, with the form's defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--root", help="of Fashion-MNIST's IDX files")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--trial-epochs", type=float, help="of a trial; half of --epochs if absent")
    parser.add_argument(
        "--warmup", type=float, default=WARMUP, metavar="SHARE", help="of a run, for all methods"
    )
    parser.add_argument("--search-seeds", type=int, help="runs of a trial that finishes")
    parser.add_argument("--seeds", type=int, help="held-out runs of each method")
    parser.add_argument("--vary", type=int, metavar="BATCH", help="one of --batches")
    parser.add_argument("--folder", type=Path, default=Path("runs/large_batch"))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    case, full = CASES[options.case], options.full
    if options.root is None and options.case.startswith("fashion"):
        parser.error("--root is needed: the folder of Fashion-MNIST's IDX files")
    options.batches = options.batches or list(case.batches if full else case.short)
    options.methods = options.methods or list(METHODS if full else SHORT_METHODS)
    options.epochs = options.epochs or case.epochs
    options.trials = options.trials or (20 if full else 8)
    options.search_seeds = options.search_seeds or (3 if full else 1)
    options.seeds = options.seeds or (5 if full else 3)
    if options.output is not None and not options.output.absolute().parent.is_dir():
        parser.error(f"-o {options.output}: the folder is not there")
    if options.vary is not None and (options.vary, "LARS", None) not in cells(options):
        parser.error(f"--vary {options.vary}: LARS is not run at this batch")
    return options


def measure(bench: Bench, batch: int, name: str, change: str | None, table: Table) -> Row:
    """Return a row of the table."""
    options = bench.options
    trials: list[dict[str, Any]] = []
    if name in ("linear", "sqrt"):
        grown, values = batch / min(options.batches), table.found(min(options.batches), "SGD")
        if values:
            values["schedule.base_lr"] *= grown if name == "linear" else grown**0.5
    elif change is not None:
        values = table.found(batch, name)
    else:
        values, trials = bench.search(batch, name)
    if change is not None and values:
        values = values | bench.variant(change)
    seeds = range(FIRST_HELD_OUT, FIRST_HELD_OUT + options.seeds) if values else ()
    found = [bench.held_out(batch, name, values, seed) for seed in seeds]
    row = {"batch": batch, "method": name, "params": values, "top1": found, "trials": trials}
    if change is not None:
        row["change"] = change
    elif bench.comm.rank == 0 and found:
        row |= bench.observed(batch, name, values)
    return row


def search_of(options: argparse.Namespace) -> str:
    """Say how the values were found."""
    keys = "Rate, warmup and weight decay" if options.full else "The rate"
    share = (options.trial_epochs or 0.5 * options.epochs) / options.epochs
    runs = {0.5: "runs half as long", 1.0: "whole runs"}.get(share, f"runs {share:.2g} as long")
    return (
        f"{keys} of each method by {options.trials} trials of `tune` on {HELD_OUT_IMAGES:.0%} of "
        f"the training images, held out, in {runs} with {options.search_seeds} seeds; "
        f"{options.seeds} runs with other seeds on all images."
    )


@contextmanager
def told() -> Iterator[None]:
    """End with one line: a user's mistake, or a run that should be started again."""
    try:
        yield
    except UserError as error:  # which one rank alone may have
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)
    except Stopped as stop:
        print(f"stopped by {stop}: the same command continues", file=sys.stderr, flush=True)
        sys.exit(os.EX_TEMPFAIL)


def say_row(row: dict[str, Any]) -> None:
    """Print a line of the table."""
    top1, params = row["top1"], row["params"]
    spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    shown = f"{statistics.mean(top1):.2f}{spread}" if top1 else "diverged in all trials"
    values = ", ".join(f"{key.rpartition('.')[2]} {value:.3g}" if isinstance(value, float)
                       else f"{key.rpartition('.')[2]} {value}"
                       for key, value in params.items())  # fmt: skip
    method = f"{row['method']}, {row['change']}" if "change" in row else row["method"]
    print(f"| {row['batch']:,} | {method} | {values} | {shown} |", flush=True)


def main() -> None:
    """Run every cell and print the table."""
    options = parse()
    comm = connect()
    facts = environment_facts() | {"ranks": comm.size, "backend": comm.backend}
    if comm.rank == 0:
        print(f"# {options.case}, {options.epochs} epochs, {options.trials} trials a method, "
              f"{options.seeds} held-out seeds\n")  # fmt: skip
        print(f"{facts['processor']}, {facts['cores']} cores, {comm.size} ranks on {comm.backend}")
        print(f"`horovodrun -np {comm.size} python {shlex.join(sys.argv)}`\n")
        print("| batch | method | values | test accuracy, % |\n|---|---|---|---|", flush=True)
    form = "full" if options.full else "short"
    folder = options.folder / f"{options.case}-{form}-{options.epochs}"
    if options.trial_epochs is not None:
        folder = folder.with_name(f"{folder.name}-{options.trial_epochs:g}")
    if options.warmup != WARMUP:
        folder = folder.with_name(f"{folder.name}-warmup-{options.warmup:g}")
    bench = Bench(comm, CASES[options.case], folder, options)
    study = {
        "case": options.case, "epochs": options.epochs, "search": search_of(options),
        "reference": min(options.batches), "settings": bench.settings(),
    }  # fmt: skip
    with told():
        table = Table(comm, options.output, study, facts)
        for cell in cells(options):
            if table.find(*cell) is None:
                table.add(measure(bench, *cell, table))
    comm.close()


if __name__ == "__main__":
    main()
