"""Errors of webhooks."""

from __future__ import annotations

from service.errors.base import ServiceError


class WebhooksOffError(ServiceError):
    """The operator allows no address."""

    status = 403
    code = "webhooks_off"

    def __init__(self) -> None:
        super().__init__("This service sends no webhooks; its operator can allow addresses (SLIMTUNE_WEBHOOK_ALLOWED).")


class WebhookUrlInvalidError(ServiceError):
    """The URL is not one that can be compared with what is allowed."""

    status = 422
    code = "webhook_url_invalid"
    param = "url"

    def __init__(self, reason: str) -> None:
        super().__init__(f"url {reason}.", reason=reason)


class WebhookUrlNotAllowedError(ServiceError):
    """The operator does not allow this address."""

    status = 403
    code = "webhook_url_not_allowed"
    param = "url"

    def __init__(self) -> None:
        super().__init__("Webhooks may not be sent to this address. Ask the operator which ones are allowed.")


class TooManyWebhooksError(ServiceError):
    """The tenant has as many webhooks as it may."""

    status = 409
    code = "too_many_webhooks"

    def __init__(self, limit: int) -> None:
        super().__init__(f"There are {limit} webhooks, which is the most. Delete one first.", limit=limit)


class WebhookDisabledError(ServiceError):
    """Nothing is sent to the webhook any more."""

    status = 409
    code = "webhook_disabled"

    def __init__(self, webhook_id: str, reason: str | None) -> None:
        super().__init__(f"{webhook_id} is disabled. POST /webhooks/{webhook_id}/enable first.", reason=reason)
