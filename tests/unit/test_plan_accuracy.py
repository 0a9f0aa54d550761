"""A few of `make plan-accuracy`'s random specifications, of a seed of their own."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from benchmarks import plan_accuracy
from slim_core.data.prepare import make_tokens
from slim_core.planning import default_calibration
from tests.unit.core_support import write_text

SEED = 7


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "count"), [("performer", 4), ("softmax", 3)])
def test_no_job_exceeds_its_plan(tmp_path: Path, attention: str, count: int) -> None:
    # One thread: the tests run side by side, and times are not looked at. No runtime: a plan that has less than it
    # takes leaves no room for what is idle, so what is measured is what the job needs.
    calibration = replace(default_calibration(), threads=1, runtime_bytes=0)
    data = make_tokens(write_text(tmp_path))
    for workload, cap in islice(plan_accuracy.specifications(SEED, calibration, attention), count):
        record = plan_accuracy.measured(workload, cap, calibration, data)
        assert record["plan"]["predicted_peak_bytes"] <= cap
        own = record["plan"]["predicted_peak_bytes"] + record["measured"]["runtime_bytes"]
        assert 0.8 * own <= record["measured"]["peak_bytes"] <= own, workload
