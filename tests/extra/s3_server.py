"""An S3 server in a child process, and a way to it that can be cut."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx2

from tests.integration.proxy import Proxy
from tests.integration.stage import wait_for

BUCKET = "slimtune-test"
KEY, SECRET = "key-of-the-store", "secret-of-the-store-75"
REGION = "eu-central-1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Cut(Proxy):
    """In front of a store, on loopback."""

    def __init__(self, target: int) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        super().__init__(listener, lambda: socket.create_connection(("127.0.0.1", target)))


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
