"""Errors of an object store that files lie in."""

from __future__ import annotations

from service.errors.base import ServiceError


class StorageUnavailableError(ServiceError):
    """The object store does not answer, or not as it should. `detail` is for the log: it may name hosts."""

    status = 503
    code = "storage_unavailable"
    retry_after_seconds = 10

    def __init__(self, detail: str, message: str = "The object store that files lie in does not answer.") -> None:
        super().__init__(message)
        self.detail = detail


class StorageDeniedError(StorageUnavailableError):
    """The object store answers, and does not let us: a key, a permission or the bucket's name is wrong."""

    code = "storage_denied"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, "The object store that files lie in refuses access.")


class FilesDamagedError(Exception):
    """What an object store has under a path is not what its manifest says."""
