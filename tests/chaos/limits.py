"""Faults of the numbers: a cap that is reached, a loss that is no number any more."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from starlette.testclient import TestClient

from api.app import create_app
from benchmarks import caps
from service.storage import Storage
from slim_core.planning import Calibration, default_calibration
from slim_core.weights.checkpoint import load_model
from tests.chaos.arena import Arena
from tests.chaos.fault import Fault
from tests.chaos.storage import TEXT
from tests.chaos.training import real_trainer
from tests.integration.seed import add_dataset
from worker.environment import trainer_environment
from worker.supervisor import supervise

SMALL = caps.Specification("small", {"model": "performer-tiny", "sequence_length": 4_096})
FEW_KINDS = (caps.UNDER, caps.MINIMUM, caps.WRONG)


@functools.cache
def _calibration(threads: int) -> Calibration:
    """The runtime's memory as it is here; nobody looks at the times, and to measure them takes a minute or more."""
    command = [sys.executable, "-c", _RUNTIME.format(threads=threads)]
    output = subprocess.run(
        command, env=trainer_environment(threads), check=True, capture_output=True, text=True
    ).stdout
    return replace(default_calibration(), threads=threads, runtime_bytes=int(output))


_RUNTIME = """
import torch
from slim_core.calibrate import warm_up
from slim_core.memory import private_bytes
torch.set_num_threads({threads})
warm_up(torch.device("cpu"))
print(private_bytes())
"""


# Weights grow ninety-fold with each step.
EXPLOSIVE = {
    "model": "performer-tiny",
    "memory_cap": "512MiB",
    "sequence_length": 64,
    "batch_size": 1,
    "steps": 200,
    "checkpoint_every": 1,
    "optimizer": {"name": "adamw", "learning_rate": 10.0, "weight_decay": 9.0},
    "gradient_clip": None,
}


def caps_reached(arena: Arena, cycles: int) -> Iterator[str]:
    """Caps below what a job needs, at it, above it, below what its plan says: refused, held, or ended and mended."""
    few = cycles <= len(FEW_KINDS)
    kinds = FEW_KINDS[-cycles:] if few else caps.KINDS
    specifications = (SMALL,) if few else caps.SPECIFICATIONS
    with arena.stage(device_memory_bytes=caps.NO_CAP) as stage:
        calibration = _calibration(stage.settings.trainer_threads)
        done = 0
        for specification in specifications:
            for run in caps.under_all_caps(specification, stage.settings, calibration, kinds, real_trainer(arena)):
                done += 1
                yield from _cap_violations(run)
        if done < cycles:
            yield f"{done} caps, not {cycles}"


def _cap_violations(run: dict[str, Any]) -> Iterator[str]:
    what = f"{run['specification']}, {run['kind']}, cap {run['cap_bytes']}"
    wanted = "refused" if run["kind"] == caps.UNDER else "succeeded"
    if run["status"] != wanted:
        yield f"{what}: {run['status']}, not {wanted}: {run['codes']}"
    for peak in run["peaks_bytes"]:
        if peak is None or peak > caps.ALLOWED_EXCESS * run["cap_bytes"]:
            yield f"{what}: {peak} bytes held"
    ended = run["codes"][:1] == ["memory_cap_exceeded"]
    if run["kind"] == caps.WRONG and not ended:
        yield f"{what}: a plan that needs more ran: {run['codes']}"
    if ended and not run["chunk_lengths"][0] > run["chunk_lengths"][-1]:
        yield f"{what}: chunks of {run['chunk_lengths']}: not planned anew"


def diverging_job(arena: Arena, cycles: int) -> Iterator[str]:
    """A loss that grows until it is no number: failed as diverged, numbers that JSON has, a checkpoint that is good."""
    with arena.stage() as stage, TestClient(create_app(stage.settings), base_url="http://127.0.0.1") as client:
        dataset_id = add_dataset(stage.bind, Storage(stage.settings.data_dir), TEXT).id
        for _ in range(cycles):
            answer = client.post("/jobs", json={**EXPLOSIVE, "dataset": dataset_id})
            if answer.status_code != 202:
                yield f"POST /jobs: {answer.text}"
                return
            job_id = answer.json()["id"]
            supervise(job_id, stage.settings, command=real_trainer(arena))
            job = stage.job(job_id)
            error = job.error or {}
            if (job.status, error.get("code"), error.get("step")) != ("failed", "diverged", job.step):
                yield f"{job_id}: {job.status} at step {job.step}: {error}"
            for path in ("", "/metrics", "/events", "/checkpoints"):
                try:
                    _strict(client.get(f"/jobs/{job_id}{path}").text)
                except ValueError as broken:
                    yield f"{job_id}{path}: {broken}"
            rows = stage.checkpoints(job_id)
            if not rows:
                yield f"{job_id}: no checkpoint is left"
                continue
            weights = load_model(stage.settings.data_dir / rows[0].path).parameters()
            if not all(math.isfinite(float(weight.detach().abs().sum())) for weight in weights):
                yield f"{job_id}: weights of its last checkpoint are no numbers"
            if rows[0].step != job.step:
                yield f"{job_id}: its last checkpoint is of step {rows[0].step}, its last good step was {job.step}"


def _strict(text: str) -> None:
    """Raises ValueError for what Python calls JSON and others do not."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    json.loads(text, parse_constant=refuse)


LIMITS = (
    Fault(
        "cap",
        "caps too small, just enough and plentiful, and plans that are wrong: peak <= cap + 3 %, and the cause is said",
        "caps",
        full=20,
        short=3,
        inflict=caps_reached,
        guards=("cap",),
    ),
    Fault(
        "divergence",
        "a loss that is no number: diverged, null in JSON, the last good checkpoint is kept",
        "jobs",
        full=1,
        short=1,
        inflict=diverging_job,
        guards=("finite check",),
    ),
)
