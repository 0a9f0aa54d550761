"""The parts of the demonstration that can be wrong without a service. The whole of it is an end-to-end test."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from cli.client import Plan
from cli.demo import CAP_STEP_BYTES, choose_cap, write_datasets

MIB = 2**20


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_document_is_in_both_datasets(tmp_path: Path) -> None:
    training, validation = map(texts, write_datasets(tmp_path))
    assert sorted(training + validation) == sorted(topics.values())
    assert not set(training) & set(validation)
    assert 0.05 < sum(map(len, validation)) / sum(map(len, topics.values())) < 0.2


@pytest.mark.parametrize(
    ("minimum", "unchunked", "cap"),
    [(300, 700, 400), (300, 717, 400), (303, 309, 303), (300, 300, 300)],
)
def test_the_cap_can_be_met_and_the_ordinary_step_cannot_meet_it(minimum: int, unchunked: int, cap: int) -> None:
    chosen = choose_cap(plan_with(minimum * MIB, unchunked * MIB))
    assert chosen == cap * MIB
    assert chosen % CAP_STEP_BYTES == 0 or chosen == minimum * MIB


def plan_with(minimum: int, unchunked: int) -> Plan:
    return {
        "chunk_length": 1,
        "num_chunks": 1,
        "state_policy": "keep",
        "micro_batch_size": 1,
        "accumulation_steps": 1,
        "predicted_peak_bytes": minimum,
        "breakdown": {},
        "predicted_step_seconds": 1.0,
        "predicted_total_seconds": 1.0,
        "unchunked_peak_bytes": unchunked,
        "minimum_cap_bytes": minimum,
        "reason": "",
        "calibration_source": "",
        "frontier": [],
    }
