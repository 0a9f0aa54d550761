"""What schemathesis cannot know of our API: real ids, files that are what their route wants, and rules that no schema
can say. Loaded by `SCHEMATHESIS_HOOKS=tests.fuzz.hooks`.
"""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.generation.case import Case
from schemathesis.hooks import HookContext
from schemathesis.openapi.checks import EnsureResourceAvailability, RejectedPositiveData

from tests.integration.model_files import llama, tokenizer_json

AnyCase = Case[Any]

FILES = {
    "/datasets": [("text.txt", b"Hello, world. " * 200)],
    "/tokenizers": [("tokenizer.json", tokenizer_json())],
    "/models": list(llama().items()),
}
PREFIXES = {"dataset_id": "ds_", "tokenizer_id": "tok_", "model_id": "model_", "job_id": "job_"}
ids: dict[str, list[str]] = {prefix: [] for prefix in PREFIXES.values()}
"""Of what was made and, as far as we know, is still there."""

JOB = os.environ.get("FUZZ_JOB")
"""A job with a checkpoint, which no worker is here to make."""
CHECKPOINT = {"job_id": JOB, "step": "3", "name": "config.json"}

SCHEMA_SAYS_ALL = {"invalid_request"}
"""Codes that a request within the schema must not meet; other codes of 422 and 413 are about what things are."""
RULES = (
    "give exactly one of",
    "is in place of",
    "needs ",
    "need ",
    "is for built-in models",
    "is a choice for softmax attention",
    "are steps on this dataset",
    "must not name a layer twice",
    "must be a multiple",
    "must not exceed",
    "is for ",
)
"""Of rules between fields, or between a field and what it names: OpenAPI has no words for them."""


@schemathesis.hook
def before_call(context: HookContext, case: AnyCase, kwargs: dict[str, Any]) -> None:
    """A request that is to be accepted names things that are there and sends files that are what they should be."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if (files := FILES.get(case.path)) and case.method == "POST" and str(case.media_type).startswith("multipart"):
        kwargs["files"] = [("file", file) for file in files] + [("name", (None, "made by the fuzzer"))]
    if isinstance(case.body, dict) and case.media_type == "application/json":
        _name_what_is_there(case)
    if "checkpoints" in case.path and JOB:
        case.path_parameters.update({name: value for name, value in CHECKPOINT.items() if name in case.path_parameters})
    elif _phase(case) != "stateful":  # there the links bring the ids
        for parameter, prefix in PREFIXES.items():
            if parameter in case.path_parameters and ids[prefix]:
                case.path_parameters[parameter] = ids[prefix][-1]


@schemathesis.hook
def after_call(context: HookContext, case: AnyCase, response: Response) -> None:
    """Remember what was made, forget what was deleted."""
    if case.method == "POST" and response.status_code in {201, 202}:
        made = str(json.loads(response.content).get("id", ""))
        for prefix, known in ids.items():
            if made.startswith(prefix):
                known.append(made)
    if case.method == "DELETE" and response.status_code == 204:
        for known in ids.values():
            known[:] = [name for name in known if name not in case.path_parameters.values()]


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: AnyCase, response: Response) -> bool:
    """Keep every failure but of a request whose schema could not have said why it is refused, and that a job which was
    just made has no checkpoint."""
    if isinstance(failure, EnsureResourceAvailability):
        return bool(json.loads(response.content)["code"] != "checkpoint_not_found")
    if not isinstance(failure, RejectedPositiveData):
        return True
    problem = json.loads(response.content)
    if problem["code"] not in SCHEMA_SAYS_ALL:
        return False
    if _has_whole_float(case.body):  # 5.0 is an integer of JSON Schema; we read it as it is written
        return False
    messages = [str(error["message"]) for error in problem.get("errors", [])]
    return not (messages and all(any(rule in message for rule in RULES) for message in messages))


def _phase(case: AnyCase) -> str:
    assert case.meta is not None
    return str(case.meta.phase.name.value)


def _name_what_is_there(case: AnyCase) -> None:
    assert isinstance(case.body, dict)
    body: dict[str, Any] = case.body
    if case.method == "POST" and case.path in {"/jobs", "/plans"}:
        for name in ("validation_dataset", "validation_fraction", "tokenizer", "matching", "attention", "epochs"):
            body.pop(name, None)
        small = {
            "model": "performer-tiny",
            "memory_cap": "64GiB",
            "sequence_length": 64,
            "steps": 2,
            "chunking": "auto",
        }
        body.update(small, evaluate_every=None, early_stopping=None, method={"type": "full"})
    if case.path.endswith("/generate"):
        body.pop("messages", None)
        body["prompt"] = "Hello"
    if "dataset" in body and ids["ds_"]:
        body["dataset"] = ids["ds_"][-1]
    if "train" in body and ids["ds_"]:
        body["train"] = {"dataset": ids["ds_"][-1], "vocab_size": 300}
    if "tokenizer" in body:
        body["tokenizer"] = "bytes"


def _has_whole_float(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_whole_float, value.values()))
    if isinstance(value, list):
        return any(map(_has_whole_float, value))
    return isinstance(value, float) and value.is_integer()
