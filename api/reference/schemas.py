"""JSON Schema, as pydantic writes it, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REFERENCE = "#/components/schemas/"
NULL = {"type": "null"}
FORMATS = {"date-time": "time", "binary": "file"}
LARGEST = 2**53 - 1
"""Limits from here on are those of JSON's readers, not of the field."""
WORDS = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "object": "object"}


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    kind: str
    """What may be there, in words."""
    required: bool
    default: str | None
    """As JSON; None if it has none, or one that its own fields tell."""
    description: str
    groups: tuple[Group, ...]
    """The fields of an object that is there, or of each of those that may be."""


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    description: str
    fields: tuple[Field, ...]


def parameter_of(document: Mapping[str, Any], parameter: Mapping[str, Any]) -> Field:
    schema = parameter["schema"]
    description = parameter.get("description", schema.get("description", ""))
    default = json.dumps(schema["default"]) if schema.get("default") is not None else None
    return Field(parameter["name"], kind_of(document, schema), parameter["required"], default, description, ())


def fields_of(
    document: Mapping[str, Any], schema: Mapping[str, Any], within: tuple[str, ...] = ()
) -> tuple[Field, ...]:
    """Of an object's schema; none of anything else's."""
    schema, within = _resolved(document, schema, within)
    required = schema.get("required", ())
    return tuple(  # what must be there comes first
        Field(
            name=name,
            kind=kind_of(document, each),
            required=name in required,
            default=json.dumps(each["default"]) if each.get("default") not in (None, {}, []) else None,
            description=each.get("description", ""),
            groups=groups_of(document, each, within),
        )
        for name, each in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required)
    )


def groups_of(
    document: Mapping[str, Any], schema: Mapping[str, Any], within: tuple[str, ...] = ()
) -> tuple[Group, ...]:
    """The objects that may be there, in a list or alone, each with its fields; an object in itself is shown once."""
    groups: list[Group] = []
    for choice in (each.get("items", each) for each in _choices(schema)):
        name = choice.get("$ref", "").removeprefix(REFERENCE)
        found, inside = _resolved(document, choice, within)
        if "oneOf" in found or "anyOf" in found:
            groups.extend(groups_of(document, found, inside))
        elif "properties" in found and name not in within:
            groups.append(Group(_title(found), _own_words(found, schema), fields_of(document, choice, within)))
    return tuple(groups)


def kind_of(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What the schema lets through, in words, as in `integer, 1 to 100, or null`."""
    choices = _choices(schema)
    words = list(dict.fromkeys(_kind(document, choice) for choice in choices))
    if NULL in schema.get("anyOf", ()):
        words.append("null")
    return " or ".join(words)


def _kind(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    found, _ = _resolved(document, schema, ())
    if "oneOf" in found or "anyOf" in found:
        return kind_of(document, found)
    if "const" in found or "enum" in found:
        return " or ".join(json.dumps(value) for value in found.get("enum") or [found["const"]])
    if found.get("type") == "array":
        return f"list of {kind_of(document, found.get('items', {}))}"
    if "contentMediaType" in found or found.get("format") in FORMATS:
        return FORMATS.get(found.get("format", ""), "file")
    return WORDS.get(found.get("type", ""), "anything") + _limits(found)


def _limits(schema: Mapping[str, Any]) -> str:
    """What a number, or the length of a text, is held within."""
    if schema.get("type") == "string":
        low, high, unit = schema.get("minLength", 0), schema.get("maxLength"), " characters"
        return "" if high is None else f", {low:,} to {high:,}{unit}" if low else f", up to {high:,}{unit}"
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    words = [f"at least {_number(low)}"] if low is not None else []
    words += [f"above {_number(above)}"] if above is not None else []
    words += [f"at most {_number(high)}"] if high is not None and high < LARGEST else []
    words += [f"below {_number(below)}"] if below is not None and below < LARGEST else []
    return "".join(f", {each}" for each in words)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _choices(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = schema.get("oneOf") or schema.get("anyOf") or [schema]
    return [choice for choice in found if choice != NULL]


def _resolved(
    document: Mapping[str, Any], schema: Mapping[str, Any], within: tuple[str, ...]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """What a reference stands for, and the names that lead there."""
    if "$ref" not in schema:
        return schema, within
    name = schema["$ref"].removeprefix(REFERENCE)
    return document["components"]["schemas"][name], (*within, name)


def _title(schema: Mapping[str, Any]) -> str:
    """What tells one choice from the others: the constant that it has in a field, as in `"type": "lora"`."""
    for name, each in schema.get("properties", {}).items():
        if "const" in each:
            return f"{json.dumps(name)}: {json.dumps(each['const'])}"
    return ""


def _own_words(found: Mapping[str, Any], around: Mapping[str, Any]) -> str:
    """An object's description, unless it is already said where it is named."""
    words: str = found.get("description", "")
    return "" if words == around.get("description") else words
