"""The document of the API: FastAPI's, with our problem details, the errors that every route has, examples and links."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.access import OPEN_PATHS
from api.openai.response_examples import OPENAI_EXAMPLES
from api.openapi_links import add_links
from api.problem_examples import examples
from api.problems import Problem, document_problem
from api.response_examples import RESPONSE_EXAMPLES

WITH_BODY = ("post", "put", "patch", "delete")
"""Methods whose body is read, wanted or not."""
ALWAYS = (431, 500)
CLOSED = (401, 403, 429)
OF_BODIES = (408, 413)
KEY_SCHEME = {"type": "http", "scheme": "bearer", "description": "An API key, `slim_` and 43 characters."}
REFERENCE = "#/components/schemas/"
EXAMPLES = {**RESPONSE_EXAMPLES, **OPENAI_EXAMPLES}


def document(app: FastAPI, keys_required: bool) -> dict[str, Any]:
    """Made once. With `keys_required` every operation but those of `OPEN_PATHS` wants a key."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = made["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        problem = Problem.model_json_schema(ref_template=REFERENCE + "{model}")
        schemas.update(problem.pop("$defs"))
        schemas["Problem"] = problem
        made["components"]["securitySchemes"] = {"key": KEY_SCHEME}
        made["components"]["examples"] = {code: {"value": value} for code, value in examples().items()}
        for path, operations in made["paths"].items():
            for method, operation in operations.items():
                _complete(method, path, operation)
                if keys_required and path not in OPEN_PATHS:
                    operation["security"] = [{"key": []}]
                for response in operation["responses"].values():
                    _exemplify(response)
        add_links(made)
        app.openapi_schema = made
    return app.openapi_schema


def _complete(method: str, path: str, operation: dict[str, Any]) -> None:
    """Put in the errors that any route may answer."""
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]  # a path of free text: what fits nothing is a 404
    common = [*ALWAYS, *(OF_BODIES if method in WITH_BODY else ()), *(() if path == "/healthz" else (503,))]
    if path not in OPEN_PATHS:
        common += CLOSED
    for status in common:
        if "application/json" in responses.get(str(status), {}).get("content", {}):
            continue  # what the route itself says with this status
        document_problem(responses, str(status), status)
    if path not in OPEN_PATHS and method in WITH_BODY:
        document_problem(responses, "403", 403, "cross_site_refused")
        document_problem(responses, "403", 403, "csrf_token_missing")
    for parameter in operation.get("parameters", ()):
        _without_null(parameter)


def _without_null(parameter: dict[str, Any]) -> None:
    """Who does not give a parameter leaves it out: in paths, queries and headers there is no null."""
    schema = parameter["schema"]
    choices = [choice for choice in schema.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        del schema["anyOf"]
        schema.update(choices[0])


def _exemplify(response: dict[str, Any]) -> None:
    """Give an answer in JSON its example."""
    content = response.get("content", {}).get("application/json")
    example = None if content is None else example_of(content.get("schema", {}))
    if example is not None:
        content["example"] = example


def example_of(schema: dict[str, Any]) -> Any | None:
    """Of an answer with this schema: of a page, one entry. None if nobody has written one."""
    name = schema.get("$ref", "").removeprefix(REFERENCE)
    kind, _, of = name.partition("_")
    entry = EXAMPLES.get(of.removesuffix("_") if kind in {"Page", "ListOf"} else name)
    if entry is None or kind not in {"Page", "ListOf"}:
        return entry
    page = {"data": [entry], "has_more": False}
    return page if kind == "Page" else {"object": "list", **page, "first_id": entry["id"], "last_id": entry["id"]}
