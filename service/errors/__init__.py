"""What can go wrong, as classes: an HTTP status, a stable code, and fields that a client can act on.

The modules are by subject; others import from here.
"""

from __future__ import annotations

from service.errors.base import NotFoundError, ServiceError
from service.errors.data import (
    DatasetFormatError,
    DatasetInUseError,
    DatasetInvalidError,
    DatasetNotTokenizedError,
    DatasetTooSmallError,
    DatasetUnusableError,
    PreparationFencedError,
    TokenizerFailedError,
    TokenizerInUseError,
    TokenizerInvalidError,
    TokenizerNotReadyError,
)
from service.errors.generate import (
    ChatTemplateRefusedError,
    GenerateBusyError,
    GenerateFailedError,
    GenerateMemoryError,
    GenerateTimeoutError,
    GenerateUnavailableError,
    PromptTooLongError,
)
from service.errors.jobs import (
    CheckpointDamagedError,
    FencedError,
    IdempotencyKeyInFlightError,
    IdempotencyKeyReusedError,
    JobStateConflictError,
    MemoryCapExceedsDeviceError,
    NoCheckpointError,
    TooManyJobsError,
    TooManyStreamsError,
)
from service.errors.models import BuiltinModelError, ModelInUseError, ModelInvalidError, ModelNotReadyError
from service.errors.uploads import (
    ResultFileError,
    StorageFullError,
    StorageQuotaExceededError,
    UploadBusyError,
    UploadExpandsTooFarError,
    UploadMismatchError,
    UploadsOpenError,
    UploadStateError,
    UploadTooLargeError,
)
from service.errors.webhooks import (
    TooManyWebhooksError,
    WebhookDisabledError,
    WebhooksOffError,
    WebhookUrlInvalidError,
    WebhookUrlNotAllowedError,
)

__all__ = [
    "BuiltinModelError",
    "ChatTemplateRefusedError",
    "CheckpointDamagedError",
    "DatasetFormatError",
    "DatasetInUseError",
    "DatasetInvalidError",
    "DatasetNotTokenizedError",
    "DatasetTooSmallError",
    "DatasetUnusableError",
    "FencedError",
    "GenerateBusyError",
    "GenerateFailedError",
    "GenerateMemoryError",
    "GenerateTimeoutError",
    "GenerateUnavailableError",
    "IdempotencyKeyInFlightError",
    "IdempotencyKeyReusedError",
    "JobStateConflictError",
    "MemoryCapExceedsDeviceError",
    "ModelInUseError",
    "ModelInvalidError",
    "ModelNotReadyError",
    "NoCheckpointError",
    "NotFoundError",
    "PreparationFencedError",
    "PromptTooLongError",
    "ResultFileError",
    "ServiceError",
    "StorageFullError",
    "StorageQuotaExceededError",
    "TokenizerFailedError",
    "TokenizerInUseError",
    "TokenizerInvalidError",
    "TokenizerNotReadyError",
    "TooManyJobsError",
    "TooManyStreamsError",
    "TooManyWebhooksError",
    "UploadBusyError",
    "UploadExpandsTooFarError",
    "UploadMismatchError",
    "UploadStateError",
    "UploadTooLargeError",
    "UploadsOpenError",
    "WebhookDisabledError",
    "WebhookUrlInvalidError",
    "WebhookUrlNotAllowedError",
    "WebhooksOffError",
]
