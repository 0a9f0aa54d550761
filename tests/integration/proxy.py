"""A way to a server that can be cut."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class Proxy:
    """In front of a server that can go away (`refuse`) or fall silent (`hang`) as it can."""

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        """`connect` makes a connection to the server."""
        self._listener = listener
        self._connect = connect
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._refusing = False
        self._open = threading.Event()
        self._open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self) -> None:
        self._refusing = True
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def hang(self) -> None:
        self._open.clear()

    def answer(self) -> None:
        self._refusing = False
        self._open.set()

    def close(self) -> None:
        self.answer()
        self.refuse()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            server = self._connect()
            self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                self._open.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()
