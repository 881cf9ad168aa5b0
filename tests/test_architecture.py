"""The house rules that a program can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hvd_lars"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lower rooms first: a module may import from its own room and from those before it.
ROOMS = [
    "errors", "settings", "planning", "launchers", "runtime", "comm", "data", "metrics", "models",
    "optim", "health", "state", "train", "sources", "optimizers", "tuning", "config", "assemble",
    "report", "cli", "__main__",
]  # fmt: skip
HEIGHT = {room: i for i, room in enumerate(ROOMS)}


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path):
    """Rooms that a module imports from, late imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
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
    room = room_of(path)
    if room == "__init__":
        return
    assert room in HEIGHT, f"{room} has no place in ROOMS"
    for imported in imports_of(path):
        assert HEIGHT[imported] <= HEIGHT[room], f"{room} imports {imported}"


def test_only_assemble_and_the_command_line_take_a_config():
    users = {room_of(path) for path in MODULES if "config" in imports_of(path)}
    assert users == {"config", "assemble", "cli"}


def test_reading_a_config_imports_no_torch():
    program = "import hvd_lars.config.file, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_small_and_say_what_they_hold(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    says = ast.get_docstring(ast.parse(text))
    assert says
    assert "imports " not in says, "this test knows better"


def test_there_is_no_drawer_for_odds_and_ends():
    assert not [path for path in MODULES if path.stem in ("utils", "common", "helpers", "misc")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 61, node.name
