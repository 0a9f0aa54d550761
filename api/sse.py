"""What answers of server-sent events share (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
from typing import Any

from fastapi.sse import format_sse_event
from starlette.types import Receive

MEDIA_TYPE = "text/event-stream"
DOCUMENTED: dict[str, Any] = {
    MEDIA_TYPE: {
        "schema": {
            "type": "object",
            "description": "Of each event.",
            "required": ["event", "data"],
            "properties": {
                "id": {"type": "string"},
                "event": {"type": "string"},
                "data": {"type": "string", "contentMediaType": "application/json"},
            },
        }
    }
}
"""What an answer's `content` says of a stream."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy must not collect what should be seen at once
]
HEARTBEAT = b": heartbeat\n\n"
"""A comment, which clients skip."""


def event(name: str, data: dict[str, Any] | str, identifier: str | None = None) -> bytes:
    """One event; `data` is JSON, or will be."""
    text = data if isinstance(data, str) else json.dumps(data)
    return format_sse_event(event=name, data_str=text, id=identifier)


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def is_wanted(accept: str) -> bool:
    """Whether this `Accept` (RFC 9110, 12.5.1) names event streams and would not rather have JSON.

    Of equal weights the more exact one counts: `text/event-stream, */*` asks for a stream, `application/json,
    text/event-stream` for JSON.
    """
    stream, rest = (0.0, 0), (0.0, 0)
    exactness = {MEDIA_TYPE: 3, "application/json": 3, "application/*": 2, "*/*": 1}
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        if name in exactness:
            weighed = (_weight(parameters), exactness[name])
            if name == MEDIA_TYPE:
                stream = weighed
            elif weighed[1] > rest[1]:  # the most exact range is the one that counts for JSON
                rest = weighed
    return stream[0] > 0 and stream > rest


def _weight(parameters: list[str]) -> float:
    """`q`; 0 for one that is none."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            text = value.strip()
            digits = text.replace(".", "", 1)
            return min(float(text), 1.0) if len(text) <= 5 and digits.isascii() and digits.isdigit() else 0.0
    return 1.0
