"""An object store by obstore: keys and bytes, in the few calls that service.object_storage needs, with our errors.

Its own retries are few and short; who can wait longer has a `service.patience.Patience`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import LocalStore, MemoryStore, S3Store

from service.errors import StorageDeniedError, StorageUnavailableError
from service.settings import Settings

Backend = S3Store | LocalStore | MemoryStore

PART_BYTES = 8 << 20
"""Of a file that is sent; larger where a file would have too many parts."""
PARTS_AT_ONCE = 4
MAX_PARTS = 9_000
"""S3 takes 10,000."""
READ_BYTES = 1 << 20
ANSWER_SECONDS = 30
"""Without a byte from the store, after which a request has failed; a part has to be sent in that time."""
CONNECT_SECONDS = 5
RETRY_SECONDS = 8
REOPENINGS = 5
"""Of a stream that breaks off, without a byte between them."""
_DETAIL_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of an object without reading it."""

    key: str
    bytes: int
    modified: datetime


class ObjectStore:
    """Keys below the prefix that the backend was made with."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @classmethod
    def of(cls, settings: Settings) -> ObjectStore:
        """The store of SLIMTUNE_STORAGE_URL. Connects to nothing."""
        url = urlsplit(settings.storage_url or "")
        if url.scheme == "file":
            return cls(LocalStore(url.path, mkdir=True))
        return cls(S3Store(url.netloc, prefix=url.path.strip("/") or None, **_options(settings)))

    def put(self, key: str, data: bytes) -> None:
        """Raises StorageUnavailableError."""
        with _translated():
            obstore.put(self._backend, key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Whether there was no such object before. Raises StorageUnavailableError."""
        try:
            with _translated():
                obstore.put(self._backend, key, data, mode="create")
        except exceptions.AlreadyExistsError:
            return False
        return True

    def put_file(self, key: str, path: Path, beat: Callable[[], object]) -> None:
        """Send a file, atomically; `beat` is called between its parts, and if it raises, nothing is left of them.

        Raises StorageUnavailableError, OSError.
        """
        size = path.stat().st_size
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        if size <= part_bytes:
            return self.put(key, path.read_bytes())

        def parts() -> Iterator[bytes]:
            with path.open("rb", buffering=0) as file:
                while part := file.read(part_bytes):
                    beat()
                    yield part

        with _translated():
            obstore.put(self._backend, key, parts(), chunk_size=part_bytes, max_concurrency=PARTS_AT_ONCE)
        return None

    def get(self, key: str) -> bytes:
        """Raises FileNotFoundError, StorageUnavailableError."""
        with _translated():
            return bytes(obstore.get(self._backend, key).bytes())

    def blocks(self, key: str) -> Iterator[bytes]:
        """Raises FileNotFoundError, StorageUnavailableError."""
        with _translated():
            yield from obstore.get(self._backend, key).stream(min_chunk_size=READ_BYTES)

    async def stream(self, key: str, position: int) -> AsyncIterator[bytes]:
        """The bytes from a position on, taken up again where the store breaks off.

        Raises FileNotFoundError, StorageUnavailableError.
        """
        failures = 0
        while True:
            try:
                with _translated():
                    opened = await obstore.get_async(self._backend, key, options={"range": {"offset": position}})
                    async for block in opened.stream(min_chunk_size=READ_BYTES):
                        position += len(block)
                        failures = 0
                        yield bytes(block)
                    return
            except StorageUnavailableError:
                failures += 1
                if failures > REOPENINGS:
                    raise

    def entry(self, key: str) -> Entry:
        """Raises FileNotFoundError, StorageUnavailableError."""
        with _translated():
            return _entry(obstore.head(self._backend, key))

    def entries(self, folder: str) -> Iterator[Entry]:
        """Of all objects below a folder. Raises StorageUnavailableError."""
        with _translated():
            for page in obstore.list(self._backend, folder):
                yield from map(_entry, page)

    def names_in(self, folder: str) -> list[str]:
        """Of objects and folders in a folder. Raises StorageUnavailableError."""
        with _translated():
            found = obstore.list_with_delimiter(self._backend, folder)
        paths = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def delete(self, keys: Iterable[str]) -> None:
        """In bulk; missing ones are fine. Raises StorageUnavailableError."""
        doomed = list(keys)
        for begin in range(0, len(doomed), 1_000):
            try:
                with _translated():
                    obstore.delete(self._backend, doomed[begin : begin + 1_000])
            except FileNotFoundError:  # of a folder as backend, which stops at the first; S3 knows no missing ones
                for key in doomed[begin : begin + 1_000]:
                    self._delete_one(key)

    def _delete_one(self, key: str) -> None:
        try:
            with _translated():
                obstore.delete(self._backend, key)
        except FileNotFoundError:
            return

    def check(self, folder: str) -> None:
        """Raises StorageUnavailableError unless the store answers and lets us list."""
        with _translated():
            next(iter(obstore.list(self._backend, folder, chunk_size=1)), None)


def _options(settings: Settings) -> dict[str, Any]:
    secrets = {
        "access_key_id": settings.aws_access_key_id,
        "secret_access_key": settings.aws_secret_access_key,
        "session_token": settings.aws_session_token,
    }
    config: dict[str, Any] = {name: value.get_secret_value() for name, value in secrets.items() if value is not None}
    if settings.aws_endpoint_url is not None:
        config["endpoint"] = settings.aws_endpoint_url
    if settings.aws_region is not None:
        config["region"] = settings.aws_region
    return {
        "config": config,
        "client_options": {
            "allow_http": settings.aws_allow_http,
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=ANSWER_SECONDS),
            "timeout": timedelta(days=1),  # of a whole answer, which a slow client may read for hours
        },
        "retry_config": {
            "max_retries": 4,
            "retry_timeout": timedelta(seconds=RETRY_SECONDS),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=2),
                "base": 2,
            },
        },
    }


def _entry(found: Any) -> Entry:
    return Entry(found["path"], found["size"], found["last_modified"])


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise StorageDeniedError(_detail(error)) from None
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StorageDeniedError(_detail(error)) from None
        raise
    except exceptions.AlreadyExistsError:
        raise
    except exceptions.BaseError as error:
        denied = "InvalidAccessKeyId" in str(error) or "SignatureDoesNotMatch" in str(error)
        raise (StorageDeniedError if denied else StorageUnavailableError)(_detail(error)) from None


def _detail(error: Exception) -> str:
    """Its first line: what follows are the library's structures."""
    return str(error).partition("\n")[0][:_DETAIL_LENGTH]
