"""Rows and files for tests of service/ and api/, made through the service's own functions."""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service import checkpoints, jobs, runs
from service.database import transaction
from service.datasets import DatasetUpload
from service.models import Dataset, Job
from service.runs import ClaimedJob
from service.storage import Storage
from slim_core.config import BUILTIN_MODELS, TrainConfig

PLAN = {
    "chunk_length": 64,
    "num_chunks": 2,
    "state_policy": "keep",
    "micro_batch_size": 1,
    "accumulation_steps": 1,
    "predicted_peak_bytes": 400_000_000,
    "breakdown": dict.fromkeys(
        ("runtime", "parameters", "gradients", "optimizer", "states", "activations", "logits", "workspace", "safety"), 1
    ),
    "predicted_step_seconds": 0.5,
    "predicted_total_seconds": 5.0,
    "unchunked_peak_bytes": 900_000_000,
    "minimum_cap_bytes": 300_000_000,
    "max_sequence_length": 1_000_000,
    "check_chunk_length": None,
    "reason": "it fits",
    "calibration_source": "measured",
    "time_factor": 1.0,
    "frontier": [],
}
LEASE_SECONDS = 60.0


def add_dataset(bind: Engine, storage: Storage, text: str = "Hello, world. " * 100, tenant: str = "default") -> Dataset:
    with DatasetUpload(storage, "text.txt", 2**30) as upload:
        upload.write(text.encode())
        return upload.store(bind, tenant=tenant)


def add_job(
    bind: Engine,
    dataset_id: str,
    keep: int = 2,
    memory_cap_bytes: int = 500_000_000,
    tenant: str = "default",
    steps: int = 10,
    **spec: Any,
) -> Job:
    defaults = {
        "name": "a job",
        "model": "performer-tiny",
        "dataset": dataset_id,
        "keep": keep,
        "steps": steps,
        "metadata": {},
    }
    with transaction(bind) as session:
        return jobs.create(
            session,
            spec={**defaults, "steps": steps, **spec},
            **planned(steps),
            memory_cap_bytes=memory_cap_bytes,
            dataset_id=dataset_id,
            tenant=tenant,
        )


def planned(steps: int = 10) -> dict[str, Any]:
    """What a plan adds to a job's request."""
    train = TrainConfig(sequence_length=128, batch_size=1, steps=steps).to_json()
    return {"train": train, "model_config": BUILTIN_MODELS["performer-tiny"].to_json(), "plan": PLAN}


def claim(bind: Engine, job_id: str, worker: str = "worker-1", lease_seconds: float = LEASE_SECONDS) -> ClaimedJob:
    with transaction(bind) as session:
        claimed = runs.claim(session, job_id, worker, lease_seconds)
    assert claimed is not None
    return claimed


def metric(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "type": "metric",
        "step": step,
        "loss": 5.0 - step / 10,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "step_seconds": 0.25,
        "tokens": 128 * step,
        "peak_bytes": 300_000_000 + step,
    }
    return {**row, **changes}


def write_checkpoint(storage: Storage, claimed: ClaimedJob, step: int) -> tuple[str, list[dict[str, Any]]]:
    """A checkpoint folder as a trainer leaves it: its relative path and its files' records."""
    path = f"{claimed.checkpoints_dir}/step-{step:08d}"
    storage.path(path).mkdir(parents=True)
    records = []
    for name in ("config.json", "model.safetensors"):
        content = f"{name} of step {step} ".encode() * 500
        storage.path(f"{path}/{name}").write_bytes(content)
        records.append({"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return path, records


def add_checkpoint(
    session: Session, storage: Storage, claimed: ClaimedJob, step: int, validation_loss: float | None = None
) -> list[str]:
    path, files = write_checkpoint(storage, claimed, step)
    return checkpoints.register(
        session, claimed.id, claimed.attempt, step, files=files, path=path, validation_loss=validation_loss
    )
