"""Where an attempt starts: the newest registered checkpoint whose bytes are what their hashes say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 22


def damage(folder: Path, files: Iterable[dict[str, Any]], beat: Callable[[], object]) -> str | None:
    """What is wrong with a checkpoint's folder, or None if every file has its size and its SHA-256.

    `beat` is called every few MiB: hashing gigabytes takes longer than a lease may stay silent. Raises OSError where
    a file is there but cannot be read: that says nothing against the checkpoint, which therefore must not be dropped.
    """
    for entry in files:
        path = folder / entry["name"]
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{entry['name']} has {size} bytes instead of {entry['bytes']}"
            if _sha256(path, beat) != entry["sha256"]:
                return f"{entry['name']} does not have the SHA-256 that it was registered with"
        except (FileNotFoundError, NotADirectoryError):
            return f"{entry['name']} is missing"
    return None


def _sha256(path: Path, beat: Callable[[], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            beat()
    return digest.hexdigest()
