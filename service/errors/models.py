"""Errors of base models."""

from __future__ import annotations

from typing import Any

from service.errors.base import MAX_PROBLEMS, ServiceError, bounded, shown


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
            f"{shown(where)}: {first['reason']}{more}; nothing was stored." if where else f"{first['reason']}{more}",
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
