"""docs/choosing-a-cap.md says what the planner says today; `python -m benchmarks.cap_examples` writes it anew."""

from __future__ import annotations

from benchmarks.cap_examples import PAGE, blocks
from benchmarks.page import fill


def test_its_tables_are_the_planners() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fill(page, blocks()) == page
