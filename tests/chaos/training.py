"""SIGKILL to real trainers: what they computed before and after is what one that was left alone computes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from service import database, jobs
from service.storage import Storage
from slim_core.config import OptimizerConfig, TrainConfig
from tests.chaos.arena import Arena
from tests.chaos.fault import Fault
from tests.integration.seed import add_dataset
from tests.integration.stage import CAP_BYTES, MODEL, Stage, a_plan
from worker.supervisor import TRAINER_COMMAND, supervise

KILLS_A_JOB = 10


def killed_trainer(arena: Arena, cycles: int) -> Iterator[str]:
    """Some kills for each job, at random moments of random steps, each attempt a few checkpoints further."""
    with arena.stage() as stage:
        text = "\n".join(f"{number}: {number * number}" for number in range(5_000))
        dataset_id = add_dataset(stage.bind, Storage(stage.settings.data_dir), text).id
        for first in range(0, cycles, KILLS_A_JOB):
            kills = min(KILLS_A_JOB, cycles - first)
            gaps = [arena.random.randint(50, 140) for _ in range(kills)]
            steps = sum(gaps) + 60
            alone, killed = (real_job(stage, dataset_id, steps, checkpoint_every=20) for _ in range(2))
            _run(arena, stage, alone)
            hunter = _Hunter(arena, stage, killed, gaps)
            hunter.start()
            _run(arena, stage, killed)
            hunter.join()
            arena.recoveries += hunter.recoveries()
            yield from _differences(stage, alone, killed, kills + 1)


def real_job(stage: Stage, dataset_id: str, steps: int, checkpoint_every: int) -> str:
    """Everything that a checkpoint must bring back matters: moments, the schedule, dropout, the order of the data."""
    train = TrainConfig(
        sequence_length=64,
        batch_size=1,
        steps=steps,
        optimizer=OptimizerConfig(name="adamw", learning_rate=3e-3),
        dropout=0.1,
        checkpoint_every=checkpoint_every,
    )
    with database.transaction(stage.bind) as session:
        job = jobs.create(
            session,
            spec={"name": "real", "model": "performer-tiny", "keep": 2, "metadata": {}},
            train=train.to_json(),
            model_config=MODEL.to_json(),
            plan=a_plan(32),
            memory_cap_bytes=CAP_BYTES,
            dataset_id=dataset_id,
        )
    return job.id


def _run(arena: Arena, stage: Stage, job_id: str) -> None:
    while stage.job(job_id).status == "queued":
        supervise(job_id, stage.settings, command=real_trainer(arena))


def real_trainer(arena: Arena, *options: str) -> list[str]:
    """The command of the real trainer, without the guard that the arena lacks."""
    changes = [*options, *([] if arena.guard is None else [arena.guard])]
    # What guards need takes memory too, which a trainer that is measured must not hold.
    return [sys.executable, "-m", "tests.chaos.trainer", *changes] if changes else list(TRAINER_COMMAND)


class _Hunter(threading.Thread):
    """Kills the job's trainer when the job is some steps further than at the kill before, and a moment later."""

    def __init__(self, arena: Arena, stage: Stage, job_id: str, gaps: list[int]) -> None:
        super().__init__(daemon=True)
        self._stage, self._job_id = stage, job_id
        self._moments = [(gap, 0.05 * arena.random.random()) for gap in gaps]
        self._killed: list[tuple[float, int]] = []
        self._went_on: list[float] = []

    def run(self) -> None:
        target = 0
        for gap, moment in self._moments:
            target += gap
            while (job := self._stage.job(self._job_id)).finished_at is None and job.step < target:
                self._look(job.attempt)
                time.sleep(0.01)
            time.sleep(moment)
            for child in psutil.Process().children():
                if child.cmdline()[1:2] == ["-m"]:  # a trainer
                    os.kill(child.pid, signal.SIGKILL)
                    self._killed.append((time.monotonic(), job.attempt))

    def _look(self, attempt: int) -> None:
        waiting = len(self._went_on) < len(self._killed) and attempt > self._killed[-1][1]
        if waiting and self._stage.events(self._job_id, "training")[attempt - 1 :]:
            self._went_on.append(time.monotonic())

    def recoveries(self) -> list[float]:
        return [after - killed for (killed, _), after in zip(self._killed, self._went_on, strict=False)]


def _differences(stage: Stage, alone: str, killed: str, attempts: int) -> Iterator[str]:
    job = stage.job(killed)
    if job.status != "succeeded":
        yield f"{killed}: {job.status} at step {job.step} of {job.total_steps}: {job.error}"
    elif job.attempt != attempts:
        yield f"{killed}: {job.attempt} attempts, not {attempts}: a kill came too late"
    one, other = (curve(stage, job_id) for job_id in (alone, killed))
    if different := [step for step in one if other.get(step) != one[step]]:
        yield f"{killed}: {len(different)} of {len(one)} steps differ, step {different[0]} first"
    files = [
        {file["name"]: file["sha256"] for file in stage.checkpoints(job_id)[0].files} for job_id in (alone, killed)
    ]
    if different_files := [name for name in files[0] if files[0][name] != files[1].get(name)]:
        yield f"{killed}: other bytes at the end: {', '.join(different_files)}"


def curve(stage: Stage, job_id: str) -> dict[int, Any]:
    """What the job's metrics say of each step, but for what depends on the machine."""
    return {row.step: (row.loss, row.grad_norm, row.learning_rate, row.tokens) for row in stage.metrics(job_id)}


TRAINING = (
    Fault(
        "trainer",
        "SIGKILL to a real trainer in the middle of a step: the loss curve and the last weights, bit for bit",
        "kills",
        full=50,
        short=2,
        inflict=killed_trainer,
        guards=("moments",),
    ),
)
