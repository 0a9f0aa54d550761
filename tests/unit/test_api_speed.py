"""docs/api-speed.md says what docs/figures/api_speed.json has."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import api_speed_figure
from benchmarks.api_speed_report import blocks, targets
from benchmarks.bench_measure import ROOT
from benchmarks.page import fill


def test_the_page_is_that_of_the_record(tmp_path: Path) -> None:
    record = json.loads((ROOT / "docs" / "figures" / "api_speed.json").read_text())
    page = (ROOT / "docs" / "api-speed.md").read_text()
    assert targets(record) == record["targets"]
    assert fill(page, blocks(record)) == page
    api_speed_figure.draw(record, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
