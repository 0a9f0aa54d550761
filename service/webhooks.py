"""Webhooks from their tenant's side. What is sent to them is in outbox.py.

Every function works in the caller's transaction and commits nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service import database, outbox, signatures, webhook_urls
from service.errors import (
    NotFoundError,
    TooManyWebhooksError,
    WebhookDisabledError,
    WebhooksOffError,
    WebhookUrlInvalidError,
    WebhookUrlNotAllowedError,
)
from service.ids import is_id, new_id
from service.models import Webhook, WebhookDelivery
from service.pages import newest_first
from service.webhook_urls import Allowed, UrlError

MOST = 20
"""Of one tenant."""
OLD_SECRET_SIGNS = timedelta(hours=24)


def create(
    session: Session,
    allowed: Allowed,
    *,
    url: str,
    events: Sequence[str] = outbox.DEFAULT_TYPES,
    name: str | None = None,
) -> Webhook:
    """A new webhook; its `secret` is for the answer alone.

    Raises WebhooksOffError, WebhookUrlInvalidError, WebhookUrlNotAllowedError, TooManyWebhooksError.
    """
    if not allowed.prefixes:
        raise WebhooksOffError
    try:
        target = webhook_urls.parse(url)
    except UrlError as error:
        raise WebhookUrlInvalidError(str(error)) from None
    if not allowed.covers(target):
        raise WebhookUrlNotAllowedError
    tenant = database.tenant_of(session)
    session.execute(select(func.pg_advisory_xact_lock(_lock_of(tenant))))  # or two could both be the last
    if session.scalars(select(func.count()).select_from(Webhook).where(Webhook.tenant == tenant)).one() >= MOST:
        raise TooManyWebhooksError(MOST)
    webhook = Webhook(
        id=new_id("wh"),
        tenant=tenant,
        name=name,
        url=target.url,
        events=list(dict.fromkeys(events)),
        secret=signatures.new_secret(),
    )
    session.add(webhook)
    session.flush()
    session.refresh(webhook)
    return webhook


def get(session: Session, webhook_id: str, *, lock: bool = False) -> Webhook:
    """The webhook. Raises NotFoundError."""
    query = select(Webhook).where(Webhook.id == webhook_id)
    if lock:
        query = query.with_for_update(key_share=True)
    webhook = session.scalars(query).one_or_none() if is_id("wh", webhook_id) else None
    if webhook is None:
        raise NotFoundError("webhook", webhook_id)
    return webhook


def page(session: Session, after: str | None = None, limit: int = 20) -> tuple[list[Webhook], bool]:
    """Newest first, and whether there are more."""
    return newest_first(session, select(Webhook), Webhook.id, after, limit)


def delete(session: Session, webhook_id: str) -> None:
    """With all that was or would have been sent to it. Raises NotFoundError."""
    session.delete(get(session, webhook_id))
    session.flush()


def rotate(session: Session, webhook_id: str) -> Webhook:
    """A new secret; the one before it signs too for `OLD_SECRET_SIGNS`. Raises NotFoundError."""
    webhook = get(session, webhook_id, lock=True)
    webhook.old_secret = webhook.secret
    webhook.secret = signatures.new_secret()
    webhook.old_secret_until = session.scalars(select(func.now())).one() + OLD_SECRET_SIGNS
    session.flush()
    return webhook


def enable(session: Session, webhook_id: str) -> Webhook:
    """Send to a disabled webhook again what happens from now on. Raises NotFoundError."""
    webhook = get(session, webhook_id, lock=True)
    webhook.disabled_at = webhook.disabled_reason = webhook.failing_since = None
    session.flush()
    return webhook


def test(session: Session, webhook_id: str) -> WebhookDelivery:
    """Have a `webhook.test` event sent; one that is still to be sent is sent now, and not joined by another.

    Raises NotFoundError, WebhookDisabledError.
    """
    webhook = get(session, webhook_id, lock=True)
    if webhook.disabled_at is not None:
        raise WebhookDisabledError(webhook_id, webhook.disabled_reason)
    waiting = select(WebhookDelivery).where(
        WebhookDelivery.webhook_id == webhook_id,
        WebhookDelivery.type == outbox.TEST,
        WebhookDelivery.status == outbox.PENDING,
    )
    delivery = session.scalars(waiting).first()
    if delivery is None:
        event_id = new_id("evt")
        body = outbox.message(event_id, outbox.TEST, {"id": webhook_id})
        delivery = WebhookDelivery(webhook_id=webhook_id, event_id=event_id, type=outbox.TEST, body=body)
        session.add(delivery)
        session.flush()
        session.refresh(delivery)
    else:  # the tenant may have mended the receiver since
        delivery.next_attempt_at = session.scalars(select(func.now())).one()
    return delivery


def deliveries(
    session: Session, webhook_id: str, after: str | None = None, limit: int = 20
) -> tuple[list[WebhookDelivery], bool]:
    """What was sent or is to be sent, newest first, and whether there is more. Raises NotFoundError."""
    get(session, webhook_id)
    query = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
    return newest_first(session, query, WebhookDelivery.event_id, after, limit)


def _lock_of(tenant: str) -> int:
    """A key of 64 bits for an advisory lock."""
    return int.from_bytes(hashlib.sha256(f"webhooks of {tenant}".encode()).digest()[:8], signed=True)
