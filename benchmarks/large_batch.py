#!/usr/bin/env python3
"""At which batch does a method lose accuracy, all tuned with the same number of trials?

    horovodrun -np 2 python benchmarks/large_batch.py digits [-o FILE]          # 20 minutes
    horovodrun -np 2 python benchmarks/large_batch.py fashion --full --root DIR [-o FILE]

For every batch and method ``tune`` searches on images held out of the training set; then runs on
seeds of their own, trained on the whole training set, give mean and standard deviation of the test
accuracy.  SGD's best rate at the smallest batch is also tried times k and times √k, untuned.  The
noise scale and trust ratios of a run are kept.  Everything lies in ``--folder``: a study that was
stopped or killed goes on where it was, in any number of pieces, with the same command.
``benchmarks/plot_large_batch.py`` draws FILE, which is written after every method.

The short form searches the rate only, with 8 trials of one seed; ``--full`` searches the warmup and
the weight decay too, with 20 trials of three seeds: of one seed, a search may choose a rate at the
edge where training diverges.  A trial is half as long as a run, with its whole schedule.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
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
from hvd_lars.state.run_folder import environment_facts

FIRST_HELD_OUT = 101  # tuning uses the seeds from 0 on
HELD_OUT_IMAGES = 0.15  # of the training set, for tuning


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
_LARGE = (64, 512, 1024, 2048, 4096, 8192)
CASES = {
    "digits": Case("digits-sgd-b32", (), (32, 256, 1024, 4096), (32, 1024, 4096), 20),
    "glyphs": Case("glyphs-sgd-b32", (), (32, 256, 1024), (32, 1024), 20),
    "fashion": Case("digits-sgd-b32", (_FASHION, _NET), _LARGE, (256, 4096), 30),
    "fashion-bn": Case("digits-sgd-b32", (_FASHION, _NET, _NORM), _LARGE, (256, 4096), 30),
}
METHODS = {
    "SGD": Method("name: sgd, adapt: weights, momentum: 0.9", (0.005, 1.0)),
    "Nesterov": Method("name: sgd, adapt: weights, momentum: 0.9, nesterov: true", (0.005, 1.0)),
    "LARS": Method("name: lars, adapt: layer, momentum: 0.9", (2.0, 64.0)),
    "LAMB": Method("name: lamb, adapt: layer", (0.001, 0.1)),
}
SHORT_METHODS = ("SGD", "LARS")


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
        folder = self.folder / f"b{batch}-{name}/seed-{seed}"
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

    def observed(self, batch: int, name: str) -> dict[str, Any]:
        """Return the critical batch by epoch and the trust ratios of the first held-out run."""
        run = read_run(self.folder / f"b{batch}-{name}/seed-{FIRST_HELD_OUT}")
        keep = ("step", "epoch", "trust_ratio")
        ratios = [{key: record[key] for key in keep} for record in run.layers]
        return {"critical_batches": run.critical_batches, "ratios": ratios}

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
        return [
            *(text.format(root=options.root) if "root" in text else text
              for text in self.case.overrides),
            f"optimizer={{{method.optimizer}, weight_decay: 5.0e-4}}",
            f"schedule.warmup_duration={0.25 * epochs:g} epochs",
            f"train.duration={epochs} epochs",
            f"train.global_batch={batch}",
            "train.micro_batch=512",
            f"data.val_fraction={HELD_OUT_IMAGES}",
            f"tune={json.dumps(search)}",
            "run.console=none",
        ]  # fmt: skip


def cells(options: argparse.Namespace, case: Case) -> Iterator[tuple[int, str]]:
    """Yield batches and methods: the reference first, the untuned rates last."""
    reference = min(options.batches)
    for batch in sorted(options.batches):
        for name in options.methods:
            if batch != reference or name == "SGD" or options.full:
                yield batch, name
    for batch in sorted(options.batches):
        if batch != reference and "SGD" in options.methods:
            yield batch, "sqrt"
            yield batch, "linear"


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
    parser.add_argument("--search-seeds", type=int, help="runs of a trial that finishes")
    parser.add_argument("--seeds", type=int, help="held-out runs of each method")
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
    return options


def measure(bench: Bench, batch: int, name: str, reference: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table."""
    options = bench.options
    if name in ("linear", "sqrt"):
        grown = batch / min(options.batches)
        values = reference | {
            "schedule.base_lr": reference["schedule.base_lr"]
            * (grown if name == "linear" else grown**0.5)
        }
        trials: list[dict[str, Any]] = []
    else:
        values, trials = bench.search(batch, name)
    seeds = range(FIRST_HELD_OUT, FIRST_HELD_OUT + options.seeds) if values else ()
    found = [bench.held_out(batch, name, values, seed) for seed in seeds]
    row = {"batch": batch, "method": name, "params": values, "top1": found, "trials": trials}
    if bench.comm.rank == 0 and found:
        row |= bench.observed(batch, name)
    return row


def search_of(options: argparse.Namespace) -> str:
    """Say how the values were found."""
    keys = "Rate, warmup and weight decay" if options.full else "The rate"
    return (
        f"{keys} of each method by {options.trials} trials of `tune` on {HELD_OUT_IMAGES:.0%} of "
        f"the training images, held out, in runs half as long with {options.search_seeds} seeds; "
        f"{options.seeds} runs with other seeds on all images."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """End with the exit code of a run that should be started again."""
    try:
        yield
    except Stopped as stop:
        print(f"stopped by {stop}: the same command continues", file=sys.stderr, flush=True)
        sys.exit(75)


def say_row(row: dict[str, Any]) -> None:
    """Print a line of the table."""
    top1, params = row["top1"], row["params"]
    spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    shown = f"{statistics.mean(top1):.2f}{spread}" if top1 else "diverged in all trials"
    values = ", ".join(f"{key.rpartition('.')[2]} {value:.3g}" if isinstance(value, float)
                       else f"{key.rpartition('.')[2]} {value}"
                       for key, value in params.items())  # fmt: skip
    print(f"| {row['batch']:,} | {row['method']} | {values} | {shown} |", flush=True)


def main() -> None:
    """Run every cell and print the table."""
    options = parse()
    case = CASES[options.case]
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
    bench, rows, reference = Bench(comm, case, folder, options), [], {}
    with quiet():
        for batch, name in cells(options, case):
            rows.append(row := measure(bench, batch, name, reference))
            if name == "SGD" and not reference:
                reference = row["params"]
            if comm.rank == 0:
                say_row(row)
                if options.output is not None:
                    result = {"case": options.case, "epochs": options.epochs, "rows": rows,
                              "search": search_of(options), "environment": facts}  # fmt: skip
                    options.output.write_text(json.dumps(result) + "\n")
    comm.close()


if __name__ == "__main__":
    main()
