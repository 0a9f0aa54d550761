"""Pages whose prose is written by hand and whose numbers are not: those stand between `<!-- NAME -->` and
`<!-- /NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Target = dict[str, Any]
"""`name`, `value`, `unit`, `bar`, `met`: what had to be reached, and what was."""


def fill(page: str, blocks: dict[str, str]) -> str:
    """The page with what stands between each pair of markers replaced. ValueError where a pair is missing."""
    for name, content in blocks.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        page, count = pattern.subn(lambda found, text=content: f"{found[1]}\n{text}\n\n{found[2]}", page)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{name}: the page must have this pair of markers once")
    return page


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of Markdown; numbers to the right, what they are of to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def at_least(name: str, value: float, unit: str, bar: float) -> Target:
    """A target for large values."""
    return {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "bar": bar, "met": value >= bar}


def at_most(name: str, value: float, unit: str, bar: float) -> Target:
    """A target for small values."""
    return {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "bar": bar, "met": value <= bar}


def targets_table(targets: Iterable[Target]) -> str:
    """What had to be reached, and whether it was."""
    rows = [
        [target["name"], f"{target['value']:g}", target["unit"], f"{target['bar']:g}", "yes" if target["met"] else "no"]
        for target in targets
    ]
    return table(["target", "measured", "unit", "bar", "met"], rows)
