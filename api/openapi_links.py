"""Where an answer leads: OpenAPI links from what makes or shows a thing to the routes that take its id."""

from __future__ import annotations

from typing import Any

MAKERS = (
    ("dataset_id", "/datasets", "/datasets"),
    ("tokenizer_id", "/tokenizers", "/tokenizers"),
    ("model_id", "/models", "/models"),
    ("model_id", "/models", "/v1/models"),
    ("job_id", "/jobs", "/jobs"),
    ("webhook_id", "/webhooks", "/webhooks"),
    ("file_id", "/v1/files", "/v1/files"),
    ("upload_id", "/v1/uploads", "/v1/uploads"),
    ("job_id", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs"),
)
"""A path parameter, the path whose POST answers with a value for it as `id`, and where the routes lie that take it."""
LATER = frozenset({"/jobs/{job_id}/generate", "/v1/uploads/{upload_id}/complete"})
"""Routes that need more than what was just made: a new job has no checkpoint, a new upload no part."""


def add_links(document: dict[str, Any]) -> None:
    """From each maker to its routes with this parameter alone."""
    paths = document["paths"]
    for parameter, maker, below in MAKERS:
        responses = paths[maker]["post"]["responses"]
        made = next(response for status, response in responses.items() if status.startswith("2"))
        links = made.setdefault("links", {})
        for name in _operations_with(paths, parameter, below):
            links[name] = {"operationId": name, "parameters": {parameter: "$response.body#/id"}}


def _operations_with(paths: dict[str, Any], parameter: str, below: str) -> list[str]:
    return [
        operation["operationId"]
        for path, operations in paths.items()
        if path.startswith(f"{below}/{{{parameter}}}") and path.count("{") == 1 and path not in LATER
        for operation in operations.values()
    ]
