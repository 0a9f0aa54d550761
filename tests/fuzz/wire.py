"""Requests as bytes, and what comes back: no client library, which would refuse to send most of them."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ANSWER_SECONDS = 60.0
"""A server that says nothing for so long hangs."""


@dataclass(frozen=True)
class Attack:
    """One request. `kind` is what is wrong with it."""

    kind: str
    head: bytes
    """With the empty line."""
    body: Sequence[bytes] = ()
    """Portions, sent one after the other; the same one may be there many times."""
    complete: bool = True
    """Whether the server has all it was promised: otherwise the sender hangs up, and there may be no answer."""
    malformed: bool = False
    """Whether it is no HTTP, which uvicorn answers by itself: 400 in plain text, or nothing but the end."""

    @property
    def text(self) -> str:
        """What the client sent, as far as an answer may be searched for it."""
        sent, size = [self.head], 0
        for portion in self.body:
            if size > 2_000_000:
                break
            sent.append(portion)
            size += len(portion)
        return b"".join(sent).decode("latin-1")


@dataclass(frozen=True)
class Answer:
    """None of it where the connection ended without one."""

    status: int | None
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def head(method: str, target: str | bytes, headers: Iterable[tuple[str | bytes, str | bytes]] = ()) -> bytes:
    """The head of a request."""
    lines = [b" ".join([method.encode(), _bytes(target), b"HTTP/1.1"]), b"Host: localhost"]
    lines += [_bytes(name) + b": " + _bytes(value) for name, value in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def request(
    kind: str,
    method: str,
    target: str | bytes,
    body: bytes | None = None,
    headers: Iterable[tuple[str | bytes, str | bytes]] = (),
    **options: Any,
) -> Attack:
    """With the body's true length."""
    length = [] if body is None else [("Content-Length", str(len(body)))]
    return Attack(kind, head(method, target, [*headers, *length]), () if body is None else (body,), **options)


def send(port: int, attack: Attack) -> Answer:
    """Send it and wait for the answer. Raises TimeoutError if the server hangs."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        try:
            connection.sendall(attack.head)
            for portion in attack.body:
                connection.sendall(portion)
            if not attack.complete:
                connection.shutdown(socket.SHUT_WR)
        except TimeoutError:
            raise
        except OSError:
            pass  # the server has ended the connection; its answer may be there
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while not _whole(received, attack.head):
                if not (portion := connection.recv(65_536)):
                    break
                received += portion
                if received.startswith(b"HTTP/1.1 100"):
                    del received[: received.find(b"\r\n\r\n") + 4]  # the answer is still to come
    return _parsed(bytes(received))


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def _whole(received: bytearray, sent_head: bytes) -> bool:
    start, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return False
    lines = start.lower().split(b"\r\n")
    if sent_head.startswith(b"HEAD ") or bytes(lines[0]).split(b" ")[1] in {b"204", b"304"}:
        return True
    lengths = [line for line in lines if line.startswith(b"content-length:")]
    if lengths:
        return len(body) >= int(lengths[0].split(b":")[1])
    return body.endswith(b"0\r\n\r\n")


def _parsed(received: bytes) -> Answer:
    start, _, body = received.partition(b"\r\n\r\n")
    status, *lines = start.decode("latin-1").split("\r\n")
    if not status:
        return Answer(None, {}, b"")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(status.split()[1]), headers, body)
