"""What can go wrong, as classes: an HTTP status, a stable code, and fields that a client can act on."""

from __future__ import annotations

from typing import Any, ClassVar


class ServiceError(Exception):
    """Base of all errors that callers of `service` should expect."""

    status: ClassVar[int] = 500
    code: str = "internal_error"
    retry_after_seconds: int | None = None
    """When the same request may be answered otherwise; None where time changes nothing."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields


MAX_PROBLEMS = 20
"""Of a file or model that an answer lists."""


def _shown(text: str) -> str:
    """At most 80 characters of a client's text, safe to print and to encode."""
    return text[:80].encode("ascii", "backslashreplace").decode("ascii")


MAX_REASON = 200
"""Characters of a reason that somebody else's program gives: it may repeat what a client sent."""


def bounded(text: str) -> str:
    """At most `MAX_REASON` characters of it."""
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."


class NotFoundError(ServiceError):
    """There is no such resource: `kind` is `job`, `dataset`, `tokenizer`, `model`, `checkpoint`, `file` or
    `webhook`."""

    status = 404

    def __init__(self, kind: str, identifier: str) -> None:
        super().__init__(f"There is no {kind} {_shown(identifier)!r}.", resource=kind)
        self.code = f"{kind}_not_found"


class JobStateConflictError(ServiceError):
    """The job's state does not allow the request."""

    status = 409
    code = "job_state_conflict"

    def __init__(self, job_id: str, action: str, state: str, desired: str) -> None:
        state_text = state if desired == "run" else f"{state}, with {desired} requested"
        super().__init__(f"Cannot {action} a job that is {state_text}.", job=job_id, job_status=state)


class IdempotencyKeyInFlightError(ServiceError):
    """A request with the same key is being worked on; what it will be answered is not known yet."""

    status = 409
    code = "idempotency_key_in_flight"
    param = "Idempotency-Key"
    retry_after_seconds = 1

    def __init__(self) -> None:
        super().__init__("A request with this Idempotency-Key is being worked on. Send the same again in a second.")


class IdempotencyKeyReusedError(ServiceError):
    """The key came with another request before."""

    status = 422
    code = "idempotency_key_reused"
    param = "Idempotency-Key"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key came with another request before. A new request needs a new key.")


class FencedError(ServiceError):
    """A run wrote about a job that it no longer holds: another attempt has begun, or the job is not running."""

    status = 409
    code = "fenced"

    def __init__(self, job_id: str, attempt: int) -> None:
        super().__init__(f"Attempt {attempt} no longer holds {job_id}.", job=job_id, attempt=attempt)


class DatasetInvalidError(ServiceError):
    """The file's content is not what its format says; `problems` are the first 20."""

    status = 422
    code = "dataset_invalid"

    def __init__(self, message: str, problems: list[dict[str, Any]], total: int) -> None:
        super().__init__(message, problems=problems, total_problems=total)


class DatasetFormatError(ServiceError):
    """The file's name has none of the endings that are read."""

    status = 422
    code = "dataset_format_unsupported"

    def __init__(self) -> None:
        super().__init__(
            "The file's name must end in .txt, .jsonl or .parquet, after which .gz or .zst may follow.",
            formats=["txt", "jsonl", "parquet"],
            compressions=["gz", "zst"],
            hint="rename the file, or convert it",
        )


class ModelInvalidError(ServiceError):
    """The files are not a model that can be trained; `problems` are the first 20, by file or tensor."""

    status = 422
    code = "model_invalid"
    param = "file"

    def __init__(self, problems: list[dict[str, str]], **fields: Any) -> None:
        problems = [{name: bounded(text) for name, text in problem.items()} for problem in problems]
        first = problems[0]
        where = " ".join(filter(None, (first.get("file"), first.get("tensor"))))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(
            f"{_shown(where)}: {first['reason']}{more}; nothing was stored." if where else f"{first['reason']}{more}",
            problems=problems[:MAX_PROBLEMS],
            total_problems=len(problems),
            **fields,
        )


class ModelNotReadyError(ServiceError):
    """The model is still converted, or its conversion has failed."""

    status = 409
    code = "model_not_ready"
    param = "model"

    def __init__(self, model_id: str, status: str, error: dict[str, Any] | None) -> None:
        if status == "failed" and error is not None:
            message, hint = f"{model_id} cannot be used: {bounded(error['message'])}", error["hint"]
        else:
            message, hint = (
                f"{model_id} is being converted.",
                "ask again in some seconds, or watch it at GET /models/{id}",
            )
        super().__init__(message, model=model_id, model_status=status, reason=error, hint=hint)


class DatasetTooSmallError(ServiceError):
    """Fewer tokens than one training window needs."""

    status = 422
    code = "dataset_too_small"

    def __init__(self, field: str, dataset_id: str, tokens: int, sequence_length: int) -> None:
        super().__init__(
            f"{field} has {tokens} tokens; sequence_length {sequence_length} needs at least {sequence_length + 1}.",
            hint="shorten sequence_length, or upload more text",
            field=field,
            dataset=dataset_id,
            tokens=tokens,
            required_tokens=sequence_length + 1,
            max_sequence_length=max(tokens - 1, 0),
        )


class MemoryCapExceedsDeviceError(ServiceError):
    """No device that has announced itself could hold a job with this cap, even alone."""

    status = 422
    code = "memory_cap_exceeds_device"
    param = "memory_cap"

    def __init__(self, memory_cap_bytes: int, largest_device_bytes: int) -> None:
        super().__init__(
            f"memory_cap is {memory_cap_bytes} bytes; the largest device has {largest_device_bytes} for jobs.",
            memory_cap_bytes=memory_cap_bytes,
            largest_device_bytes=largest_device_bytes,
        )


class UploadTooLargeError(ServiceError):
    """The upload passed the limit; what had arrived is gone again."""

    status = 413
    code = "upload_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The file is larger than {limit_bytes} bytes.", max_upload_bytes=limit_bytes)


class UploadExpandsTooFarError(ServiceError):
    """A compressed upload stands for more than the limit; what had arrived is gone again."""

    status = 413
    code = "upload_expands_too_far"

    def __init__(self, limit_bytes: int, max_ratio: int | None = None) -> None:
        """With `max_ratio` it is the ratio that is too large, at some point of the file."""
        if max_ratio is None:
            super().__init__(
                f"The file expands to more than {limit_bytes} bytes.",
                max_expanded_bytes=limit_bytes,
                hint="split the file, or have SLIMTUNE_MAX_EXPANDED_BYTES raised",
            )
        else:
            super().__init__(
                f"A beginning of the file expands to more than {max_ratio} times its size.",
                max_ratio=max_ratio,
                hint="send it without compression, split if need be",
            )


class DatasetInUseError(ServiceError):
    """Jobs that are not finished read this dataset, or a tokenizer is trained on it."""

    status = 409
    code = "dataset_in_use"

    def __init__(self, dataset_id: str, jobs: list[str], tokenizers: list[str]) -> None:
        users = "jobs that are not finished" if jobs else "a tokenizer that is being trained"
        super().__init__(
            f"The dataset is used by {users}.",
            dataset=dataset_id,
            jobs=jobs,
            tokenizers=tokenizers,
            hint="wait for what uses it, or cancel it",
        )


class DatasetNotTokenizedError(ServiceError):
    """The answer depends on the dataset's tokens under this tokenizer, which are being counted."""

    status = 409
    code = "dataset_not_tokenized"
    retry_after_seconds = 5

    def __init__(self, field: str, dataset_id: str, tokenizer: str, status: str) -> None:
        super().__init__(
            f"The tokens of {field} under {tokenizer} are not counted yet.",
            field=field,
            dataset=dataset_id,
            tokenizer=tokenizer,
            tokenization_status=status,
            hint="it is being prepared: ask again in some seconds, watch it at GET /datasets/{id}, "
            "or give steps in place of epochs",
        )


class DatasetUnusableError(ServiceError):
    """The dataset could not be tokenised; `error` is why."""

    status = 422
    code = "dataset_unusable"

    def __init__(self, field: str, dataset_id: str, tokenizer: str, error: dict[str, Any]) -> None:
        super().__init__(
            f"{field} cannot be trained on with {tokenizer}: {bounded(error['message'])}",
            field=field,
            dataset=dataset_id,
            tokenizer=tokenizer,
            reason=error,
            hint=error["hint"],
        )


class TokenizerInvalidError(ServiceError):
    """The file is no tokenizer.json of the tokenizers library."""

    status = 422
    code = "tokenizer_invalid"

    def __init__(self, reason: str) -> None:
        reason = bounded(reason)
        super().__init__(
            f"The file {reason}; nothing was stored.",
            reason=reason,
            hint="send the tokenizer.json that the tokenizers library writes (Tokenizer.save)",
        )


class TokenizerNotReadyError(ServiceError):
    """The tokenizer is being checked or trained."""

    status = 409
    code = "tokenizer_not_ready"
    retry_after_seconds = 5

    def __init__(self, tokenizer_id: str) -> None:
        super().__init__(
            f"{tokenizer_id} is being prepared.",
            tokenizer=tokenizer_id,
            hint="ask again in some seconds, or watch it at GET /tokenizers/{id}",
        )


class TokenizerFailedError(ServiceError):
    """The tokenizer cannot be used; `error` is why."""

    status = 422
    code = "tokenizer_failed"

    def __init__(self, tokenizer_id: str, error: dict[str, Any]) -> None:
        super().__init__(
            f"{tokenizer_id} cannot be used: {bounded(error['message'])}",
            tokenizer=tokenizer_id,
            reason=error,
            hint=error["hint"],
        )


class TokenizerInUseError(ServiceError):
    """Jobs that are not finished, or datasets that are being prepared, need this tokenizer."""

    status = 409
    code = "tokenizer_in_use"

    def __init__(self, tokenizer_id: str, jobs: list[str], datasets: list[str]) -> None:
        users = "jobs that are not finished" if jobs else "datasets that are being prepared"
        super().__init__(
            f"The tokenizer is used by {users}.",
            tokenizer=tokenizer_id,
            jobs=jobs,
            datasets=datasets,
            hint="wait for what uses it, or cancel it",
        )


class ModelInUseError(ServiceError):
    """Jobs that are not finished start from this model, or datasets are being tokenised with its tokenizer."""

    status = 409
    code = "model_in_use"

    def __init__(self, model_id: str, jobs: list[str], datasets: list[str]) -> None:
        users = "jobs that are not finished" if jobs else "datasets that are being prepared"
        super().__init__(
            f"The model is used by {users}.",
            model=model_id,
            jobs=jobs,
            datasets=datasets,
            hint="wait for what uses it, or cancel it",
        )


class BuiltinModelError(ServiceError):
    """A built-in architecture cannot be deleted."""

    status = 409
    code = "model_built_in"

    def __init__(self, name: str) -> None:
        super().__init__("A built-in model cannot be deleted.", model=name)


class StorageFullError(ServiceError):
    """No space left on the device of the data folder."""

    status = 507
    code = "disk_full"

    def __init__(self) -> None:
        super().__init__("There is no space left to store the file.")


class StorageQuotaExceededError(ServiceError):
    """The tenant holds as many bytes as the key allows."""

    status = 413
    code = "storage_quota_exceeded"

    def __init__(self, in_use_bytes: int, added_bytes: int, limit_bytes: int) -> None:
        more = f", and this is {added_bytes} more" if added_bytes else ""
        super().__init__(
            f"{in_use_bytes} of {limit_bytes} bytes are in use{more}. Delete datasets, tokenizers or models; a model "
            "that a job made is its last checkpoint.",
            bytes_in_use=in_use_bytes,
            added_bytes=added_bytes,
            max_bytes=limit_bytes,
        )


class TooManyJobsError(ServiceError):
    """The tenant has as many unfinished jobs as the key allows."""

    status = 429
    code = "too_many_jobs"

    def __init__(self, jobs: int, limit: int) -> None:
        super().__init__(
            f"{jobs} jobs are queued, running or paused; this key allows {limit}. Wait until one ends, or cancel one.",
            unfinished_jobs=jobs,
            max_jobs=limit,
        )


class PreparationFencedError(ServiceError):
    """A preparer wrote about something that it no longer holds: its lease ran out, or the thing was deleted."""

    status = 409
    code = "preparation_fenced"

    def __init__(self, what: str, attempt: int) -> None:
        super().__init__(f"Attempt {attempt} no longer holds {what}.", what=what, attempt=attempt)


class CheckpointDamagedError(ServiceError):
    """A file is not what its row says; serving it would hand out broken weights."""

    status = 500
    code = "checkpoint_damaged"

    def __init__(self, name: str) -> None:
        super().__init__("The file on disk is not the one that was registered.", file=name)


class NoCheckpointError(ServiceError):
    """The job is over and has not left a checkpoint."""

    status = 409
    code = "no_checkpoint"

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(f"The job is {status} and has no checkpoint.", job=job_id, job_status=status)


class GenerateUnavailableError(ServiceError):
    """This installation of the API cannot start what samples."""

    status = 501
    code = "generate_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "The API runs without torch and cannot sample. Install it there (pip install 'slimtune[train]', or the "
            "worker's image), or download the checkpoint and run python -m slim_core.generate on it."
        )


class GenerateBusyError(ServiceError):
    """As many samples as are allowed at once are being made."""

    status = 429
    code = "generate_busy"
    retry_after_seconds = 5

    def __init__(self, slots: int) -> None:
        super().__init__(
            f"{slots} at once is the most (SLIMTUNE_GENERATE_SLOTS). Try again in a few seconds.", slots=slots
        )


class GenerateMemoryError(ServiceError):
    """The model does not fit into what a sampler may hold; `required_bytes` is None where it only turned out."""

    status = 422
    code = "generate_memory_exceeded"

    def __init__(self, message: str, setting: str, limit_bytes: int, required_bytes: int | None) -> None:
        super().__init__(message, setting=setting, limit_bytes=limit_bytes, required_bytes=required_bytes)


class PromptTooLongError(ServiceError):
    """More tokens, or fewer, than a prompt may have."""

    status = 422
    code = "prompt_too_long"
    param = "prompt"

    def __init__(self, message: str, prompt_tokens: int, max_prompt_tokens: int) -> None:
        super().__init__(message, prompt_tokens=prompt_tokens, max_prompt_tokens=max_prompt_tokens)


class ChatTemplateRefusedError(ServiceError):
    """The model's chat template does not take these messages."""

    status = 422
    code = "chat_template_refused"
    param = "messages"


class GenerateTimeoutError(ServiceError):
    """The time was over before the model was loaded."""

    status = 503
    code = "generate_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The model was not loaded after {seconds:g} seconds (SLIMTUNE_GENERATE_SECONDS).")


class GenerateFailedError(ServiceError):
    """The process that samples ended otherwise than it should."""

    status = 500
    code = "generate_failed"


class TooManyStreamsError(ServiceError):
    """The process has as many streams of events as it may."""

    status = 429
    code = "too_many_streams"
    retry_after_seconds = 5

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} streams of events are open, which is the most.", limit=limit)


class WebhooksOffError(ServiceError):
    """The operator allows no address."""

    status = 403
    code = "webhooks_off"

    def __init__(self) -> None:
        super().__init__("This service sends no webhooks; its operator can allow addresses (SLIMTUNE_WEBHOOK_ALLOWED).")


class WebhookUrlInvalidError(ServiceError):
    """The URL is not one that can be compared with what is allowed."""

    status = 422
    code = "webhook_url_invalid"
    param = "url"

    def __init__(self, reason: str) -> None:
        super().__init__(f"url {reason}.", reason=reason)


class WebhookUrlNotAllowedError(ServiceError):
    """The operator does not allow this address."""

    status = 403
    code = "webhook_url_not_allowed"
    param = "url"

    def __init__(self) -> None:
        super().__init__("Webhooks may not be sent to this address. Ask the operator which ones are allowed.")


class TooManyWebhooksError(ServiceError):
    """The tenant has as many webhooks as it may."""

    status = 409
    code = "too_many_webhooks"

    def __init__(self, limit: int) -> None:
        super().__init__(f"There are {limit} webhooks, which is the most. Delete one first.", limit=limit)


class WebhookDisabledError(ServiceError):
    """Nothing is sent to the webhook any more."""

    status = 409
    code = "webhook_disabled"

    def __init__(self, webhook_id: str, reason: str | None) -> None:
        super().__init__(f"{webhook_id} is disabled. POST /webhooks/{webhook_id}/enable first.", reason=reason)


class UploadStateError(ServiceError):
    """The upload in parts is closed."""

    status = 409
    code = "upload_state_conflict"

    def __init__(self, upload_id: str, action: str, state: str) -> None:
        super().__init__(f"Cannot {action} an upload that is {state}.", upload=upload_id, upload_status=state)


class UploadBusyError(ServiceError):
    """Another request is putting the parts together."""

    status = 409
    code = "upload_being_completed"
    retry_after_seconds = 2

    def __init__(self, upload_id: str) -> None:
        super().__init__("The parts are being put together. Ask again in some seconds.", upload=upload_id)


class UploadsOpenError(ServiceError):
    """As many uploads in parts are open as may be."""

    status = 429
    code = "too_many_uploads"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit} uploads are open, which is the most.",
            max_open_uploads=limit,
            hint="complete or cancel one; each expires an hour after it was created",
        )


class UploadMismatchError(ServiceError):
    """The parts are not the file that was announced."""

    status = 422
    code = "upload_mismatch"

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(f"{message} No file was made of them.", **fields)


class ResultFileError(ServiceError):
    """Result files are what the job left: they have no life of their own."""

    status = 409
    code = "file_is_a_result"

    def __init__(self, file_id: str) -> None:
        super().__init__(
            "A result file cannot be deleted by itself.",
            file=file_id,
            hint="delete the job's fine_tuned_model, which the weights belong to",
        )
