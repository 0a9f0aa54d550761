"""An example of each answer in OpenAI's shapes, by the name of its schema."""

from __future__ import annotations

from typing import Any

from api.response_examples import JOB, PLAN

FILE: dict[str, Any] = {
    "id": "ds_01936f0e4b7a7c3f8d21c5a0b9e4f617",
    "object": "file",
    "bytes": 137172,
    "created_at": 1795497012,
    "expires_at": None,
    "filename": "train.jsonl.gz",
    "purpose": "fine-tune",
    "status": "processed",
    "status_details": None,
}

UPLOAD: dict[str, Any] = {
    "id": "upload_01936f0e4a2b7d90a1f3c5b7e9d1f304",
    "object": "upload",
    "bytes": 137172,
    "created_at": 1795496990,
    "expires_at": 1795500590,
    "filename": "train.jsonl.gz",
    "purpose": "fine-tune",
    "status": "completed",
    "file": FILE,
}

PART: dict[str, Any] = {
    "id": "part_01936f0e4a9c71e2b4d6f8a0c2e4f607",
    "object": "upload.part",
    "created_at": 1795496995,
    "upload_id": "upload_01936f0e4a2b7d90a1f3c5b7e9d1f304",
}

HYPERPARAMETERS: dict[str, Any] = {"n_epochs": "auto", "batch_size": 1, "learning_rate_multiplier": 1.0}

FINE_TUNING_JOB: dict[str, Any] = {
    "id": JOB["id"],
    "object": "fine_tuning.job",
    "created_at": 1795497012,
    "error": None,
    "fine_tuned_model": JOB["output_model"],
    "finished_at": 1795497062,
    "estimated_finish": None,
    "hyperparameters": HYPERPARAMETERS,
    "method": {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},
    "model": JOB["model"],
    "organization_id": "default",
    "result_files": [
        "result_01936f0e61b27c1f9f4d0a7be4c2d318_metrics",
        "result_01936f0e61b27c1f9f4d0a7be4c2d318_20_0",
        "result_01936f0e61b27c1f9f4d0a7be4c2d318_20_1",
    ],
    "seed": 0,
    "status": "succeeded",
    "trained_tokens": 163840,
    "training_file": JOB["dataset"],
    "validation_file": None,
    "integrations": [],
    "metadata": JOB["metadata"],
    "suffix": JOB["name"],
    "paused": False,
    "memory_cap": JOB["memory_cap"],
    "predicted_peak_bytes": JOB["predicted_peak_bytes"],
    "measured_peak_bytes": JOB["measured_peak_bytes"],
    "plan": PLAN,
    "progress": JOB["progress"],
    "sequence_length": JOB["sequence_length"],
    "steps": JOB["steps"],
    "training_method": JOB["method"],
}

EVENT: dict[str, Any] = {
    "id": "event_6",
    "object": "fine_tuning.job.event",
    "created_at": 1795497014,
    "level": "info",
    "message": "Checkpoint at step 10",
    "type": "message",
    "data": {"step": 10, "validation_loss": 4.5884, "event": "checkpoint", "attempt": 1},
}

CHECKPOINT: dict[str, Any] = {
    "id": "ckpt_01936f0e61b27c1f9f4d0a7be4c2d318_20",
    "object": "fine_tuning.job.checkpoint",
    "created_at": 1795497062,
    "fine_tuning_job_id": JOB["id"],
    "fine_tuned_model_checkpoint": JOB["output_model"],
    "step_number": 20,
    "metrics": {"step": 20, "train_loss": 3.6956, "valid_loss": 3.6423},
    "files": FINE_TUNING_JOB["result_files"][1:],
}

MODEL: dict[str, Any] = {
    "id": JOB["output_model"],
    "object": "model",
    "created": 1795497062,
    "owned_by": "default",
    "name": "pydoc",
    "kind": "output",
    "status": "ready",
}

OPENAI_EXAMPLES: dict[str, dict[str, Any]] = {
    "FileObject": FILE,
    "UploadObject": UPLOAD,
    "PartObject": PART,
    "FineTuningJob": FINE_TUNING_JOB,
    "JobEventObject": EVENT,
    "JobCheckpointObject": CHECKPOINT,
    "ModelObject": MODEL,
    "Deleted": {"id": FILE["id"], "object": "file", "deleted": True},
}
