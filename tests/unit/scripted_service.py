"""A real HTTP server that says what a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Script:
    """What the server answers by path (with query), and what it was asked."""

    url: str = ""
    answers: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)
    first: list[tuple[int, str, bytes] | None] = field(default_factory=list)
    """Answers to come before those, whatever the path; None hangs up."""
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    headers: list[Message] = field(default_factory=list)
    truncate: bool = False
    """Whether files break off in the middle."""
    ranges: bool = True
    """Whether `Range: bytes=N-` is understood."""
    location: str | None = None
    """Where answers of 300 and above send to."""
    retry_after: str | None = None
    """What answers that are errors say of it."""

    def json(self, path: str, body: object, status: int = 200, content_type: str = "application/json") -> None:
        self.answers[path] = (status, content_type, json.dumps(body).encode())


@contextmanager
def scripted() -> Iterator[Script]:
    """It runs as long as the block."""
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            script.requests.append((f"{self.command} {self.path}", self.rfile.read(length)))
            script.keys.append(self.headers["Idempotency-Key"])
            script.headers.append(self.headers)
            answer = script.first.pop(0) if script.first else script.answers[self.path]
            if answer is None:
                self.close_connection = True
                return
            status, content_type, body = answer
            if script.ranges and (wanted := self.headers["Range"]):
                status, body = 206, body[int(wanted.removeprefix("bytes=").removesuffix("-")) :]
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            if status >= 300 and script.location is not None:
                self.send_header("Location", script.location)
            if status >= 400 and script.retry_after is not None:
                self.send_header("Retry-After", script.retry_after)
            self.end_headers()
            self.close_connection = script.truncate and content_type == "application/octet-stream"
            self.wfile.write(body[: len(body) // 2] if self.close_connection else body)

        do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield script
        server.shutdown()
        thread.join()
