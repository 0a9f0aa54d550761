"""An S3 server in a child process, and a way to it that can be cut."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx2

from tests.integration.stage import wait_for

BUCKET = "slimtune-test"
KEY, SECRET = "key-of-the-store", "secret-of-the-store-75"
REGION = "eu-central-1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Cut:
    """A TCP proxy on loopback that can refuse, as a store that is down does, or fall silent."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._refusing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self) -> None:
        self._refusing = True
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def answer(self) -> None:
        self._refusing = False

    def close(self) -> None:
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
            server = socket.create_connection(("127.0.0.1", self._target))
            self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Its port; the bucket is there, and empty."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}/{BUCKET}"

            def created() -> bool:
                with contextlib.suppress(httpx2.TransportError):
                    return httpx2.put(url).status_code == 200
                return False

            wait_for("an S3 server", created, 60)
            yield port
        finally:
            process.kill()


def unfinished_uploads(port: int) -> int:
    """Multipart uploads that nobody has ended."""
    return httpx2.get(f"http://127.0.0.1:{port}/{BUCKET}?uploads").text.count("<UploadId>")
