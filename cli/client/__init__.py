"""The Python client: `from cli.client import Client` (docs/python.md)."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from cli.client.answers import (
    Checkpoint,
    Dataset,
    Device,
    Event,
    FileRecord,
    JobData,
    JobFailure,
    Metric,
    Model,
    Plan,
    Progress,
    Release,
    Sample,
    Tokenization,
    Tokenizer,
)
from cli.client.connection import Connection
from cli.client.errors import (
    AuthenticationError,
    ConflictError,
    DamagedDownloadError,
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    JobPausedError,
    JobStoppedError,
    MemoryCapExceedsDeviceError,
    MemoryCapInfeasibleError,
    NotFoundError,
    PermissionDeniedError,
    PreparationFailedError,
    RateLimitedError,
    ServiceError,
    UnavailableError,
    WaitTimeoutError,
)
from cli.client.jobs import Job, Jobs
from cli.client.resources import Datasets, Devices, Models, Plans, Tokenizers

__all__ = [
    "AuthenticationError",
    "Checkpoint",
    "Client",
    "ConflictError",
    "DamagedDownloadError",
    "Dataset",
    "Device",
    "Event",
    "FileRecord",
    "InvalidRequestError",
    "Job",
    "JobCancelledError",
    "JobData",
    "JobFailedError",
    "JobFailure",
    "JobPausedError",
    "JobStoppedError",
    "MemoryCapExceedsDeviceError",
    "MemoryCapInfeasibleError",
    "Metric",
    "Model",
    "NotFoundError",
    "PermissionDeniedError",
    "Plan",
    "PreparationFailedError",
    "Progress",
    "RateLimitedError",
    "Release",
    "Sample",
    "ServiceError",
    "Tokenization",
    "Tokenizer",
    "UnavailableError",
    "WaitTimeoutError",
]

URL = "http://127.0.0.1:8000"


class Client:
    """The service at `url`; without one that of SLIMTUNE_URL, or the local one. A context manager.

    Without an `api_key` that of SLIMTUNE_API_KEY is sent, if there is one. `timeout_seconds` is for each step of a
    request: to connect, to send, to hear something. `retries` are those of requests that were not answered.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 30.0,
        retries: int = 3,
    ) -> None:
        key = api_key or os.environ.get("SLIMTUNE_API_KEY")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._connection = Connection(url or os.environ.get("SLIMTUNE_URL") or URL, headers, timeout_seconds, retries)
        self.jobs = Jobs(self._connection)
        self.plans = Plans(self._connection)
        self.datasets = Datasets(self._connection)
        self.tokenizers = Tokenizers(self._connection)
        self.models = Models(self._connection)
        self.devices = Devices(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def version(self) -> Release:
        """Of the service, of its API, and of its database's schema. Raises ServiceError."""
        found: Release = self._connection.get("/version")
        return found

    def missing(self) -> list[str]:
        """What is missing for a job to run now: `api`, or any of the checks of /readyz: `database`, `schema`, `broker`,
        `worker`, `storage`. Raises nothing."""
        status, answer = self._connection.try_get("/readyz")
        if status not in (200, 503) or not isinstance(answer, dict) or "checks" not in answer:
            return ["api"]
        return [name for name, there in answer["checks"].items() if not there]
