"""An OpenAPI document as a reader goes through it: sections of operations, each with its fields, answers and errors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from api.reference.schemas import REFERENCE, Field, Group, fields_of, groups_of, parameter_of

ORDER = ("datasets", "tokenizers", "models", "plans", "jobs", "checkpoints", "devices", "webhooks", "health", "openai")
"""Of the sections, in which a first job would meet them; tags that are not here come after."""
TITLES = {"openai": "OpenAI's shape, under /v1", "health": "Health and numbers"}


@dataclass(frozen=True, slots=True)
class Example:
    title: str
    text: str
    """JSON, indented."""


@dataclass(frozen=True, slots=True)
class Content:
    """A body, of a request or an answer."""

    media_type: str
    schema: str
    """Its name in the document; empty without one."""
    groups: tuple[Group, ...]
    examples: tuple[Example, ...]
    seen: Operation | None = None
    """An earlier operation of the section whose answer has the same fields."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: str
    description: str
    headers: tuple[tuple[str, str], ...]
    contents: tuple[Content, ...]


@dataclass(frozen=True, slots=True)
class Error:
    status: str
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Operation:
    anchor: str
    method: str
    path: str
    summary: str
    description: str
    parameters: tuple[tuple[str, Field], ...]
    """Each with its place: path, query or header."""
    bodies: tuple[Content, ...]
    answers: tuple[Answer, ...]
    errors: tuple[Error, ...]
    """Its own, without those that most share."""


@dataclass(frozen=True, slots=True)
class Section:
    tag: str
    title: str
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    title: str
    version: str
    description: str
    sections: tuple[Section, ...]
    shared: tuple[Error, ...]
    """Errors of most operations, or of most that change something."""
    errors: tuple[tuple[Error, str], ...] = field(repr=False)
    """Every error by its code, with the whole answer."""


def outline(document: Mapping[str, Any]) -> Outline:
    """Raises KeyError for a document without what ours has: tags, problems with examples."""
    operations = [
        (path, method, operation) for path, found in document["paths"].items() for method, operation in found.items()
    ]
    common = _common([operation for _, method, operation in operations if method == "get"], document)
    common |= _common([operation for _, method, operation in operations if method != "get"], document)
    tagged: dict[str, list[Operation]] = {}
    shared: dict[str, Error] = {}
    for path, method, operation in operations:
        errors = list(_errors(document, operation))
        shared.update((error.code, error) for error in errors if error.code in common)
        own = tuple(error for error in errors if error.code not in common)
        tagged.setdefault(operation["tags"][0], []).append(_operation(document, path, method, operation, own))
    tags = sorted(tagged, key=lambda tag: (ORDER.index(tag) if tag in ORDER else len(ORDER), tag))
    examples = document["components"]["examples"]
    return Outline(
        title=document["info"]["title"],
        version=document["info"]["version"],
        description=document["info"]["description"],
        sections=tuple(Section(tag, TITLES.get(tag, tag.capitalize()), _told_once(tagged[tag])) for tag in tags),
        shared=tuple(sorted(shared.values(), key=lambda error: (error.status, error.code))),
        errors=tuple(
            (_error(code, examples[code]["value"]), _json(examples[code]["value"])) for code in sorted(examples)
        ),
    )


def _common(operations: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> set[str]:
    """Codes of more than half of the operations."""
    spread = Counter(error.code for operation in operations for error in _errors(document, operation))
    return {code for code, count in spread.items() if count > len(operations) / 2}


def _told_once(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The operations, where an answer that had its fields told before points there."""
    first: dict[str, Operation] = {}
    told = []
    for operation in operations:
        answers = []
        for answer in operation.answers:
            contents = [
                replace(content, groups=(), examples=(), seen=first[content.schema])
                if content.schema in first
                else content
                for content in answer.contents
            ]
            answers.append(replace(answer, contents=tuple(contents)))
            first.update((content.schema, operation) for content in contents if content.schema and not content.seen)
        told.append(replace(operation, answers=tuple(answers)))
    return tuple(told)


def _operation(
    document: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any], errors: tuple[Error, ...]
) -> Operation:
    body = operation.get("requestBody", {})
    return Operation(
        anchor=operation["operationId"].strip("_"),
        method=method.upper(),
        path=path,
        summary=operation["summary"],
        description=operation.get("description", ""),
        parameters=tuple((each["in"], parameter_of(document, each)) for each in operation.get("parameters", ())),
        bodies=tuple(_contents(document, body.get("content", {}))),
        answers=tuple(
            Answer(
                status,
                "" if response["description"] == "Successful Response" else response["description"],
                tuple((name, header.get("description", "")) for name, header in response.get("headers", {}).items()),
                tuple(_contents(document, response.get("content", {}))),
            )
            for status, response in sorted(operation["responses"].items())
            if status.startswith("2")
        ),
        errors=errors,
    )


def _contents(document: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[Content]:
    for media_type, media in content.items():
        schema = media.get("schema", {})
        examples = [
            Example(example.get("summary", name), _json(example["value"]))
            for name, example in media.get("examples", {}).items()
            if "value" in example
        ]
        if "example" in media:
            examples.append(Example("", _json(media["example"])))
        groups = groups_of(document, schema)
        if not groups and (fields := fields_of(document, schema)):
            groups = (Group("", "", fields),)
        yield Content(media_type, schema.get("$ref", "").removeprefix(REFERENCE), groups, tuple(examples))


def _errors(document: Mapping[str, Any], operation: Mapping[str, Any]) -> Iterator[Error]:
    examples = document["components"]["examples"]
    for status, response in sorted(operation["responses"].items()):
        for media in response.get("content", {}).values() if status >= "4" else ():
            yield from (_error(code, examples[code]["value"]) for code in media.get("examples", ()) if code in examples)


def _error(code: str, problem: Mapping[str, Any]) -> Error:
    return Error(str(problem["status"]), code, problem["detail"])


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
