"""An example of each problem that a route may answer, made from the error itself."""

from __future__ import annotations

import json
from typing import Any

from api.errors import (
    BodyEncodingError,
    BodyStalledError,
    BodyTooLargeError,
    CrossSiteError,
    CsrfError,
    HeadTooLargeError,
    InvalidRequestError,
    KeysRequiredError,
    MetricsTokenError,
    RateLimitedError,
    UnauthorizedError,
    UploadStalledError,
    service_problem,
)
from api.problems import problem_response
from service import errors
from service.errors import ServiceError
from service.failures import preparation_error

JOB = "job_01936f0e61b27c1f9f4d0a7be4c2d318"
DATASET = "ds_01936f0e4b7a7c3f8d21c5a0b9e4f617"
TOKENIZER = "tok_01936f0e57c87a90b3e2d1f60c4a9b85"
MODEL = "model_01936f0e5c1d7e11a4b3f0c2d8e96a05"
WEBHOOK = "wh_01936f0e7a1c7b2d8e3f4a5b6c7d8e9f"
UPLOAD = "upload_01936f0e4a2b7d90a1f3c5b7e9d1f304"
PART = "part_01936f0e4a9c71e2b4d6f8a0c2e4f607"
SCOPE = {"path": "", "state": {"request_id": "req_01936f0e6a9e7d52b6c8e1f3a7d4095b"}}

_FAILED = preparation_error("preparation_crashed", "The process ended with status 1.")

ERRORS: tuple[ServiceError, ...] = (
    *(errors.NotFoundError(kind, name) for kind, name in (
        ("job", JOB), ("dataset", DATASET), ("tokenizer", TOKENIZER), ("model", MODEL), ("checkpoint", "best"),
        ("file", "model.safetensors"), ("webhook", WEBHOOK), ("upload", UPLOAD), ("part", PART),
    )),
    UnauthorizedError(),
    KeysRequiredError("this request came through a proxy, which may serve others"),
    CrossSiteError(),
    CsrfError(),
    RateLimitedError("This API key allows 600 requests a minute.", 12),
    HeadTooLargeError(65_536),
    MetricsTokenError(),
    BodyEncodingError(),
    BodyStalledError(60),
    BodyTooLargeError(1_000_000),
    UploadStalledError(60),
    InvalidRequestError(("steps", "Input should be greater than or equal to 1")),
    errors.JobStateConflictError(JOB, "resume", "succeeded", "run"),
    errors.IdempotencyKeyInFlightError(),
    errors.IdempotencyKeyReusedError(),
    errors.DatasetInvalidError("Line 3 is not valid.", [{"line": 3, "reason": "is not JSON"}], 1),
    errors.DatasetFormatError(),
    errors.ModelInvalidError([{"file": "model.safetensors", "reason": "is missing"}]),
    errors.ModelNotReadyError(MODEL, "preparing", None),
    errors.DatasetTooSmallError("dataset", DATASET, 2_048, 4_096),
    errors.MemoryCapExceedsDeviceError(68_719_476_736, 20_600_000_000),
    errors.UploadTooLargeError(2_147_483_648),
    errors.UploadExpandsTooFarError(68_719_476_736),
    errors.UploadTakesTooLongError(1_800),
    errors.DatasetInUseError(DATASET, [JOB], []),
    errors.DatasetNotTokenizedError("dataset", DATASET, TOKENIZER, "pending"),
    errors.DatasetUnusableError("dataset", DATASET, TOKENIZER, _FAILED),
    errors.TokenizerInvalidError("is not JSON"),
    errors.TokenizerNotReadyError(TOKENIZER),
    errors.TokenizerFailedError(TOKENIZER, _FAILED),
    errors.TokenizerInUseError(TOKENIZER, [JOB], []),
    errors.ModelInUseError(MODEL, [JOB], []),
    errors.BuiltinModelError("performer-tiny"),
    errors.StorageFullError(),
    errors.StorageUnavailableError("no answer"),
    errors.StorageDeniedError("no access"),
    errors.CheckpointDamagedError("model.safetensors"),
    errors.NoCheckpointError(JOB, "failed"),
    errors.JobUnfinishedError(JOB, "running"),
    errors.CheckpointInUseError(JOB, 200, MODEL),
    errors.GenerateUnavailableError(),
    errors.GenerateBusyError(1),
    errors.GenerateMemoryError(
        "The model needs 5 GiB, a sample may hold 4 GiB.", "SLIMTUNE_GENERATE_MEMORY_BYTES", 4 << 30, 5 << 30
    ),
    errors.PromptTooLongError("The prompt has 5,000 tokens; 4,096 are the most.", 5_000, 4_096),
    errors.ChatTemplateRefusedError("The chat template refused the messages."),
    errors.GenerateTimeoutError(60),
    errors.GenerateFailedError("The process that samples ended with status 1."),
    errors.StorageQuotaExceededError(10_600_000_000, 137_172, 10_600_000_000),
    errors.TooManyJobsError(8, 8),
    errors.TooManyStreamsError(256),
    errors.WebhooksOffError(),
    errors.WebhookUrlInvalidError("must be http or https with a host, without a user, and a port, if any, in digits"),
    errors.WebhookUrlNotAllowedError(),
    errors.TooManyWebhooksError(20),
    errors.WebhookDisabledError(WEBHOOK, "failing"),
    errors.UploadStateError(UPLOAD, "add a part to", "completed"),
    errors.UploadBusyError(UPLOAD),
    errors.UploadPartsGoneError(UPLOAD),
    errors.UploadInterruptedError(UPLOAD),
    errors.CompletionsBusyError(),
    errors.UploadsOpenError(16),
    errors.UploadMismatchError(
        "The parts hold 137000 bytes; 137172 were announced.", announced_bytes=137_172, received_bytes=137_000
    ),
    errors.ResultFileError("result_01936f0e61b27c1f9f4d0a7be4c2d318_metrics"),
)  # fmt: skip
"""One of each class that a client may meet; of some classes one for each code."""

OTHERS: tuple[tuple[int, str, str, dict[str, Any], str | None], ...] = (
    (400, "range_malformed", "The Range header cannot be read.", {}, None),
    (404, "not_found", "There is nothing at this path.", {}, None),
    (405, "method_not_allowed", "This path does not answer to this method.", {}, None),
    (416, "range_not_satisfiable", "The range lies outside the file of 10281472 bytes.", {}, None),
    (
        422,
        "memory_cap_infeasible",
        "No schedule fits 270 MiB: the smallest needs 371 MiB.",
        {
            "memory_cap_bytes": 283_115_520,
            "minimum_cap_bytes": 389_376_514,
            "max_sequence_length": 394,
            "suggestions": ["raise memory_cap to 389376514 bytes (371 MiB) or more"],
        },
        "memory_cap",
    ),
    (500, "internal_error", "Something went wrong on the server's side.", {}, None),
    (503, "database_unavailable", "The database cannot be reached; try again.", {}, None),
)
"""Problems that are no ServiceError: status, code, detail, further members, the parameter that they are about."""


def examples() -> dict[str, dict[str, Any]]:
    """The body of each problem, by its code."""
    answers = [service_problem(SCOPE, error, log=False) for error in ERRORS]
    answers += [
        problem_response(SCOPE, status, code, detail, fields=fields, param=param)
        for status, code, detail, fields, param in OTHERS
    ]
    bodies = [json.loads(bytes(answer.body)) for answer in answers]
    return {body["code"]: body for body in bodies}
