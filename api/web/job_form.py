"""The form of a job: its fields, as the schema of POST /jobs has them, with their defaults and limits.

Names, order and groups are written here; what the schema has beyond them comes last, under the name that it has there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from api.schemas import JobRequest
from api.units import SIZE_PATTERN

REFERENCES = ("model", "dataset", "validation_dataset", "tokenizer")
"""Fields that name something that is there: chosen from a list."""
OWN = "own"
"""The choice of an object in place of a word, as in `chunking`."""


@dataclass(frozen=True, slots=True)
class FormField:
    path: str
    """Where its value goes in the request: `optimizer.learning_rate`."""
    kind: str
    """integer, number, text, choice, reference, size, switch (an object that may be left out), list or pairs."""
    label: str = ""
    default: Any = None
    """As the API has it; None where there is none."""
    required: bool = False
    nullable: bool = False
    choices: tuple[str, ...] = ()
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the input: min, max, maxlength, pattern."""
    help: tuple[tuple[bool, str], ...] = ()
    """Pieces of the description, and whether each is code."""
    when: str = ""
    """What another control must say for this one to count: `optimizer.name=adamw|sgd`."""

    @property
    def id(self) -> str:
        return "f-" + self.path.replace(".", "-")


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    fields: tuple[FormField, ...]
    when: str = ""


LABELS = {
    "name": "Name",
    "model": "Model",
    "dataset": "Training data",
    "memory_cap": "Memory cap",
    "sequence_length": "Sequence length",
    "batch_size": "Batch size",
    "steps": "Steps",
    "epochs": "Epochs",
    "optimizer.learning_rate": "Learning rate",
    "method.type": "Method",
    "method.rank": "LoRA rank",
    "method.alpha": "LoRA alpha",
    "method.targets": "Layers with adapters",
    "optimizer.name": "Optimizer",
    "optimizer.weight_decay": "Weight decay",
    "optimizer.beta1": "Beta 1",
    "optimizer.beta2": "Beta 2",
    "optimizer.epsilon": "Epsilon",
    "optimizer.momentum": "Momentum",
    "schedule.name": "Schedule",
    "schedule.warmup_steps": "Warm-up steps",
    "schedule.final_fraction": "Final fraction",
    "validation_dataset": "Validation data",
    "validation_fraction": "Share kept for validation",
    "evaluate_every": "Evaluate every",
    "evaluate_sequences": "Sequences per evaluation",
    "early_stopping": "Early stopping",
    "early_stopping.patience": "Patience",
    "early_stopping.min_delta": "Smallest improvement",
    "tokenizer": "Tokenizer",
    "packing": "Packing",
    "precision": "Precision",
    "gradient_clip": "Gradient clipping",
    "dropout": "Dropout",
    "label_smoothing": "Label smoothing",
    "checkpoint_every": "Checkpoint every",
    "keep": "Checkpoints to keep",
    "chunking": "Chunks",
    "chunking.chunk_length": "Chunk length",
    "chunking.state_policy": "Attention states",
    "attention": "Attention",
    "matching": "Matching phase",
    "matching.steps": "Matching steps",
    "matching.learning_rate": "Matching learning rate",
    "matching.sequence_length": "Matching sequence length",
    "seed": "Seed",
    "metadata": "Metadata",
}
MORE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Optimizer and schedule", ("optimizer.", "schedule.", "gradient_clip")),
    ("Validation", ("validation_", "evaluate_", "early_stopping")),
    ("Data", ("tokenizer", "packing")),
    ("Attention", ("attention", "matching")),
    ("Precision and regularisation", ("precision", "dropout", "label_smoothing")),
    ("Checkpoints", ("checkpoint_every", "keep")),
    ("Memory plan", ("chunking",)),
    ("Labels and seed", ("seed", "metadata")),
)
"""Titles of the groups under "More", and how the paths of their fields begin."""
COMMON = tuple(LABELS)[:13]
WHEN = {
    "steps": "@duration=steps",
    "epochs": "@duration=epochs",
    "validation_dataset": "@validation=dataset",
    "validation_fraction": "@validation=fraction",
    "tokenizer": "@built-in=yes",
    "attention": "@softmax=yes",
    "matching": "attention=performer",
}
"""Of fields that not every choice has use for, beyond what the schema says. With an @, what the page knows itself."""


def fields() -> dict[str, FormField]:
    """All fields of a job by their paths: those with a label in its order, then the others."""
    schema = JobRequest.model_json_schema()
    found = {each.path: each for each in _of_object(schema, schema["$defs"], "", "")}
    order = [path for path in LABELS if path in found] + [path for path in found if path not in LABELS]
    return {path: _named(found[path]) for path in order}


def groups(known: Mapping[str, FormField]) -> list[Group]:
    """What goes under "More"."""
    left = [each for each in known.values() if each.path not in COMMON]
    made = []
    for title, beginnings in MORE:
        mine = tuple(each for each in left if each.path.startswith(beginnings))
        left = [each for each in left if each not in mine]
        made.append(Group(title, mine))
    return made + ([Group("Further", tuple(left))] if left else [])


def values_of(known: Mapping[str, FormField], spec: Mapping[str, Any]) -> dict[str, Any]:
    """What the controls show at first: the defaults, over which goes what a job's spec says."""
    values = {path: each.default for path, each in known.items()}
    for path, each in known.items():
        value = _at(spec, path)
        if value is _MISSING:
            continue
        if each.kind == "switch":
            values[path] = value is not None
        elif each.kind == "choice" and isinstance(value, Mapping):
            values[path] = OWN
        else:
            values[path] = value
    return values


HELP = {
    "model": "",
    "dataset": "",
    "validation_dataset": "",
    "memory_cap": "The most that the training may ever hold, as `800 MiB`, `1.5GiB` or `2GB`.",
    "steps": "Optimiser steps.",
    "epochs": "Passes over the training data.",
    "gradient_clip": "Largest global norm of the gradient; empty for no clipping.",
    "checkpoint_every": "Steps between checkpoints; empty for one at the end only.",
    "early_stopping": "Stop when the validation loss no longer improves. Needs evaluations.",
    "tokenizer": "The built-in model gets its vocabulary; without one it reads bytes.",
    "chunking": "",
    "metadata": "Up to 16 lines `key=value` of your own, in double quotes where they need `\\n`; we only keep them.",
}
"""In place of the schema's descriptions where those speak to programs."""

_MISSING = object()


def pair_lines(pairs: Mapping[str, str] | None) -> str:
    """A line `key=value` of each, as form.js reads them: what would be read as something else is in JSON's quotes."""
    return "\n".join(f"{_line_part(key, '=')}={_line_part(value)}" for key, value in (pairs or {}).items())


def _line_part(text: str, ends: str = "") -> str:
    plain = (
        text == text.strip()
        and not text.startswith('"')
        and not any(mark in text for mark in ("\n", "\r", ends or "\n"))
    )
    return text if plain else json.dumps(text, ensure_ascii=False)


def _at(spec: Mapping[str, Any], path: str) -> Any:
    value: Any = spec
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _named(each: FormField) -> FormField:
    label = LABELS.get(each.path, each.path.rpartition(".")[2].replace("_", " ").capitalize())
    said = _pieces(HELP[each.path]) if each.path in HELP else each.help
    return replace(each, label=label, help=said, when=WHEN.get(each.path, each.when))


def _of_object(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str, when: str
) -> Iterator[FormField]:
    required = schema.get("required", ())
    for name, inner in schema["properties"].items():
        yield from _of_property(inner, definitions, prefix + name, name in required, when)


def _of_property(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], path: str, required: bool, when: str
) -> Iterator[FormField]:
    members = [_resolved(each, definitions) for each in schema.get("anyOf", schema.get("oneOf", [schema]))]
    nullable = any(each.get("type") == "null" for each in members)
    members = [each for each in members if each.get("type") != "null"]
    common: dict[str, Any] = {"help": _help(schema), "nullable": nullable, "required": required, "when": when}
    objects = [each for each in members if "properties" in each]
    if path == "memory_cap":
        yield FormField(path, "size", limits={"pattern": SIZE_PATTERN.strip("^$"), "maxlength": 40}, **common)
    elif path in REFERENCES:
        yield FormField(path, "reference", **common)
    elif not objects:
        yield _leaf(members[0], schema, path, common)
    elif len(objects) > 1:
        yield from _of_union(objects, definitions, path, common)
    elif len(members) > 1 or nullable:
        yield from _of_optional(objects[0], members, schema, definitions, path, common)
    else:
        yield from _of_object(objects[0], definitions, f"{path}.", when)


def _of_union(
    objects: list[Mapping[str, Any]], definitions: Mapping[str, Any], path: str, common: dict[str, Any]
) -> Iterator[FormField]:
    """Objects of several kinds, told apart by one of their words: its choice, and then the fields of all."""
    tag = next(name for name, inner in objects[0]["properties"].items() if "const" in inner)
    words = [each["properties"][tag]["const"] for each in objects]
    default = next(inner["default"] for each in objects if "default" in (inner := each["properties"][tag]))
    yield FormField(f"{path}.{tag}", "choice", default=default, choices=tuple(words), **common)
    seen: dict[str, list[str]] = {}
    for word, each in zip(words, objects, strict=True):
        for name in each["properties"]:
            seen.setdefault(name, []).append(word)
    for name, having in seen.items():
        if name != tag:
            inner = next(each["properties"][name] for each in objects if name in each["properties"])
            when = "" if having == words else f"{path}.{tag}={'|'.join(having)}"
            yield from _of_property(inner, definitions, f"{path}.{name}", False, when)


def _of_optional(
    inner: Mapping[str, Any],
    members: list[Mapping[str, Any]],
    schema: Mapping[str, Any],
    definitions: Mapping[str, Any],
    path: str,
    common: dict[str, Any],
) -> Iterator[FormField]:
    """An object that may be left out, or a word in its place."""
    word = next((each["const"] for each in members if "const" in each), None)
    if word is None:
        yield FormField(path, "switch", **{**common, "help": common["help"] or _help(inner)})
    else:
        yield FormField(path, "choice", default=schema["default"], choices=(word, OWN), **common)
    yield from _of_object(inner, definitions, f"{path}.", f"{path}={'on' if word is None else OWN}")


def _leaf(member: Mapping[str, Any], schema: Mapping[str, Any], path: str, common: dict[str, Any]) -> FormField:
    default = schema.get("default", {} if member["type"] == "object" else None)
    if "enum" in member:
        return FormField(path, "choice", default=default, choices=tuple(member["enum"]), **common)
    if member["type"] == "array":
        return FormField(path, "list", default=default, choices=tuple(member["items"]["enum"]), **common)
    kind = {"integer": "integer", "number": "number", "string": "text", "object": "pairs"}[member["type"]]
    limits = {"min": member.get("minimum"), "max": member.get("maximum"), "maxlength": member.get("maxLength")}
    if kind == "integer":
        limits["min"] = member.get("minimum", member.get("exclusiveMinimum", -1) + 1)
        if "exclusiveMaximum" in member:
            limits["max"] = member["exclusiveMaximum"] - 1
    elif kind == "number":
        limits["min"] = limits["min"] if limits["min"] is not None else member.get("exclusiveMinimum")
        limits["max"] = limits["max"] if limits["max"] is not None else member.get("exclusiveMaximum")
    given = {name: value for name, value in limits.items() if value is not None}
    return FormField(path, kind, default=default, limits=given, **common)


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    found: Mapping[str, Any] = schema if reference is None else definitions[reference.rpartition("/")[2]]
    return found


def _help(schema: Mapping[str, Any]) -> tuple[tuple[bool, str], ...]:
    return _pieces(" ".join(schema.get("description", "").split()))


def _pieces(text: str) -> tuple[tuple[bool, str], ...]:
    pieces = re.split(r"`([^`]*)`", text)
    return tuple((index % 2 == 1, piece) for index, piece in enumerate(pieces) if piece)
