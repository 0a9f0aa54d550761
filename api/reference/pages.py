"""The reference as HTML: one page of its own, or pieces for a site whose pages have their own frame."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from api.reference.outline import Outline, outline

TEMPLATES = Path(__file__).with_name("templates")
STYLE = (TEMPLATES / "style.css").read_text(encoding="utf-8")


def words(text: str) -> Markup:
    """Prose of the document: `code`, and paragraphs."""
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text.strip())))
    return Markup(html.replace("\n\n", "</p>\n<p>"))  # noqa: S704  # escaped above


_environment = Environment(
    loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_environment.filters["words"] = words


def page(document: Mapping[str, Any]) -> str:
    """All of it, in one page that loads nothing."""
    style = STYLE + (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return _environment.get_template("page.html").render(it=outline(document), style=Markup(style))  # noqa: S704  # ours


def markdown_pages(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, title and text of a Markdown page for each section, and of one for the errors; headings are Markdown's, all
    else is HTML."""
    macros = _environment.get_template("operation.html").module
    found: Outline = outline(document)
    for section in found.sections:
        parts = [f"# {section.title}\n"]
        for each in section.operations:
            html = _in_one(macros.operation(each, "errors.md"))  # type: ignore[attr-defined]
            parts.append(f"## {each.summary} {{ #{each.anchor} }}\n\n{html}\n")
        yield section.tag, section.title, "\n".join(parts)
    shared = _in_one(macros.errors(found.shared, ""))  # type: ignore[attr-defined]
    every = _in_one(macros.every_error(found.errors))  # type: ignore[attr-defined]
    text = f"# Errors\n\nThese may come from nearly every operation:\n\n{shared}\n\n## Every code\n\n{every}\n"
    yield "errors", "Errors", text


def _in_one(html: str) -> str:
    """As one block of HTML, which Markdown leaves alone: no line of it is empty, but for those of examples."""
    return '<div class="reference">\n' + re.sub(r"\n\s*\n+", "\n", html.strip()) + "\n</div>"
