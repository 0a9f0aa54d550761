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


def strays(checkpoints_dir: Path, registered: frozenset[Path]) -> list[Path]:
    """What lies below `checkpoints_dir` and is neither `registered` nor above what is, so that no row knows it.

    Half-written folders, steps that were never registered, folders of earlier attempts that hold nothing else. (Older
    versions put the steps of all attempts into `checkpoints_dir` itself.)
    """
    needed = registered | {parent for path in registered for parent in path.parents}
    found = []
    for entry in _entries(checkpoints_dir):
        if entry not in needed:
            found.append(entry)
        elif entry not in registered:
            found += [inner for inner in _entries(entry) if inner not in registered]
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _sha256(path: Path, beat: Callable[[], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            beat()
    return digest.hexdigest()
