"""What the site of the documentation has that is no file here: the reference, made from the API as it is, and the pages
of the repository's root. Run by mkdocs (mkdocs.yml)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs is a program of its own

from api.app import create_app  # noqa: E402
from api.openapi import document  # noqa: E402
from api.reference.pages import STYLE, markdown_pages  # noqa: E402
from service.settings import Settings  # noqa: E402

ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
REFERENCE = "reference"
DECISIONS = "decisions"
SITE_STYLE = """
:root { --md-primary-fg-color: #0f6e66; --md-primary-fg-color--dark: #0a4f49; --md-accent-fg-color: #0a8377; }
[data-md-color-scheme="default"] { --md-typeset-a-color: #0a6e64; }
[data-md-color-scheme="slate"] {
  --md-primary-fg-color: #0f5a54; --md-typeset-a-color: #5ccfc0; --md-accent-fg-color: #5ccfc0;
}
[data-md-color-scheme="slate"] .reference { --edge: #3a414d; --soft: #262b36; --dim: #a3adbd; --must: #ff8f8f; }
[dir] .md-typeset .reference details { margin: .5em 0; }
[dir] .md-typeset .reference summary { display: list-item; padding: .4em .8em; list-style-position: inside; }
.md-grid { max-width: 72rem; }
@media (min-width: 45em) { .md-typeset td:first-child code { white-space: nowrap; } }
.md-typeset img { border-radius: .2rem; }
[data-md-color-scheme="slate"] .md-typeset img[src$=".png"] { background: #fff; }
.md-typeset pre > code { font-size: .72rem; }
.md-typeset table:not([class]) { font-size: .7rem; }
"""
"""Colours of the dashboard; figures are drawn on white."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of two sections into the navigation: all decisions, and the reference by section."""
    decisions = sorted((ROOT / "docs" / DECISIONS).glob("*.md"))
    _section(config, "Decisions").extend(f"{DECISIONS}/{path.name}" for path in decisions)
    _section(config, "Reference").extend({title: f"{REFERENCE}/{name}.md"} for name, title, _ in _reference())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, _, text in _reference():
        files.append(File.generated(config, f"{REFERENCE}/{name}.md", content=text))
    for source, name in ROOT_PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
    icon = ROOT / "api" / "web" / "static" / "icon.svg"
    files.append(File.generated(config, "figures/icon.svg", content=icon.read_bytes()))
    files.append(File.generated(config, "site.css", content=STYLE + SITE_STYLE))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files beside docs/ lead to their pages here."""
    depth = page.file.src_uri.count("/")
    for source, name in ROOT_PAGES.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{source}", f"]({'../' * depth}{name}")
    return markdown


def _section(config: MkDocsConfig, title: str) -> list[Any]:
    entries: list[Any] = next(entry[title] for entry in config.nav or () if title in entry)
    return entries


_made: list[tuple[str, str, str]] = []


def _reference() -> list[tuple[str, str, str]]:
    """Made once for a build: nothing is asked of a database or broker."""
    if not _made:
        nowhere = Settings(
            database_url="postgresql://nowhere/none", redis_url="redis://nowhere", data_dir=ROOT / "site"
        )
        _made.extend(markdown_pages(document(create_app(nowhere), keys_required=True)))
    return _made
