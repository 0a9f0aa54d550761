"""A part of `make caps`: one job under the caps that matter most, through the API, the supervisor and the trainer."""

from __future__ import annotations

import pytest

from benchmarks import caps
from service.settings import Settings
from worker.calibrator import measure

SMALL = caps.Specification("small", {"model": "performer-tiny", "sequence_length": 4_096})


@pytest.mark.slow
@pytest.mark.timeout(400)  # on a busy machine measuring alone takes a minute
def test_a_cap_is_refused_or_held_and_a_wrong_plan_mended(settings: Settings) -> None:
    one_thread = settings.model_copy(update={"trainer_threads": 1})
    kinds = (caps.UNDER, caps.MINIMUM, caps.WRONG)
    runs = list(caps.under_all_caps(SMALL, one_thread, measure(1), kinds))
    assert [target["name"] for target in caps.targets(runs) if not target["met"]] == [], runs
    refused, least, wrong = runs
    assert refused["answer"] == 422
    assert refused["minimum_cap_bytes"] == least["cap_bytes"]
    assert wrong["chunk_lengths"][0] > wrong["chunk_lengths"][-1]
