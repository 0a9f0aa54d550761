"""Browsers: log in with a key, look and change with the session's cookie, log out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import httpx2
import pytest
from sqlalchemy import Engine, func, update
from starlette.testclient import TestClient

from api.app import create_app
from api.browsers import COOKIE, CSRF_HEADER
from service import keys
from service.database import transaction
from service.models import WebSession
from service.settings import Settings
from service.storage import Storage
from tests.integration.seed import add_dataset


@pytest.fixture
def browser(settings: Settings) -> Iterator[TestClient]:
    """At an API that asks for keys, behind a proxy with TLS."""
    app = create_app(settings.model_copy(update={"authentication": "keys"}))
    with TestClient(app, base_url="https://slimtune.example", follow_redirects=False) as running:
        yield running


@pytest.fixture
def key(bind: Engine) -> str:
    with transaction(bind) as session:
        return keys.create(session, "acme", "a key")[1]


@pytest.fixture
def job_of(browser: TestClient, bind: Engine, storage: Storage) -> Callable[[str], str]:
    """Makes a tenant's job; returns its id."""

    def make(tenant: str) -> str:
        dataset = add_dataset(bind, storage, tenant=tenant).id
        with transaction(bind) as session:
            _, other_key = keys.create(session, tenant, "for the job")
        body = {
            "model": "performer-tiny",
            "memory_cap": "500MiB",
            "sequence_length": 128,
            "steps": 2,
            "dataset": dataset,
        }
        answer = browser.post("/jobs", json=body, headers={"Authorization": f"Bearer {other_key}"})
        job_id: str = answer.json()["id"]
        return job_id

    return make


def log_in(browser: TestClient, key: str, **form: str) -> httpx2.Response:
    return browser.post("/ui/login", data={"key": key, **form})


def csrf(browser: TestClient) -> dict[str, str]:
    found = re.search(r'<meta name="csrf" content="([0-9a-f]{64})">', browser.get("/").text)
    assert found is not None
    return {CSRF_HEADER: found[1]}


def test_a_key_opens_a_session_which_sees_its_tenant_and_ends(
    browser: TestClient, key: str, job_of: Callable[[str], str]
) -> None:
    mine, other = (job_of(tenant) for tenant in ("acme", "other"))
    away = browser.get("/ui/jobs/x?tab=1")
    assert (away.status_code, away.headers["location"]) == (303, "/ui/login?next=%2Fui%2Fjobs%2Fx%3Ftab%3D1")
    answer = log_in(browser, key, next="/ui/new")
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/new")
    cookie = answer.headers["set-cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Secure"))
    assert key not in cookie
    page = browser.get("/").text
    assert mine in page
    assert other not in page
    token = browser.cookies[COOKIE]
    answer = browser.post("/ui/logout", headers=csrf(browser))
    assert answer.headers["hx-redirect"] == "/ui/login"
    browser.cookies.set(COOKIE, token)
    assert browser.get("/").status_code == 303, "who kept the cookie is out too"


def test_what_changes_something_needs_the_page_s_token(
    browser: TestClient, key: str, job_of: Callable[[str], str]
) -> None:
    job_id = job_of("acme")
    log_in(browser, key)
    assert browser.get(f"/jobs/{job_id}").status_code == 200
    for headers in ({}, {CSRF_HEADER: "0" * 64}):
        refused = browser.post(f"/jobs/{job_id}/cancel", headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (403, "csrf_token_missing")
    assert browser.get(f"/jobs/{job_id}").json()["status"] == "queued"
    assert browser.post(f"/jobs/{job_id}/cancel", headers=csrf(browser)).status_code == 200


def test_a_session_is_worth_what_its_key_is_and_lasts_a_while(
    browser: TestClient, key: str, bind: Engine, settings: Settings
) -> None:
    log_in(browser, key)
    token = browser.cookies[COOKIE]

    def seen_by_a_new_process() -> int:
        app = create_app(settings.model_copy(update={"authentication": "keys"}))
        with TestClient(app, base_url="https://slimtune.example", cookies={COOKIE: token}) as other:
            return other.get("/jobs").status_code

    assert seen_by_a_new_process() == 200
    with transaction(bind) as session:
        session.execute(update(WebSession).values(expires_at=func.now()))
    assert seen_by_a_new_process() == 401
    log_in(browser, key)
    token = browser.cookies[COOKIE]
    assert seen_by_a_new_process() == 200
    with transaction(bind) as session:
        keys.revoke(session, keys.listed(session)[0].id)
    assert seen_by_a_new_process() == 401


def test_a_session_s_token_is_no_key_and_a_key_is_no_session(browser: TestClient, key: str) -> None:
    log_in(browser, key)
    token = browser.cookies[COOKIE]
    browser.cookies.clear()
    assert log_in(browser, token).status_code == 401, "else who has the token of a session has one without end"
    assert browser.get("/jobs", headers={"Authorization": f"Bearer {token}"}).status_code == 401
    browser.cookies.set(COOKIE, key)
    assert browser.get("/jobs").status_code == 401


def test_no_wrong_key_no_other_site_and_no_other_page(browser: TestClient, key: str) -> None:
    wrong = log_in(browser, "slim_" + "x" * 43)
    assert wrong.status_code == 401
    assert 'role="alert"' in wrong.text
    assert COOKIE not in browser.cookies
    elsewhere = browser.post("/ui/login", data={"key": key}, headers={"Sec-Fetch-Site": "cross-site"})
    assert elsewhere.status_code == 403
    for target in ("https://evil.example/", "//evil.example", "/jobs"):
        assert log_in(browser, key, next=target).headers["location"] == "/"


def test_errors_of_pages_are_pages(browser: TestClient, key: str) -> None:
    log_in(browser, key)
    missing = browser.get("/ui/nothing")
    assert (missing.status_code, missing.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "script-src 'self'" in missing.headers["content-security-policy"]
    piece = browser.get("/ui/nothing", headers={"HX-Request": "true"})
    assert piece.headers["hx-retarget"] == "#messages"
    assert "<html" not in piece.text
    assert browser.get("/nothing").headers["content-type"] == "application/problem+json"
    for_script = browser.get("/ui/jobs/nothing/curve", headers={"Accept": "application/json"})
    assert (for_script.status_code, for_script.json()["code"]) == (404, "job_not_found")
    browser.cookies.clear()
    piece = browser.get("/", headers={"HX-Request": "true"})
    assert (piece.status_code, piece.headers["hx-redirect"]) == (401, "/ui/login")
    here = {"HX-Request": "true", "HX-Current-URL": "https://slimtune.example/ui/jobs/job_1?a=1&b=2#x"}
    back = "/ui/login?next=%2Fui%2Fjobs%2Fjob_1%3Fa%3D1%26b%3D2"
    assert browser.get("/ui/jobs/job_1", headers=here).headers["hx-redirect"] == back
    for_script = browser.get("/ui/jobs/job_1/curve", headers={"Accept": "application/json"})
    assert (for_script.status_code, for_script.json()["code"]) == (401, "unauthorized")


def test_files_of_pages_are_open_and_asked_for_again(browser: TestClient) -> None:
    style = browser.get("/ui/static/app.css")
    assert (style.status_code, style.headers["content-type"]) == (200, "text/css; charset=utf-8")
    again = browser.get("/ui/static/app.css", headers={"If-None-Match": style.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert browser.get("/ui/static/..%2fpages.py").status_code == 404
