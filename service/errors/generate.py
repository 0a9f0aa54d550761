"""Errors of sampling."""

from __future__ import annotations

from service.errors.base import ServiceError


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
