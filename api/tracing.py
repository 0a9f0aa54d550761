"""A span for each request, by OpenTelemetry's conventions for HTTP servers. Plain ASGI, and only there where an
operator asks for traces.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import tracing

UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked every few seconds, by machines."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Traces:
    """Around everything else. A `traceparent` that came with the request makes the span part of its sender's trace."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        sent = [value for name, value in scope["headers"] if name == b"traceparent"]
        parent = sent[0].decode("latin-1") if len(sent) == 1 else None
        known: tracing.Attributes = {
            "http.request.method": method,
            "url.path": scope["path"],
            "url.scheme": scope.get("scheme", "http"),
            "network.protocol.version": scope.get("http_version"),
        }
        status: int | None = None

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with tracing.span(method, kind="server", parent=parent, attributes=known) as span:
            try:
                await self._app(scope, receive, send_noted)
            finally:
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    span.rename(f"{method} {route}")
                request_id = scope.get("state", {}).get("request_id")
                span.set({"http.route": route, "http.response.status_code": status, "slimtune.request_id": request_id})
                if status is None or status >= 500:
                    span.fail("gone" if status is None else str(status))
