"""The frame of a page, its figures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import hvd_lars


def page_of(names: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return a whole page as HTML.

    Args:
        names: title of the page.
        sections: anchor, title and HTML of each.
    """
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}" tabindex="-1"><h2>{title}</h2>{text}</section>'
        for key, title, text in sections
    )
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(names)} · hvd_lars</title><style>{style}</style></head><body>"
        f'<a class="skip" href="#{sections[0][0]}">Skip to content</a>'
        f"<header><h1>{escape(names)}</h1><p>hvd_lars {hvd_lars.__version__}</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main>'
        "</body></html>\n"
    )


def figure(chart: str, caption: str) -> str:
    """Return a chart with its caption."""
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], figures: bool = False) -> str:
    """Return a table that scrolls sideways on a narrow page; no cell of ``figures`` is broken."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(_shown(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide{" figures" if figures else ""}" tabindex="0" role="region" '
        f'aria-label="table">'
        f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
