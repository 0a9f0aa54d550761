"""One file of a checkpoint, from the service to a folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cli.client.answers import FileRecord
from cli.client.connection import Connection
from cli.client.errors import DamagedDownloadError, ServiceError, UnavailableError

PARTIAL = 206
TRIES = 3
"""In a row without a byte."""
AGAIN_SECONDS = 1.0


def fetch(
    connection: Connection, path: str, file: FileRecord, folder: Path, on_bytes: Callable[[FileRecord, int], object]
) -> Path:
    """Stream the file into `folder`, where it appears once its size and SHA-256 are right; one that the service has in
    a folder in a folder likewise.

    What arrived before the connection broke is gone on from. Raises ServiceError where that did not help, with what
    there is kept as `.part` for the next call; DamagedDownloadError, after which nothing is kept.
    """
    target = _below(folder, file["name"])
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(target.name + ".part")
    with partial.open("ab+") as output:
        tries = 0
        while True:
            before = output.tell()
            try:
                _continue(connection, path, file, output, on_bytes)
                break
            except UnavailableError:
                tries = tries + 1 if output.tell() <= before else 1
                if tries >= TRIES:
                    raise
            time.sleep(AGAIN_SECONDS)
        output.seek(0)
        digest = hashlib.file_digest(output, "sha256").hexdigest()
        size = output.tell()
    if size != file["bytes"] or digest != file["sha256"]:
        partial.unlink()
        raise DamagedDownloadError(
            f"{file['name']}: {size} bytes with SHA-256 {digest} arrived, "
            f"but {file['bytes']} bytes with {file['sha256']} were registered"
        )
    return partial.replace(target)


def fetch_whole(connection: Connection, path: str, folder: Path) -> Path:
    """Stream what grows, and so has no hash, into `folder`, where it appears once it is whole. Raises ServiceError."""
    target = _below(folder, path.rpartition("/")[2])
    partial = target.with_name(target.name + ".part")
    try:
        with partial.open("wb") as output, connection.stream("GET", path) as response:
            for chunk in response.iter_bytes():
                output.write(chunk)
    except ServiceError:
        partial.unlink()
        raise
    return partial.replace(target)


def _continue(
    connection: Connection,
    path: str,
    file: FileRecord,
    output: BinaryIO,
    on_bytes: Callable[[FileRecord, int], object],
) -> None:
    """Append what is missing of the file. `If-Range`: all of it, where the service has another one by now."""
    have = output.tell()
    if have >= file["bytes"]:
        have = _emptied(output)
    headers = {"Accept-Encoding": "identity"}  # what a proxy compressed would have other positions
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": f'"{file["sha256"]}"'}
    with connection.stream("GET", path, headers=headers) as response:
        if have and response.status_code != PARTIAL:
            have = _emptied(output)
        # As they come: pieces of a given size would lose what came of the last one when the line breaks.
        for chunk in response.iter_bytes():
            have += output.write(chunk)
            on_bytes(file, have)


def _emptied(output: BinaryIO) -> int:
    """Where the next byte goes. Cutting a file alone leaves its position where it was, which is what a later try would
    go on from."""
    output.seek(0)
    return output.truncate()


def _below(folder: Path, name: str) -> Path:
    """Where a file of this name goes: in the folder, or in one folder in it."""
    parts = Path(name).parts
    if not 1 <= len(parts) <= 2 or any(part in ("..", "/") for part in parts):
        raise DamagedDownloadError(f"{name!r} is no name of a file of a checkpoint")
    return folder.joinpath(*parts)
