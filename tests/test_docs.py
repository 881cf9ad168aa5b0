"""The documentation as a site, links that lead somewhere, and examples in the help."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_lars.cli.parser import ON_RANKS, TOOLS, parse

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


def test_the_site_builds_without_a_warning(tmp_path):
    """mkdocs --strict: every link, anchor and entry of the menu leads to something."""
    found = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    api = (tmp_path / "api/index.html").read_text()
    assert "trust_coefficient" in api
    pages = "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    loaded = re.findall(
        r'<(?:script|img)[^>]+src="(https?:[^"]+)|<link[^>]+href="(https?:[^"]+)', pages
    )
    assert loaded == []  # a cluster's documentation is read without a network


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_the_site_lead_to_files(page):
    links = [link for link, _ in LINK.findall((ROOT / page).read_text()) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", [*ON_RANKS, *TOOLS])
def test_the_example_in_a_commands_help_is_a_command_line(name):
    """What follows hvd-lars in it is parsed; files and run folders need not exist."""
    command = (ON_RANKS | TOOLS)[name]
    examples = command.EPILOG.partition("Example: ")[2].split("; ")
    assert name in {shlex.split(each.partition("hvd-lars ")[2])[0] for each in examples}
    for each in examples:
        options = parse(shlex.split(each.partition("hvd-lars ")[2]))
        assert options.command in each
