"""The table of states against the rules that it must keep."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from service.status import REQUESTS, TERMINAL, TRANSITIONS, Action, Desired, JobStatus


def test_every_status_has_its_transitions_and_terminal_ones_have_none() -> None:
    assert set(TRANSITIONS) == set(JobStatus)
    assert {status for status, after in TRANSITIONS.items() if not after} == TERMINAL


def test_requests_move_jobs_only_along_legal_transitions() -> None:
    for (_, before, _), (after, _) in REQUESTS.items():
        assert after == before or after in TRANSITIONS[before], (before, after)


def test_only_a_run_ends_in_success_or_failure_or_starts() -> None:
    for (_, before, _), (after, _) in REQUESTS.items():
        assert after == before or after not in {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.RUNNING}


def test_asking_twice_changes_nothing_the_second_time() -> None:
    for (action, _, _), outcome in REQUESTS.items():
        assert REQUESTS[action, *outcome] == outcome, (action, outcome)


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED])
def test_a_finished_job_takes_no_request(status: JobStatus) -> None:
    for action, desired in itertools.product(get_args(Action), Desired):
        assert (action, status, desired) not in REQUESTS


def test_a_cancel_cannot_be_taken_back() -> None:
    cancelled = [outcome for (_, _, desired), outcome in REQUESTS.items() if desired is Desired.CANCEL]
    assert cancelled
    assert all(desired is Desired.CANCEL for _, desired in cancelled)
