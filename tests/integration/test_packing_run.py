"""Three real jobs at once on one machine, in one Celery worker, and a fourth that has to wait for room."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from service import database, events, jobs, queue
from service.models import Dataset
from service.storage import Storage
from slim_core.config import TrainConfig
from slim_core.planning import Workload, default_calibration, plan_job
from tests.integration.seed import add_dataset
from tests.integration.stage import MODEL, Stage, open_stage

MIB = 1 << 20
CAPS = (360 * MIB, 380 * MIB, 400 * MIB, 370 * MIB)
"""The first three fit at once, all four do not."""
DEVICE_BYTES = sum(CAPS[:3]) + 100 * MIB
TRAIN = TrainConfig(sequence_length=256, batch_size=1, steps=600)

pytestmark = pytest.mark.slow


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path, device_memory_bytes=DEVICE_BYTES) as stage:
        yield stage


def create(stage: Stage, dataset: Dataset, cap: int) -> str:
    plan = plan_job(Workload(MODEL, TRAIN), cap, default_calibration()).to_json()
    with database.transaction(stage.bind) as session:
        return jobs.create(
            session,
            spec={"name": "real", "model": "performer-tiny", "keep": 2, "metadata": {}},
            train=TRAIN.to_json(),
            model_config=MODEL.to_json(),
            plan=plan,
            memory_cap_bytes=cap,
            dataset_id=dataset.id,
        ).id


def times(stage: Stage, job_id: str) -> tuple[float, float]:
    """Seconds of the database's clock from the claim to the end."""
    with database.transaction(stage.bind) as session:
        rows = events.page(session, job_id, limit=1_000)[0]
    moment = {row.type: row.created_at.timestamp() for row in rows}
    return moment["started"], moment["succeeded"]


def test_three_real_jobs_run_at_once_and_a_fourth_when_there_is_room(stage: Stage) -> None:
    text = "\n".join(topics[name] for name in ("assert", "assignment", "import", "lambda", "numbers"))
    dataset = add_dataset(stage.bind, Storage(stage.settings.data_dir), text)
    ids = [create(stage, dataset, cap) for cap in CAPS]
    command = [sys.executable, "-m", "celery", "-A", "tests.integration.real_worker", "worker", "--loglevel=INFO"]
    stage.start("worker", [*command, "--without-mingle", "--without-gossip"])
    assert queue.wake(ids[0], queue.producer(stage.settings.redis_url))
    ended = [stage.end(job_id, "succeeded", seconds=120) for job_id in ids]

    for job in ended:
        assert (job.attempt, job.device_id) == (1, stage.device)
        assert job.measured_peak_bytes is not None
        assert 100 * MIB < job.measured_peak_bytes <= job.memory_cap_bytes
    runs = dict(zip(ids, (times(stage, job_id) for job_id in ids), strict=True))
    starts = [runs[job_id][0] for job_id in ids]
    assert all(earlier < later for earlier, later in pairwise(starts))
    assert starts[2] < min(runs[job_id][1] for job_id in ids[:3])  # three at once
    assert starts[3] >= min(runs[job_id][1] for job_id in ids[:3])  # the fourth not before one has ended
    for moment in starts:
        held = [job.memory_cap_bytes for job in ended if runs[job.id][0] <= moment < runs[job.id][1]]
        assert sum(held) <= DEVICE_BYTES
