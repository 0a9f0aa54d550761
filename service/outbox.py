"""What is to be told to webhooks: written with what it tells of, claimed by senders, tried until it is heard.

An event goes to each webhook at least once, under one id. Every function works in the caller's transaction and commits
nothing. Times are the database's.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, literal, null, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.ids import new_id
from service.models import Job, Webhook, WebhookDelivery

JOB_EVENTS = {
    "started": "running",
    "paused": "paused",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
"""Events of a job (events.py) that webhooks hear of, and what the job is then."""
TYPES = tuple(f"fine_tuning.job.{status}" for status in JOB_EVENTS.values())
DEFAULT_TYPES = TYPES[2:]
"""The ends."""
TEST = "webhook.test"

PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"

RETRY_SECONDS = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""After each failed attempt but the last: three days together. The schedule of Standard Webhooks."""
JITTER = 0.2
"""Up to this share more, so that what failed together does not come back together."""
MAX_RETRY_AFTER_SECONDS = 86_400
LEASE = timedelta(seconds=60)
"""How long a sender has for an attempt; when it is over, another sends again."""
HOPELESS = timedelta(days=3)
"""Of nothing but failures, after which a webhook whose delivery has failed for good is disabled."""
KEPT = timedelta(days=30)
FORGET_AT_ONCE = 1_000


@dataclass(frozen=True, slots=True)
class Claimed:
    """One attempt."""

    webhook_id: str
    event_id: str
    attempt: int
    url: str
    body: bytes
    keys: tuple[str, ...]
    """Secrets to sign with, the newest first."""

    def __repr__(self) -> str:
        return f"Claimed({self.webhook_id}, {self.event_id}, {self.attempt})"  # without secrets, for logs


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of an attempt: an HTTP status, or what was in the way of one."""

    response_status: int | None = None
    error: str | None = None
    """`refused` (any status but 2xx), `redirected`, `timeout`, `unreachable` or `not_allowed`; None for success."""
    retry_after_seconds: float | None = None

    @property
    def is_gone(self) -> bool:
        return self.response_status == 410


def message(event_id: str, event_type: str, data: dict[str, Any]) -> str:
    """The body, which both the libraries of Standard Webhooks and OpenAI's read."""
    now = datetime.now(UTC)
    body = {
        "id": event_id,
        "object": "event",
        "type": event_type,
        "created_at": int(now.timestamp()),
        "timestamp": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "data": data,
    }
    return json.dumps(body, separators=(",", ":"), allow_nan=False)


def announce(session: Session, job_id: str, attempt: int, job_event: str, data: dict[str, Any]) -> None:
    """Tell the webhooks of the job's tenant that want it; one query, whether there are such or not.

    Their rows are locked against deletion, or the job could not change while one is being deleted.
    """
    event_id = new_id("evt")
    status = JOB_EVENTS[job_event]
    error = data.get("error") and {name: data["error"].get(name) for name in ("code", "message", "step", "hint")}
    facts = {"id": job_id, "status": status, "attempt": attempt, "step": data.get("step")}
    facts |= {"output_model": data.get("output_model"), "error": error}
    kind = f"fine_tuning.job.{status}"
    wanting = (
        select(Webhook.id, literal(event_id), literal(kind), Job.id, literal(message(event_id, kind, facts)))
        .join(Job, Job.tenant == Webhook.tenant)
        .where(Job.id == job_id, Webhook.disabled_at.is_(None), Webhook.events.contains([kind]))
        .with_for_update(read=True, key_share=True, of=Webhook)
    )
    session.execute(insert(WebhookDelivery).from_select(["webhook_id", "event_id", "type", "job_id", "body"], wanting))


def claim(session: Session, limit: int) -> list[Claimed]:
    """Up to `limit` attempts that are due, one for each webhook that nobody sends to now.

    Before anything is sent the next attempt is set, and the webhook is marked as busy: a sender that dies is followed
    by another, and no two send at once. The webhook that was sent to the longest ago comes first.
    """
    now = func.clock_timestamp()
    due = (WebhookDelivery.status == PENDING, WebhookDelivery.next_attempt_at <= now)
    free = (
        select(Webhook)
        .where(
            Webhook.disabled_at.is_(None),
            func.coalesce(Webhook.busy_until, now) <= now,
            select(WebhookDelivery.event_id).where(WebhookDelivery.webhook_id == Webhook.id, *due).exists(),
        )
        .order_by(Webhook.sent_at.nulls_first())
        .limit(limit)
        .with_for_update(skip_locked=True, key_share=True)
    )
    claimed = []
    for webhook in session.scalars(free, execution_options={"populate_existing": True}).all():
        mine = (WebhookDelivery.webhook_id == webhook.id, *due)
        first = select(WebhookDelivery.event_id).where(*mine).order_by(WebhookDelivery.next_attempt_at).limit(1)
        attempt = session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.webhook_id == webhook.id, WebhookDelivery.event_id == first.scalar_subquery())
            .values(attempts=WebhookDelivery.attempts + 1, last_attempt_at=now, next_attempt_at=now + LEASE)
            .returning(WebhookDelivery.event_id, WebhookDelivery.attempts, WebhookDelivery.body, now),
            execution_options={"synchronize_session": False},
        ).one_or_none()
        if attempt is None:
            continue  # another has sent it since this statement looked
        event_id, number, body, started = attempt
        webhook.sent_at, webhook.busy_until = started, started + LEASE
        old = webhook.old_secret if webhook.old_secret_until and webhook.old_secret_until > started else None
        keys = tuple(filter(None, (webhook.secret, old)))
        claimed.append(Claimed(webhook.id, event_id, number, webhook.url, body.encode(), keys))
    session.flush()
    return claimed


def record(session: Session, claimed: Claimed, outcome: Outcome) -> None:
    """Note what became of an attempt, unless another has been made since, and set the next one or none."""
    webhook = session.get(Webhook, claimed.webhook_id, with_for_update={"key_share": True}, populate_existing=True)
    if webhook is None:
        return  # deleted meanwhile, with its deliveries
    now = session.scalars(select(func.clock_timestamp())).one()
    values: dict[str, Any] = {"response_status": outcome.response_status, "error": outcome.error}
    wait = None if outcome.error is None else _wait(claimed.attempt, outcome)
    if wait is None:
        status = DELIVERED if outcome.error is None else FAILED
        values |= {"status": status, "next_attempt_at": null(), "finished_at": now}
    else:
        values["next_attempt_at"] = now + timedelta(seconds=wait)
    mine = (
        WebhookDelivery.webhook_id == claimed.webhook_id,
        WebhookDelivery.event_id == claimed.event_id,
        WebhookDelivery.attempts == claimed.attempt,
        WebhookDelivery.status == PENDING,
    )
    noted = session.execute(
        update(WebhookDelivery).where(*mine).values(values).returning(WebhookDelivery.event_id),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    if noted is None:
        return
    webhook.busy_until = None
    if outcome.error is None:
        webhook.failing_since = None
    else:
        webhook.failing_since = webhook.failing_since or now
    if outcome.is_gone:
        disable(session, webhook, "gone", now)
    elif wait is None and webhook.failing_since is not None and webhook.failing_since <= now - HOPELESS:
        disable(session, webhook, "failing", now)


def disable(session: Session, webhook: Webhook, reason: str, now: datetime) -> None:
    """Send nothing to it any more: what waits for it has failed."""
    webhook.disabled_at, webhook.disabled_reason = now, reason
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.webhook_id == webhook.id, WebhookDelivery.status == PENDING)
        .values(status=FAILED, next_attempt_at=null(), finished_at=now, error=reason),
        execution_options={"synchronize_session": False},
    )


def forget_done(session: Session) -> None:
    """Delete deliveries that were done with `KEPT` ago, up to `FORGET_AT_ONCE`, and secrets that sign no more."""
    session.execute(
        update(Webhook).where(Webhook.old_secret_until <= func.now()).values(old_secret=None, old_secret_until=None),
        execution_options={"synchronize_session": False},
    )
    columns = (WebhookDelivery.webhook_id, WebhookDelivery.event_id)
    old = (WebhookDelivery.status != PENDING, WebhookDelivery.finished_at <= func.now() - KEPT)
    oldest = select(*columns).where(*old).order_by(WebhookDelivery.finished_at).limit(FORGET_AT_ONCE)
    session.execute(
        delete(WebhookDelivery).where(tuple_(*columns).in_(oldest.with_for_update(skip_locked=True))),
        execution_options={"synchronize_session": False},
    )


def _wait(attempt: int, outcome: Outcome) -> float | None:
    """Seconds to the next attempt; None if there is none."""
    if outcome.is_gone or attempt > len(RETRY_SECONDS):
        return None
    asked = min(outcome.retry_after_seconds or 0.0, MAX_RETRY_AFTER_SECONDS)
    return max(RETRY_SECONDS[attempt - 1], asked) * (1 + random.uniform(0, JITTER))  # noqa: S311  # no secret
