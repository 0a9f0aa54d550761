"""A TCP proxy in front of an HTTP server, which does to each request what it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

Loss = Literal["unsent", "late", "unheard", "unanswered", "cut", "silent"]
"""How a request or its answer is lost:

unsent      the connection ends before the server sees the request
late        the server sees it after the client has given up
unheard     the connection ends as soon as the server has the request
unanswered  the connection ends when the server has answered, before the client gets a byte
cut         the connection ends in the middle of the answer
silent      the server has answered, and the client waits in vain on an open connection
"""


class HttpProxy:
    """Listens on loopback, in front of a server on a unix socket. Loses the first requests as told; the others pass.

    For messages with a Content-Length. A context manager: it ends when its clients have closed their connections and
    the server has answered all that it got.
    """

    def __init__(self, server: Path, losses: Iterable[Loss], late_seconds: float = 0.0) -> None:
        self.lost_answers: list[bytes] = []
        """Of the server, which no client got whole."""
        self._server = str(server)
        self._losses = iter(losses)
        self._late_seconds = late_seconds
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:  # the first one accepts: when it has ended there will be no others
            thread.join()
        self._listener.close()

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # until the listener is shut down
            while True:
                self._start(self._serve, self._listener.accept()[0])

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):  # of a client that is gone
            server.connect(self._server)
            while (request := _message(client)) is not None:
                with self._lock:
                    loss = next(self._losses, None)
                if loss is not None:
                    self._lose(loss, request, client, server)
                    return
                server.sendall(request)
                if (answer := _message(server)) is None:
                    return
                client.sendall(answer)

    def _lose(self, loss: Loss, request: bytes, client: socket.socket, server: socket.socket) -> None:
        if loss == "unsent":
            return
        if loss == "late":
            _hung_up(client)
            time.sleep(self._late_seconds)
        server.sendall(request)
        if loss == "unheard":
            client.shutdown(socket.SHUT_RDWR)
        if (answer := _message(server)) is None:
            return
        self.lost_answers.append(answer)
        if loss == "cut":
            client.sendall(answer[: len(answer) // 2])
        if loss == "silent":
            _hung_up(client)


def _message(connection: socket.socket) -> bytes | None:
    """The next HTTP message, whole; None if the connection ends before."""
    received = b""
    while part := connection.recv(65_536):
        received += part
        head, _, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if length is not None and len(body) >= int(length[1]):
            return received
    return None


def _hung_up(client: socket.socket) -> None:
    """Wait for the client to end the connection."""
    with contextlib.suppress(ConnectionResetError):
        client.recv(1)
