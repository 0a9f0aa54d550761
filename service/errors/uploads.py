"""Errors of what is sent and stored: its size, its room, its parts."""

from __future__ import annotations

from typing import Any

from service.errors.base import ServiceError


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


class UploadTakesTooLongError(ServiceError):
    """To read the upload takes more time than it may; what had arrived is gone again."""

    status = 413
    code = "upload_takes_too_long"

    def __init__(self, limit_seconds: float) -> None:
        super().__init__(
            f"To read the file takes a processor more than {limit_seconds:g} seconds.",
            max_read_seconds=limit_seconds,
            hint="split the file, or have SLIMTUNE_READ_SECONDS raised",
        )


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
            f"{in_use_bytes} of {limit_bytes} bytes are in use{more}. Delete datasets, tokenizers or models, or "
            "cancel uploads; a model that a job made is its last checkpoint.",
            bytes_in_use=in_use_bytes,
            added_bytes=added_bytes,
            max_bytes=limit_bytes,
        )


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


class UploadInterruptedError(ServiceError):
    """The server stops, and with it the work on the parts."""

    status = 503
    code = "upload_interrupted"
    retry_after_seconds = 10

    def __init__(self, upload_id: str) -> None:
        super().__init__("The server is stopping; the upload is as it was. Ask again.", upload=upload_id)


class UploadPartsGoneError(ServiceError):
    """The files of parts are not there any more."""

    status = 409
    code = "upload_parts_gone"

    def __init__(self, upload_id: str) -> None:
        super().__init__(
            "Parts of the upload are not stored any more.", upload=upload_id, hint="cancel it, and send the file anew"
        )


class CompletionsBusyError(ServiceError):
    """The tenant's place for putting parts together is taken."""

    status = 429
    code = "too_many_completions"
    retry_after_seconds = 10

    def __init__(self) -> None:
        super().__init__("Another upload is being completed; one at a time is. Ask again in some seconds.")


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
