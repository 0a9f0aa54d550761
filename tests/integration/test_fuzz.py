"""The API against whatever is sent to it, a little of it; `make fuzz` sends much more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.contract import ENVIRONMENT, add_key, conform
from tests.fuzz.live import LiveApi, live_api
from tests.fuzz.siege import besiege, wrongs
from tests.fuzz.wire import Answer, Attack, request

SEED = 1


@pytest.fixture
def api(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[LiveApi]:
    with live_api(database_url, redis_url, tmp_path, **ENVIRONMENT) as running:
        yield running


@pytest.mark.slow
def test_the_api_does_as_its_document_says(api: LiveApi, tmp_path: Path) -> None:
    """In two runs: of one, whose time is bounded, fuzzing would leave next to nothing for what follows links."""
    for phases, seconds, cases in (("examples,coverage,fuzzing", 32, 100), ("stateful", 12, 30)):
        verdict = conform(api, tmp_path, SEED, examples=3, max_seconds=seconds, phases=phases)
        assert verdict.failures == [], verdict.output
        assert verdict.cases > cases
        done = {name for name, phase in verdict.report["phases"].items() if phase["status"] == "success"}
        assert done == set(phases.split(","))


@pytest.mark.slow
def test_no_route_is_open_without_a_key(database_url: str, redis_url: str, tmp_path: Path) -> None:
    with live_api(database_url, redis_url, tmp_path, **ENVIRONMENT, SLIMTUNE_AUTHENTICATION="keys") as api:
        key = add_key(api)
        verdict = conform(api, tmp_path, SEED, examples=1, phases="fuzzing", checks="ignored_auth", key=key)
    assert verdict.failures == [], verdict.output
    assert verdict.cases > 50


@pytest.mark.slow
def test_hostile_requests_are_refused_in_short(api: LiveApi) -> None:
    outcome = besiege(api, SEED, 300)
    assert outcome.violations == []
    assert outcome.compared > 10


PROBLEM = {"content-type": "application/problem+json", "x-request-id": "req_1"}


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (Answer(500, PROBLEM, b'{"status": 500, "code": "internal_error"}'), "500 "),
        (Answer(422, {"content-type": "application/json", "x-request-id": "a"}, b"{}"), "422 as application/json"),
        (Answer(422, PROBLEM, b'{"status": 422, "code": "a", "b": "' + b"c" * 8_192 + b'"}'), "an error of "),
        (Answer(422, PROBLEM, b'{"status": 400, "code": "a"}'), "not a problem"),
        (Answer(422, PROBLEM, b'{"status": 422, "code": "a", "b": "' + b"x" * 201 + b'"}'), "more than 200 characters"),
        (Answer(None, {}, b""), "no answer"),
    ],
)
def test_the_judge_sees_what_is_wrong(answer: Answer, found: str) -> None:
    attack: Attack = request("a test", "POST", "/jobs", b"x" * 300)
    assert [wrong for wrong in wrongs(attack, answer) if wrong.startswith(found)]
