"""Errors of datasets and tokenizers."""

from __future__ import annotations

from typing import Any

from service.errors.base import ServiceError, bounded


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


class PreparationFencedError(ServiceError):
    """A preparer wrote about something that it no longer holds: its lease ran out, or the thing was deleted."""

    status = 409
    code = "preparation_fenced"

    def __init__(self, what: str, attempt: int) -> None:
        super().__init__(f"Attempt {attempt} no longer holds {what}.", what=what, attempt=attempt)
