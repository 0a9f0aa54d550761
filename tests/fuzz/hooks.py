"""What schemathesis cannot know of our API: real ids, files that are what their route wants, and rules that no schema
can say. Loaded by `SCHEMATHESIS_HOOKS=tests.fuzz.hooks`.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import httpx2
import schemathesis
from schemathesis.checks import CheckContext
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.generation.case import Case
from schemathesis.hooks import HookContext
from schemathesis.openapi.checks import EnsureResourceAvailability, RejectedPositiveData

from api.problems import MEDIA_TYPE
from tests.fuzz.contract import HOOK
from tests.integration.model_files import llama, tokenizer_json

AnyCase = Case[Any]

FILES = {
    "/datasets": [("text.txt", b"Hello, world. " * 200)],
    "/tokenizers": [("tokenizer.json", tokenizer_json())],
    "/models": list(llama().items()),
    "/v1/files": [("text.txt", b"Hello, world. " * 200)],
    "/v1/uploads/{upload_id}/parts": [("part", b"Hello, world. ")],
}
TEXTS = {"/v1/files": [("purpose", "fine-tune")], "/v1/uploads/{upload_id}/parts": []}
"""Of forms; of all others a name."""
PREFIXES = {
    "dataset_id": "ds_",
    "tokenizer_id": "tok_",
    "model_id": "model_",
    "job_id": "job_",
    "file_id": "ds_",
    "upload_id": "upload_",
    "webhook_id": "wh_",
}
MAKERS = {
    "/datasets", "/tokenizers", "/models", "/jobs", "/webhooks", "/v1/files", "/v1/uploads", "/v1/fine_tuning/jobs"
}  # fmt: skip
ids: dict[str, list[str]] = {prefix: [] for prefix in PREFIXES.values()}
"""Of what was made and, as far as we know, is still there."""
deleted: set[str] = set()
"""Ids of what was. The library knows of a deletion only by the path on which it happened, and /v1 has paths of its own
to the same things."""
parts: dict[str, str] = {}
"""Of uploads that are open: the last part, by the upload."""

JOB = os.environ.get("FUZZ_JOB", "")
"""A job with a checkpoint, which no worker is here to make. It is over, so that a stream of its events ends."""
CHECKPOINT = {"job_id": JOB, "step": "3", "name": "config.json"}
METRICS = f"result_{JOB.removeprefix('job_')}_metrics"

SMALL = {
    "model": "performer-tiny",
    "memory_cap": "64GiB",
    "sequence_length": 64,
    "steps": 2,
    "chunking": "auto",
    "evaluate_every": None,
    "early_stopping": None,
}
MAX_OPEN = 10
"""Uploads and webhooks that are kept."""
calls = itertools.count()

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
        field = "data" if case.path.endswith("/parts") else "file"
        texts = TEXTS.get(case.path, [("name", "made by the fuzzer")])
        kwargs["files"] = [(field, file) for file in files] + [(name, (None, text)) for name, text in texts]
    if "Idempotency-Key" in case.headers:
        case.headers["Idempotency-Key"] = f"fuzz-{next(calls)}"  # one that is new: drawn ones come again
    if isinstance(case.body, dict) and case.media_type == "application/json":
        _name_what_is_there(case)
    if "checkpoints" in case.path:
        case.path_parameters.update({name: value for name, value in CHECKPOINT.items() if name in case.path_parameters})
    elif case.path == "/jobs/{job_id}/events" and next(calls) % 2:
        case.path_parameters["job_id"] = JOB
        case.headers["Accept"] = "text/event-stream"
    elif case.path == "/v1/files/{file_id}/content" and next(calls) % 2:
        case.path_parameters["file_id"] = METRICS
    elif _phase(case) != "stateful":  # there the links bring the ids
        for parameter, prefix in PREFIXES.items():
            if parameter in case.path_parameters and ids[prefix]:
                case.path_parameters[parameter] = ids[prefix][-1]
    if case.path == "/v1/uploads/{upload_id}/complete" and isinstance(case.body, dict):
        case.body.pop("md5", None)
        case.body["part_ids"] = [parts.get(str(case.path_parameters["upload_id"]), "part_" + "0" * 32)]


@schemathesis.hook
def after_call(context: HookContext, case: AnyCase, response: Response) -> None:
    """Remember what was made, forget what was deleted."""
    if case.method == "POST" and response.status_code < 300 and case.path in MAKERS:
        made = str(json.loads(response.content)["id"])
        for prefix, known in ids.items():
            if made.startswith(prefix):
                known.append(made)
        _make_room(case, response)
    if case.path.endswith("/parts") and response.status_code < 300:
        part = json.loads(response.content)
        parts[part["upload_id"]] = part["id"]
    if case.path.startswith("/v1/uploads/{upload_id}/c") and response.status_code < 300:
        parts.pop(str(case.path_parameters["upload_id"]), None)
        ids["upload_"] = [upload for upload in ids["upload_"] if upload != case.path_parameters["upload_id"]]
    if case.method == "DELETE" and response.status_code < 300:
        deleted.update(map(str, case.path_parameters.values()))
        for known in ids.values():
            known[:] = [name for name in known if name not in case.path_parameters.values()]


def _make_room(case: AnyCase, response: Response) -> None:
    """A tenant may have 16 open uploads and 20 webhooks: the oldest go, or every further one is refused."""
    key = response.request.headers.get("Authorization")
    headers = {} if key is None else {"Authorization": str(key)}
    base = str(case.operation.base_url).rstrip("/")
    for prefix, method, path in (("upload_", "POST", "/v1/uploads/{}/cancel"), ("wh_", "DELETE", "/webhooks/{}")):
        while len(ids[prefix]) > MAX_OPEN:
            url = f"{base}{path.format(ids[prefix].pop(0))}"
            httpx2.request(method, url, headers=headers)


@schemathesis.check
def code_is_documented(context: CheckContext, response: Response, case: AnyCase) -> None:
    """A problem's code is among those that its route has under its status."""
    documented = case.operation.definition.raw["responses"].get(str(response.status_code), {}).get("content", {})
    if MEDIA_TYPE in documented:  # else another check has found it
        code = json.loads(response.content)["code"]
        assert code in documented[MEDIA_TYPE]["examples"], f"{response.status_code} {code} is not documented"


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: AnyCase, response: Response) -> bool:
    """Keep every failure but of a request whose schema could not have said why it is refused, or that asked for more
    than what was just made."""
    if not isinstance(failure, RejectedPositiveData | EnsureResourceAvailability):
        return True
    problem = json.loads(response.content)
    if isinstance(failure, EnsureResourceAvailability):
        gone = any(str(value) in deleted for value in case.path_parameters.values())
        return not gone and problem["code"] not in {"checkpoint_not_found", "part_not_found"}
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
        body.update(SMALL, method={"type": "full"})
    if case.method == "POST" and case.path == "/v1/fine_tuning/jobs":
        for name in (
            "validation_file", "validation_fraction", "tokenizer", "matching", "attention", "hyperparameters", "method"
        ):  # fmt: skip
            body.pop(name, None)
        body.update(SMALL)
    if case.path == "/v1/uploads":
        body.update(filename="text.txt", bytes=len(FILES["/v1/uploads/{upload_id}/parts"][0][1]))
    if case.path == "/webhooks":
        body["url"] = HOOK
    if case.path.endswith("/generate"):
        body.pop("messages", None)
        body["prompt"] = "Hello"
    for name in ("dataset", "training_file"):
        if name in body and ids["ds_"]:
            body[name] = ids["ds_"][-1]
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
