"""The house rules that a program can check."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hvd_lars"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lower layers first; a module may import from its own layer's row only what stands to its left,
# and anything from the rows above.
LAYERS = [
    [
        "allocator",
        "errors",
        "process",
        "terminal",
        "rank_errors",
        "files",
        "memory",
        "durations",
        "schedules",
        "launchers",
        "run_folder",
    ],
    ["stopwatch", "precision", "progress", "liveness"],
    [
        "config_fields",
        "config_data",
        "config_optimizer",
        "config",
        "config_file",
        "models",
        "metrics",
        "data",
        "comm",
    ],
    ["optim", "replicas", "batch_norm", "stopping", "votes", "watchdog"],
    ["evaluation", "checkpoint_files", "checkpoint", "commits"],
    ["trainer", "recorder", "profiling", "loop", "doctor"],
    ["assemble"],
    ["report"],
    ["cli", "__main__"],
]
HEIGHT = {name: (i, j) for i, row in enumerate(LAYERS) for j, name in enumerate(row)}
MAY_IMPORT_NOTHING = {*LAYERS[0], *LAYERS[1]} - {"files", "run_folder", "terminal"}


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path):
    """Parts of hvd_lars that a module imports at its top level."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "hvd_lars" and len(parts) > 1 and parts[1] in HEIGHT:
                yield parts[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in HEIGHT, f"{part} has no place in LAYERS"
    for imported in imports_of(path):
        if imported != part:
            assert HEIGHT[imported] < HEIGHT[part], f"{part} imports {imported}"
            assert part not in MAY_IMPORT_NOTHING, f"{part} imports {imported}"


def test_only_assemble_and_the_command_line_take_a_config():
    users = {
        part_of(path)
        for path in MODULES
        if any(name in ("config", "config_data", "config_file") for name in imports_of(path))
    }
    assert users == {"config", "config_file", "assemble", "cli"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_small_and_say_what_they_hold(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


def test_there_is_no_drawer_for_odds_and_ends():
    assert not [path for path in MODULES if path.stem in ("utils", "common", "helpers", "misc")]
