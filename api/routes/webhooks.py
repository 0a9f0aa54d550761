"""Webhooks: where a tenant wants to be told of its jobs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Response

from api.dependencies import ContextDep, Limit, SessionDep
from api.problems import documented
from api.responses import Page
from api.webhook_schemas import (
    WEBHOOK_EXAMPLES,
    DeliveryResponse,
    WebhookRequest,
    WebhookResponse,
    WebhookWithSecret,
)
from service import webhooks
from service.webhook_urls import Allowed

router = APIRouter(prefix="/webhooks", tags=["webhooks"])

CREATED: dict[int | str, dict[str, Any]] = {
    201: {"headers": {"Location": {"description": "The webhook.", "schema": {"type": "string"}}}}
}


@router.post(
    "",
    status_code=201,
    summary="Create a webhook",
    responses=documented(
        400,
        "403 webhooks_off",
        "403 webhook_url_not_allowed",
        "409 too_many_webhooks",
        422,
        "422 webhook_url_invalid",
    )
    | CREATED,
)
def create(
    request: Annotated[WebhookRequest, Body(openapi_examples=WEBHOOK_EXAMPLES)],
    session: SessionDep,
    context: ContextDep,
    response: Response,
) -> WebhookWithSecret:
    """Only to an address that the operator has allowed. `secret` is in this answer alone: keep it."""
    allowed = Allowed.parse(context.settings.webhook_allowed)
    row = webhooks.create(session, allowed, url=request.url, events=request.events, name=request.name)
    response.headers["Location"] = f"/webhooks/{row.id}"
    return WebhookWithSecret.model_validate(row)


@router.get("", summary="List webhooks", responses=documented(422))
def list_page(
    session: SessionDep,
    after: Annotated[
        str | None, Query(pattern="^wh_[0-9a-f]{32}$", description="The last id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> Page[WebhookResponse]:
    """Newest first, without their secrets."""
    rows, has_more = webhooks.page(session, after, limit)
    return Page[WebhookResponse](data=[WebhookResponse.model_validate(row) for row in rows], has_more=has_more)


@router.get("/{webhook_id}", summary="Get a webhook", responses=documented("404 webhook_not_found"))
def get(webhook_id: str, session: SessionDep) -> WebhookResponse:
    return WebhookResponse.model_validate(webhooks.get(session, webhook_id))


@router.delete(
    "/{webhook_id}", status_code=204, summary="Delete a webhook", responses=documented("404 webhook_not_found")
)
def delete(webhook_id: str, session: SessionDep) -> None:
    """With its deliveries, sent or not."""
    webhooks.delete(session, webhook_id)


@router.post(
    "/{webhook_id}/rotate", summary="Give a webhook a new secret", responses=documented("404 webhook_not_found")
)
def rotate(webhook_id: str, session: SessionDep) -> WebhookWithSecret:
    """For 24 hours everything is signed with the secret before it as well."""
    return WebhookWithSecret.model_validate(webhooks.rotate(session, webhook_id))


@router.post(
    "/{webhook_id}/enable", summary="Send to a disabled webhook again", responses=documented("404 webhook_not_found")
)
def enable(webhook_id: str, session: SessionDep) -> WebhookResponse:
    """What happens from now on; what was not sent is not sent later."""
    return WebhookResponse.model_validate(webhooks.enable(session, webhook_id))


@router.post(
    "/{webhook_id}/test",
    status_code=202,
    summary="Send a test event",
    responses=documented("404 webhook_not_found", "409 webhook_disabled"),
)
def test(webhook_id: str, session: SessionDep) -> DeliveryResponse:
    """`webhook.test`, through the same queue as all others. While one waits to be sent, that one is the answer."""
    return DeliveryResponse.model_validate(webhooks.test(session, webhook_id))


@router.get("/{webhook_id}/deliveries", summary="List deliveries", responses=documented("404 webhook_not_found", 422))
def list_deliveries(
    webhook_id: str,
    session: SessionDep,
    after: Annotated[
        str | None, Query(pattern="^evt_[0-9a-f]{32}$", description="The last id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> Page[DeliveryResponse]:
    """What was sent in the last 30 days or is to be sent, newest first."""
    rows, has_more = webhooks.deliveries(session, webhook_id, after, limit)
    return Page[DeliveryResponse](data=[DeliveryResponse.model_validate(row) for row in rows], has_more=has_more)
