"""Hostile requests against a running API, and the judgement of what came back and of what is left."""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

from api.problems import MAX_SHOWN, MEDIA_TYPE
from tests.fuzz.contract import HOOK, furnish
from tests.fuzz.hostile import Arsenal, harmless
from tests.fuzz.live import LiveApi
from tests.fuzz.wire import Answer, Attack, send

MAX_ERROR_BYTES = 8_192
GROWTH_BYTES = 64 * 1024**2
"""What the process may hold more at the end than after the first requests: allocators keep some."""
WRITING = {b"POST", b"PUT", b"PATCH", b"DELETE"}
COUNTED_IN_THE_BACKGROUND = {"tokenizations"}
"""A refused request may ask for a dataset's tokens, which is said of it (409 dataset_not_tokenized)."""


@dataclass
class Outcome:
    """Of a siege."""

    requests: int = 0
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind of attack and status; `None` where there was none."""
    violations: list[str] = field(default_factory=list)
    largest_error_bytes: int = 0
    compared: int = 0
    """Batches of requests after which rows and files were counted."""
    growth_bytes: int = 0

    @property
    def statuses(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for (_, status), count in self.answers.items():
            counted[status] += count
        return counted


def besiege(api: LiveApi, seed: int, count: int, batch: int = 10) -> Outcome:
    """Send `count` requests; the rows and files are counted after every `batch`."""
    job = furnish(api, {})
    ids = {
        "job_id": job,
        "step": "3",
        "name": "config.json",
        "model_id": "performer-tiny",
        "file_id": f"result_{job.removeprefix('job_')}_metrics",
        **_begun(api),
    }
    with urllib.request.urlopen(f"{api.url}/openapi.json", timeout=60) as answer:  # noqa: S310  # http, loopback
        document = json.load(answer)
    outcome = Outcome()
    stored = _stored(api)
    resident = 0
    waiting = Arsenal(document, ids, seed).attacks(count)
    while attacks := list(itertools.islice(waiting, batch)):
        wrote = [attack for attack in attacks if _attack(api, attack, outcome)]
        now = _stored(api)
        if not wrote:
            outcome.compared += 1
            if now != stored:
                changed = {name: (stored.get(name), now[name]) for name in now if now[name] != stored.get(name)}
                outcome.violations.append(f"stored {changed} after {[attack.kind for attack in attacks]}")
        stored = now
        if outcome.requests <= count // 4 or not resident:
            resident = max(resident, api.resident_bytes())
    outcome.growth_bytes = api.resident_bytes() - resident
    if outcome.growth_bytes > GROWTH_BYTES:
        outcome.violations.append(f"the process grew by {outcome.growth_bytes} bytes")
    if not api.alive() or send(api.port, harmless()).status != 200:
        outcome.violations.append("the process is gone, or does not answer")
    return outcome


def _begun(api: LiveApi) -> dict[str, str]:
    """A webhook, and an upload that is open."""
    with httpx2.Client(base_url=api.url) as client:
        announced = {"filename": "text.txt", "bytes": 2**20, "purpose": "fine-tune"}
        upload = client.post("/v1/uploads", json=announced).raise_for_status().json()["id"]
        webhook = client.post("/webhooks", json={"url": HOOK}).raise_for_status().json()["id"]
    return {"upload_id": upload, "webhook_id": webhook}


def _attack(api: LiveApi, attack: Attack, outcome: Outcome) -> bool:
    """Send one and judge; whether it was accepted and may have stored something."""
    outcome.requests += 1
    try:
        answer = send(api.port, attack)
    except TimeoutError:
        outcome.violations.append(f"{attack.kind}: no answer: {attack.head[:200]!r}")
        return False
    outcome.answers[attack.kind, str(answer.status)] += 1
    if answer.status is not None and answer.status >= 400:
        outcome.largest_error_bytes = max(outcome.largest_error_bytes, len(answer.body))
    sent = b"".join([attack.head[:200], *(portion[:300] for portion in attack.body[:1])])
    outcome.violations += [f"{attack.kind}: {what}: {sent!r}" for what in wrongs(attack, answer)]
    accepted = answer.status is not None and answer.status < 300
    return accepted and attack.head.split(b" ", 1)[0] in WRITING


def wrongs(attack: Attack, answer: Answer) -> Iterator[str]:
    """What an answer does that none may."""
    if answer.status is None:
        if attack.complete and not attack.malformed:
            yield "no answer"
        return
    if answer.status >= 500 and answer.status != 501:
        yield f"{answer.status} {answer.body[:300]!r}"
    if answer.status < 400 or attack.head.startswith(b"HEAD "):
        return
    if len(answer.body) > MAX_ERROR_BYTES:
        yield f"an error of {len(answer.body)} bytes"
    if answer.headers.get("content-type") != MEDIA_TYPE:
        by_uvicorn = answer.status in {400, 408, 431} and "x-request-id" not in answer.headers
        if not (attack.malformed and by_uvicorn):
            yield f"{answer.status} as {answer.headers.get('content-type')}"
        return
    problem = answer.json()
    if problem.get("status") != answer.status or not problem.get("code"):
        yield f"not a problem: {answer.body[:300]!r}"
    sent = attack.text
    for text in texts(problem):
        if any(text[start : start + MAX_SHOWN + 1] in sent for start in range(len(text) - MAX_SHOWN)):
            yield f"more than {MAX_SHOWN} characters of the request come back: {text[:100]!r}"


def texts(value: Any) -> Iterator[str]:
    """Every text inside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def _stored(api: LiveApi) -> dict[str, int]:
    return {name: count for name, count in api.stored().items() if name not in COUNTED_IN_THE_BACKGROUND}
