"""What requests for webhooks may say, and their answers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import Text
from service.webhook_urls import MAX_URL_LENGTH

EventType = Literal[
    "fine_tuning.job.running",
    "fine_tuning.job.paused",
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
]


class WebhookRequest(BaseModel):
    """Where to send what."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Annotated[Text, Field(min_length=1, max_length=MAX_URL_LENGTH)] = Field(
        description="Below an address that the operator has allowed."
    )
    events: Annotated[list[EventType], Field(min_length=1, max_length=20)] = Field(
        ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"],
        description="What to be told of; without it the ends of jobs.",
    )
    name: Annotated[Text, Field(min_length=1, max_length=200)] | None = None


class WebhookResponse(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str | None
    url: str
    events: list[str]
    created_at: datetime
    old_secret_until: datetime | None = Field(description="Until then the secret before the last change signs too.")
    failing_since: datetime | None = Field(description="Of the first failure after the last success.")
    disabled_at: datetime | None
    disabled_reason: str | None = Field(
        description="`gone`: it answered 410. `failing`: nothing but failures for three days."
    )


class WebhookWithSecret(WebhookResponse):
    secret: str = Field(description="What verifies signatures. It is shown once.")


class DeliveryResponse(BaseModel):
    """An event for one webhook."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(validation_alias="event_id", description="`webhook-id`, the same in each attempt.")
    type: str
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    response_status: int | None = Field(description="HTTP status of the last attempt; null if there was no answer.")
    error: str | None = Field(
        description="Why the last attempt failed: `refused` (any status but 2xx), `redirected`, `timeout`, "
        "`unreachable`, `not_allowed` (by the operator, any more), or why the webhook was disabled."
    )
    created_at: datetime
    last_attempt_at: datetime | None
    next_attempt_at: datetime | None = Field(description="Null once it is done with.")
    finished_at: datetime | None


WEBHOOK_EXAMPLES: dict[str, Any] = {
    "ends": {
        "summary": "Be told when jobs end",
        "value": {"url": "https://hooks.example.com/slimtune", "name": "production"},
    },
}
