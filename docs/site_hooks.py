"""What the site takes from outside docs/: configs and measured tables that pages link to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDERS = {"configs": ROOT / "configs", "results": ROOT / "benchmarks/results"}


def on_files(files: Files, config: Any) -> Files:
    """Add them under configs/ and results/; decisions and results stand in no menu."""
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".yaml", ".md"):
                uri = f"{name}/{path.relative_to(folder).as_posix()}"
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    for file in files.documentation_pages():
        if file.src_uri.startswith(("decisions/", "results/")):
            file.inclusion = file.inclusion.NOT_IN_NAV
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that lead out of docs/ lead to where those files are on the site."""
    up = "../" if page.file.src_uri.startswith("decisions/") else ""
    return (
        markdown.replace(f"]({up}../configs/", f"]({up}configs/")
        .replace(f"]({up}../benchmarks/results/", f"]({up}results/")
        .replace(f"]({up}../benchmarks/results)", f"]({up}results/lars_step.md)")
    )
