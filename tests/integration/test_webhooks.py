"""Webhooks against a real receiver: what is sent, how often, signed by whom, and what never is."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from sqlalchemy import Engine, event, text, update
from starlette.testclient import TestClient

from api.app import create_app
from api.webhook_schemas import EventType
from service import events, jobs, outbox, runs, webhooks
from service.database import transaction
from service.errors import NotFoundError, TooManyWebhooksError, WebhooksOffError, WebhookUrlNotAllowedError
from service.models import Job, Webhook, WebhookDelivery
from service.settings import Settings
from service.status import Action
from service.storage import Storage
from service.webhook_urls import Allowed
from tests.integration.seed import add_dataset, add_job, claim
from tests.integration.stage import wait_for
from worker.webhooks import Sender

ROOT = Path(__file__).resolve().parents[2]
ERROR = {"code": "diverged", "message": "m", "step": 1, "hint": "h", "log": ["not for webhooks"]}


@dataclass
class Receiver:
    """Answers as it is told, and keeps what came."""

    url: str = ""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """The next ones; then 204."""
    came: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    """Cleared: no answer."""

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for _, headers, _ in self.came]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.hold.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.came.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            receiver.hold.wait(30)
            status, headers = receiver.answers.pop(0) if receiver.answers else (204, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815  # which a followed redirect would be

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_address[1]}/in"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield receiver
        receiver.hold.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def allowed(receiver: Receiver) -> Allowed:
    return Allowed.parse(receiver.url)


def add_webhook(
    bind: Engine, allowed: Allowed, url: str, tenant: str = "default", events: tuple[str, ...] = outbox.DEFAULT_TYPES
) -> Webhook:
    with transaction(bind, tenant) as session:
        return webhooks.create(session, allowed, url=url, events=events)


def send(bind: Engine, allowed: Allowed) -> int:
    """What is due now, to its end."""

    async def run() -> int:
        async with Sender(bind, allowed) as sender:
            return await sender.start_due()

    return asyncio.run(run())


def pass_time(bind: Engine) -> None:
    """Until everything that waits is due, the oldest first, and every sender's time is over."""
    waiting = update(WebhookDelivery).where(WebhookDelivery.status == "pending")
    with transaction(bind) as session:
        session.execute(waiting.values(next_attempt_at=WebhookDelivery.created_at))
        session.execute(update(Webhook).values(busy_until=None))


def fail(bind: Engine, job_id: str) -> None:
    claim(bind, job_id)
    with transaction(bind) as session:
        runs.finish(session, job_id, 1, "failed", error=ERROR)


def deliveries(bind: Engine, webhook: Webhook) -> list[WebhookDelivery]:
    with transaction(bind) as session:
        return webhooks.deliveries(session, webhook.id, limit=100)[0]


def state(bind: Engine, webhook: Webhook) -> tuple[str, int, int | None, str | None]:
    (delivery,) = deliveries(bind, webhook)
    return delivery.status, delivery.attempts, delivery.response_status, delivery.error


def wait_seconds(bind: Engine, webhook: Webhook) -> float:
    """From the last attempt to the next."""
    (delivery,) = deliveries(bind, webhook)
    assert delivery.next_attempt_at is not None
    assert delivery.last_attempt_at is not None
    return (delivery.next_attempt_at - delivery.last_attempt_at).total_seconds()


def test_the_end_of_a_job_is_told_signed_and_as_openai_reads_it(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed
) -> None:
    webhook = add_webhook(bind, allowed, f"{receiver.url}/jobs?a=b")
    fail(bind, job.id)
    assert (send(bind, allowed), send(bind, allowed)) == (1, 0)
    ((path, headers, body),) = receiver.came
    assert path == "/in/jobs?a=b"
    assert headers["content-type"] == "application/json"
    key = base64.b64decode(webhook.secret.removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"

    told: Any = openai.OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=webhook.secret)
    assert (told.type, told.object, told.data.id) == ("fine_tuning.job.failed", "event", job.id)
    assert abs(told.created_at - time.time()) < 60
    raw = json.loads(body)
    assert raw["id"] == headers["webhook-id"] == deliveries(bind, webhook)[0].event_id
    assert datetime.fromisoformat(raw["timestamp"]).timestamp() == pytest.approx(raw["created_at"], abs=1)
    shown = {name: ERROR[name] for name in ("code", "message", "step", "hint")}
    facts = {"id": job.id, "status": "failed", "attempt": 1, "step": 0, "output_model": None, "error": shown}
    assert raw["data"] == facts
    assert state(bind, webhook) == ("delivered", 1, 204, None)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="none").webhooks.unwrap(body + b" ", headers, secret=webhook.secret)


def test_every_state_has_a_type_and_each_webhook_hears_what_it_wants(
    bind: Engine, storage: Storage, receiver: Receiver, allowed: Allowed
) -> None:
    assert get_args(EventType) == outbox.TYPES
    everything = add_webhook(bind, allowed, receiver.url, events=outbox.TYPES)
    paused = add_webhook(bind, allowed, receiver.url, events=("fine_tuning.job.paused",))
    ends = add_webhook(bind, allowed, receiver.url)
    job = add_job(bind, add_dataset(bind, storage).id)
    claim(bind, job.id)
    with transaction(bind) as session:
        jobs.request(session, job.id, "pause")
        runs.finish(session, job.id, 1, "paused")
        jobs.request(session, job.id, "cancel")
    types = {row.id: sorted(delivery.type for delivery in deliveries(bind, row)) for row in (everything, paused, ends)}
    names = [f"fine_tuning.job.{status}" for status in ("cancelled", "paused", "running")]
    assert types == {everything.id: names, paused.id: names[1:2], ends.id: names[:1]}
    ids = [delivery.event_id for row in (everything, ends) for delivery in deliveries(bind, row)]
    assert len(set(ids)) == 3  # one id for an event, however many hear of it


def test_what_is_told_is_committed_with_the_state_or_not_at_all(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed
) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    with pytest.raises(ZeroDivisionError), transaction(bind) as session:
        jobs.request(session, job.id, "cancel")
        1 / 0  # noqa: B018
    assert (send(bind, allowed), deliveries(bind, webhook)) == (0, [])
    with transaction(bind) as session:
        jobs.request(session, job.id, "cancel")
        assert send(bind, allowed) == 0  # not before the commit
    assert send(bind, allowed) == 1


def test_a_job_asks_for_webhooks_where_it_ends_and_not_where_it_is_made(
    bind: Engine, storage: Storage, job: Job
) -> None:
    statements: list[str] = []
    dataset = add_dataset(bind, storage).id
    event.listen(bind, "before_cursor_execute", lambda _c, _u, statement, *_: statements.append(statement))
    add_job(bind, dataset)
    assert not [statement for statement in statements if "webhook" in statement]
    with transaction(bind) as session:
        jobs.request(session, job.id, "cancel")
    assert len([statement for statement in statements if "webhook" in statement]) == 1


def test_a_webhook_that_is_being_deleted_does_not_stop_the_job(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed
) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    with transaction(bind) as session:
        webhooks.delete(session, webhook.id)
        ending = threading.Thread(target=fail, args=(bind, job.id))
        ending.start()
        waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        wait_for("the job to wait for the deletion", lambda: bool(session.scalar(waits)))
    ending.join()
    with transaction(bind) as session:
        assert jobs.get(session, job.id).status == "failed"


def test_a_refusal_is_followed_by_further_attempts_under_one_id_and_less_and_less_often(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed
) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    fail(bind, job.id)
    for number, seconds in enumerate(outbox.RETRY_SECONDS, start=1):
        receiver.answers.append((500, {}))
        assert (send(bind, allowed), send(bind, allowed)) == (1, 0)
        assert state(bind, webhook) == ("pending", number, 500, "refused")
        assert seconds <= wait_seconds(bind, webhook) <= seconds * 1.2 + 60
        pass_time(bind)
    receiver.answers.append((500, {}))
    assert send(bind, allowed) == 1
    assert state(bind, webhook) == ("failed", 10, 500, "refused")
    pass_time(bind)
    assert send(bind, allowed) == 0
    assert len(set(receiver.ids)) == 1
    assert len({body for _, _, body in receiver.came}) == 1
    with transaction(bind) as session:
        assert webhooks.get(session, webhook.id).disabled_at is None  # all of that within a second


def test_days_of_nothing_but_failures_disable_a_webhook_and_a_success_starts_them_anew(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed
) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    fail(bind, job.id)
    receiver.answers.append((500, {}))
    send(bind, allowed)
    long_ago = datetime.now(UTC) - timedelta(days=4)
    with transaction(bind) as session:
        session.execute(update(Webhook).values(failing_since=long_ago))
    pass_time(bind)
    send(bind, allowed)
    with transaction(bind) as session:
        assert webhooks.get(session, webhook.id).failing_since is None
        session.execute(update(Webhook).values(failing_since=long_ago))
        session.execute(update(WebhookDelivery).values(status="pending", attempts=9, finished_at=None))
        waiting = webhooks.test(session, webhook.id)
    pass_time(bind)
    receiver.answers.append((302, {"Location": receiver.url}))
    send(bind, allowed)
    by_id = {delivery.event_id: delivery for delivery in deliveries(bind, webhook)}
    assert {delivery.status for delivery in by_id.values()} == {"failed"}
    assert by_id[waiting.event_id].error == "failing"
    with transaction(bind) as session:
        assert webhooks.get(session, webhook.id).disabled_reason == "failing"
        assert webhooks.enable(session, webhook.id).disabled_at is None


def test_gone_disables_at_once(bind: Engine, storage: Storage, receiver: Receiver, allowed: Allowed) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    dataset = add_dataset(bind, storage).id
    receiver.answers.append((410, {}))
    fail(bind, add_job(bind, dataset).id)
    send(bind, allowed)
    assert state(bind, webhook) == ("failed", 1, 410, "refused")
    fail(bind, add_job(bind, dataset).id)
    assert len(deliveries(bind, webhook)) == 1


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [
        ("100", 100, 190),
        ("0", 5, 70),
        ("nonsense", 5, 70),
        ("-5", 5, 70),
        ("9" * 30, 86_400, 86_400 * 1.2 + 60),
        ("Fri, 31 Dec 9999 23:59:59 -1200", 5, 70),
        ("Sun, 06 Nov 1994 08:49:37 +99999999999999999999", 5, 70),
        (1, 3_000, 3_600 * 1.2 + 60),
        (-1, 5, 70),
    ],
)
def test_retry_after_is_heard_within_bounds(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed, retry_after: str | int, least: float, most: float
) -> None:
    """A number stands for the date in so many hours."""
    if isinstance(retry_after, int):
        retry_after = format_datetime(datetime.now(UTC) + timedelta(hours=retry_after), usegmt=True)
    webhook = add_webhook(bind, allowed, receiver.url)
    fail(bind, job.id)
    receiver.answers.append((503, {"Retry-After": retry_after}))
    send(bind, allowed)
    assert least <= wait_seconds(bind, webhook) <= most


def test_what_nobody_foresaw_is_an_outcome_too(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    fail(bind, job.id)
    monkeypatch.setattr("worker.webhooks._outcome", lambda _: dict[str, Any]()["what nobody thought of"])
    assert send(bind, allowed) == 1
    assert state(bind, webhook) == ("pending", 1, None, "unreachable")


@pytest.mark.parametrize(("asked", "told"), [(None, "attempts_exhausted"), ("pause", None), ("cancel", None)])
def test_a_webhook_hears_of_the_error_that_the_job_has(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed, asked: Action | None, told: str | None
) -> None:
    """Not of what ended the last attempt of a job that then rests because it was asked to."""
    add_webhook(bind, allowed, receiver.url, events=outbox.TYPES)
    claim(bind, job.id)
    with transaction(bind) as session:
        if asked is not None:
            jobs.request(session, job.id, asked)
        crash = {"code": "trainer_crashed", "message": "m", "step": 0, "hint": None}
        ended = runs.release(session, job.id, 1, "trainer_failed", progressed=False, max_failures=1, error=crash)
        error, cause = ended.error, events.page(session, job.id)[0][-1].data.get("cause")
    for _ in range(2):  # of the start, too
        send(bind, allowed)
        pass_time(bind)
    (data,) = (
        body["data"] for _, _, text in receiver.came for body in [json.loads(text)] if "running" not in body["type"]
    )
    assert (data["error"] or {}).get("code") == (error or {}).get("code") == told
    assert asked is None or cause == crash


def test_a_test_that_waits_is_sent_when_it_is_asked_for_again(
    bind: Engine, receiver: Receiver, allowed: Allowed
) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    receiver.answers.append((500, {}))
    for expected in ("pending", "delivered"):
        with transaction(bind, "default") as session:
            webhooks.test(session, webhook.id)
        assert send(bind, allowed) == 1
        assert state(bind, webhook)[0] == expected


def test_redirects_are_not_followed_and_what_is_not_allowed_any_more_is_not_asked(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    webhook = add_webhook(bind, allowed, receiver.url)
    fail(bind, job.id)
    receiver.answers.append((307, {"Location": f"{receiver.url}/elsewhere"}))
    send(bind, allowed)
    assert state(bind, webhook) == ("pending", 1, 307, "redirected")
    assert [path for path, _, _ in receiver.came] == ["/in"]
    pass_time(bind)
    send(bind, Allowed.parse("https://other.example"))
    assert state(bind, webhook) == ("pending", 2, None, "not_allowed")
    assert len(receiver.came) == 1
    nobody = Allowed.parse("http://127.0.0.1:1")
    with transaction(bind) as session:
        session.execute(update(Webhook).values(url="http://127.0.0.1:1/"))
    pass_time(bind)
    send(bind, nobody)
    assert state(bind, webhook) == ("pending", 3, None, "unreachable")


def test_one_who_does_not_answer_holds_up_no_other(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.webhooks.TOTAL_SECONDS", 0.5)
    slow = add_webhook(bind, allowed, f"{receiver.url}/slow")
    with transaction(bind) as session:
        webhooks.test(session, slow.id)
    fail(bind, job.id)
    receiver.hold.clear()

    async def run() -> None:
        async with Sender(bind, allowed) as sender:
            assert await sender.start_due() == 1
            assert await sender.start_due() == 0  # one at a time for each webhook
            quick = add_webhook(bind, allowed, f"{receiver.url}/quick")
            with transaction(bind) as session:
                webhooks.test(session, quick.id)
            assert await sender.start_due() == 1

    asyncio.run(run())
    assert sorted(path for path, _, _ in receiver.came) == ["/in/quick", "/in/slow"]
    assert sorted((delivery.attempts, delivery.error) for delivery in deliveries(bind, slow)) == [
        (0, None),
        (1, "timeout"),
    ]


def test_a_sender_that_is_killed_is_followed_by_another_with_the_same_id(
    bind: Engine, job: Job, receiver: Receiver, settings: Settings
) -> None:
    webhook = add_webhook(bind, Allowed.parse(receiver.url), receiver.url)
    fail(bind, job.id)
    receiver.hold.clear()
    first = start_sender(settings, receiver)
    wait_for("the first attempt", lambda: receiver.came, seconds=30)
    first.kill()
    first.wait()
    assert state(bind, webhook)[:2] == ("pending", 1)
    assert send(bind, Allowed.parse(receiver.url)) == 0  # its time is not over
    receiver.hold.set()
    pass_time(bind)
    second = start_sender(settings, receiver)
    wait_for("the second attempt", lambda: state(bind, webhook)[0] == "delivered", seconds=30)
    second.send_signal(signal.SIGTERM)
    assert second.wait(10) == 0
    assert receiver.ids == [deliveries(bind, webhook)[0].event_id] * 2


def start_sender(settings: Settings, receiver: Receiver) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "DATABASE_URL": settings.database_url,
        "REDIS_URL": settings.redis_url,
        "SLIMTUNE_DATA_DIR": str(settings.data_dir),
        "SLIMTUNE_WEBHOOK_ALLOWED": receiver.url,
    }
    return subprocess.Popen([sys.executable, "-m", "worker.webhooks"], cwd=ROOT, env=environment)


def test_an_attempt_that_another_has_followed_settles_nothing(
    bind: Engine, job: Job, receiver: Receiver, allowed: Allowed
) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    fail(bind, job.id)
    with transaction(bind) as session:
        (stale,) = outbox.claim(session, 10)
        assert webhook.secret not in repr(stale)
    pass_time(bind)
    with transaction(bind) as session:
        (current,) = outbox.claim(session, 10)
        outbox.record(session, stale, outbox.Outcome(500, "refused"))
    assert state(bind, webhook) == ("pending", 2, None, None)
    with transaction(bind) as session:
        assert outbox.claim(session, 10) == []
        outbox.record(session, current, outbox.Outcome(204))
        outbox.record(session, stale, outbox.Outcome(500, "refused"))
    assert state(bind, webhook) == ("delivered", 2, 204, None)


def test_while_a_secret_is_changed_both_sign(bind: Engine, receiver: Receiver, allowed: Allowed) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    with transaction(bind) as session:
        new = webhooks.rotate(session, webhook.id).secret
        webhooks.test(session, webhook.id)
    send(bind, allowed)
    _, headers, body = receiver.came[0]
    for secret in (webhook.secret, new):
        openai.OpenAI(api_key="none").webhooks.verify_signature(body, headers, secret=secret)
    with transaction(bind) as session:
        session.execute(update(Webhook).values(old_secret_until=datetime.now(UTC) - timedelta(seconds=1)))
        webhooks.test(session, webhook.id)
    send(bind, allowed)
    _, headers, body = receiver.came[1]
    openai.OpenAI(api_key="none").webhooks.verify_signature(body, headers, secret=new)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="none").webhooks.verify_signature(body, headers, secret=webhook.secret)
    with transaction(bind) as session:
        outbox.forget_done(session)
    with transaction(bind) as session:
        assert webhooks.get(session, webhook.id).old_secret is None


def test_what_was_done_with_a_month_ago_is_forgotten(bind: Engine, receiver: Receiver, allowed: Allowed) -> None:
    webhook = add_webhook(bind, allowed, receiver.url)
    kept = []
    for days, status in ((31, "delivered"), (31, "failed"), (29, "delivered"), (31, "pending")):
        with transaction(bind) as session:
            delivery = webhooks.test(session, webhook.id)
            delivery.status, delivery.finished_at = status, None if status == "pending" else ago(days)
            kept.append(delivery.event_id)
    with transaction(bind) as session:
        outbox.forget_done(session)
    assert sorted(delivery.event_id for delivery in deliveries(bind, webhook)) == kept[2:]


def ago(days: int) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


def test_a_tenant_hears_of_its_own_jobs_alone(
    bind: Engine, storage: Storage, receiver: Receiver, allowed: Allowed
) -> None:
    mine = add_webhook(bind, allowed, receiver.url, tenant="acme")
    theirs = add_webhook(bind, allowed, receiver.url, tenant="other")
    dataset = add_dataset(bind, storage, tenant="acme").id
    fail(bind, add_job(bind, dataset, tenant="acme").id)
    assert (len(deliveries(bind, mine)), len(deliveries(bind, theirs))) == (1, 0)
    with transaction(bind, "other") as session:
        assert [row.id for row in webhooks.page(session)[0]] == [theirs.id]
        for act in (
            webhooks.get,
            webhooks.delete,
            webhooks.rotate,
            webhooks.enable,
            webhooks.test,
            webhooks.deliveries,
        ):
            with pytest.raises(NotFoundError):
                act(session, mine.id)


def test_a_tenant_has_twenty_at_most_where_the_operator_allows_any(
    bind: Engine, receiver: Receiver, allowed: Allowed
) -> None:
    for error, where in (
        (WebhooksOffError, Allowed()),
        (WebhookUrlNotAllowedError, Allowed.parse("https://a.example")),
    ):
        with pytest.raises(error):
            add_webhook(bind, where, receiver.url)
    for _ in range(webhooks.MOST):
        add_webhook(bind, allowed, receiver.url)
    with pytest.raises(TooManyWebhooksError):
        add_webhook(bind, allowed, receiver.url)
    add_webhook(bind, allowed, receiver.url, tenant="other")


@pytest.fixture
def hooked(settings: Settings, receiver: Receiver) -> Iterator[TestClient]:
    app = create_app(settings.model_copy(update={"webhook_allowed": receiver.url}))
    with TestClient(app, base_url="http://127.0.0.1") as running:
        yield running


def test_webhooks_over_http(hooked: TestClient, bind: Engine, receiver: Receiver, allowed: Allowed) -> None:
    created = hooked.post("/webhooks", json={"url": receiver.url, "name": "mine"})
    assert created.status_code == 201
    body = created.json()
    assert created.headers["location"] == f"/webhooks/{body['id']}"
    secret = body.pop("secret")
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret[6:])) == 32
    assert body["events"] == list(outbox.DEFAULT_TYPES)
    url = f"/webhooks/{body['id']}"
    assert hooked.get(url).json() == body
    assert hooked.get("/webhooks").json() == {"data": [body], "has_more": False}

    asked = hooked.post(f"{url}/test")
    assert (asked.status_code, asked.json()["type"], asked.json()["status"]) == (202, "webhook.test", "pending")
    assert hooked.post(f"{url}/test").json()["id"] == asked.json()["id"]
    send(bind, allowed)
    (delivery,) = hooked.get(f"{url}/deliveries").json()["data"]
    assert (delivery["id"], delivery["status"], delivery["response_status"]) == (receiver.ids[0], "delivered", 204)
    told: Any = openai.OpenAI(api_key="none").webhooks.unwrap(receiver.came[0][2], receiver.came[0][1], secret=secret)
    assert (told.type, told.data.id) == ("webhook.test", body["id"])  # a type that its package does not know

    changed = hooked.post(f"{url}/rotate").json()
    assert changed["secret"] not in ("", secret)
    assert changed["old_secret_until"] is not None
    with transaction(bind) as session:
        outbox.disable(session, webhooks.get(session, body["id"]), "gone", datetime.now(UTC))
    refused = hooked.post(f"{url}/test")
    assert (refused.status_code, refused.json()["code"]) == (409, "webhook_disabled")
    assert hooked.post(f"{url}/enable").json()["disabled_at"] is None
    assert hooked.delete(url).status_code == 204
    assert hooked.get(url).json()["code"] == hooked.get(f"{url}/deliveries").json()["code"] == "webhook_not_found"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"url": "https://other.example"}, 403, "webhook_url_not_allowed"),
        ({"url": "https://user@other.example"}, 422, "webhook_url_invalid"),
        ({"url": "x" * 3_000}, 422, "invalid_request"),
        ({"url": "https://a.example", "events": []}, 422, "invalid_request"),
        ({"url": "https://a.example", "events": ["fine_tuning.job.exploded"]}, 422, "invalid_request"),
        ({"url": "https://a.example", "secret": "whsec_mine"}, 422, "invalid_request"),
        ({}, 422, "invalid_request"),
    ],
)
def test_what_is_no_webhook(hooked: TestClient, body: dict[str, Any], status: int, code: str) -> None:
    answer = hooked.post("/webhooks", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_webhooks_are_off_by_default(client: TestClient) -> None:
    answer = client.post("/webhooks", json={"url": "https://a.example"})
    assert (answer.status_code, answer.json()["code"]) == (403, "webhooks_off")
