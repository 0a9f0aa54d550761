"""Where an answer leads: OpenAPI links from what makes or shows a thing to the routes that take its id."""

from __future__ import annotations

from typing import Any

MAKERS = {
    "dataset_id": ("post", "/datasets", "$response.body#/id"),
    "tokenizer_id": ("post", "/tokenizers", "$response.body#/id"),
    "model_id": ("post", "/models", "$response.body#/id"),
    "job_id": ("post", "/jobs", "$response.body#/id"),
}
"""Path parameters, and the route whose answer has a value for each."""


def add_links(document: dict[str, Any]) -> None:
    """From each maker to every route with its parameter."""
    paths = document["paths"]
    for parameter, (method, path, expression) in MAKERS.items():
        operation = paths.get(path, {}).get(method)
        if operation is None:
            continue
        made = next(response for status, response in operation["responses"].items() if status.startswith("2"))
        links = made.setdefault("links", {})
        for name, target in _operations_with(paths, parameter):
            links[name] = {"operationId": target["operationId"], "parameters": {parameter: expression}}


def _operations_with(paths: dict[str, Any], parameter: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path, operations in paths.items():
        if f"{{{parameter}}}" in path:
            found += [(operation["operationId"], operation) for operation in operations.values()]
    return found
