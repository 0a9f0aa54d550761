"""The whole service on one machine: PostgreSQL, Redis, API, worker and sweeper, started and stopped together."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from cli import programs
from cli.client import Client
from cli.embedded import EmbeddedServerError, EmbeddedServers
from cli.processes import Child, spawn, tethered
from cli.programs import ROOT

READY_SECONDS = 500.0
"""How long the service may take to be ready; the worker measures its machine first."""
LATE_SECONDS = 15.0
"""After which it is said what is missing but the worker: a broker or object store that cannot be reached, above all."""
WORKER_STOP_SECONDS = 90.0
"""A running job finishes its step and writes a checkpoint before the worker stops."""


class StackError(RuntimeError):
    """The service could not start, or a part of it died."""


@dataclass(frozen=True, slots=True)
class Options:
    """Where and with what the service runs."""

    home: Path
    """Data, logs and sockets; everything that is written."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free one."""
    database_url: str | None = None
    """None starts an embedded PostgreSQL."""
    redis_url: str | None = None
    """None starts an embedded Redis."""
    authentication: str | None = None
    """As SLIMTUNE_AUTHENTICATION; None: as the environment says."""


class Stack:
    """The running service; a context manager, for the main thread.

    Its processes die with this one, however it ends (cli/lifeline.py).
    """

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self._options = options
        self._say = say
        self._home = options.home.resolve()
        self._logs = self._home / "logs"
        self._servers: EmbeddedServers | None = None
        self._services: list[Child] = []
        self._lock = ExitStack()
        self.port = options.port

    @property
    def url(self) -> str:
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        return f"http://{host}:{self.port}"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raises StackError, with its last log lines, if a part has died."""
        for child in self._children():
            if not child.alive():
                raise StackError(child.obituary())

    def stop(self) -> None:
        """Stop everything in the reverse order of its start. A signal meanwhile means: at once."""
        with on_signals(self._kill):
            if self._services:
                self._say("stopping (a running job writes a checkpoint first)")
            for child in reversed(self._services):
                child.stop()
            self._services.clear()
            if self._servers is not None:
                self._servers.stop()
            self._lock.close()

    def _children(self) -> list[Child]:
        return [*(self._servers.children if self._servers is not None else ()), *self._services]

    def _kill(self, _number: int, _frame: FrameType | None) -> None:
        for child in self._children():
            child.kill()

    def _start(self) -> None:
        if not (ROOT / "alembic.ini").exists():
            raise StackError(f"{ROOT} is not a checkout of slimtune: its migrations are missing")
        self._home.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(_only_one(self._home / "lock"))
        self.port = _free_port(self._options.host, self._options.port)
        self._logs.mkdir(exist_ok=True)
        for log in self._logs.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))
        environment = self._environment(*self._start_servers())
        self._migrate(environment)
        self._say("starting API, worker and sweeper; a worker's first start measures the machine, for a minute or two")
        for name, command, stop_seconds in self._programs():
            self._services.append(self._spawn(name, command, environment, stop_seconds))
        self._wait_until_ready()

    def _start_servers(self) -> tuple[str, str]:
        """The URLs of the database and the broker, ours or the given ones."""
        options = self._options
        servers = EmbeddedServers(
            self._home / "servers",
            log_directory=self._logs,
            postgres=options.database_url is None,
            redis=options.redis_url is None,
        )
        if options.database_url is not None and options.redis_url is not None:
            return options.database_url, options.redis_url
        self._say("starting " + " and ".join(servers.names))
        self._servers = servers
        try:
            servers.start()
        except EmbeddedServerError as error:
            raise StackError(str(error)) from error
        return options.database_url or servers.database_url, options.redis_url or servers.redis_url

    def _environment(self, database_url: str, redis_url: str) -> dict[str, str]:
        authentication = self._options.authentication
        return {
            "SLIMTUNE_DATA_DIR": str(self._home / "data"),
            **os.environ,
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "SLIMTUNE_HOST": self._options.host,
            "SLIMTUNE_PORT": str(self.port),
            **({"SLIMTUNE_AUTHENTICATION": authentication} if authentication is not None else {}),
            "PYTHONUNBUFFERED": "1",
        }

    def _programs(self) -> Iterator[tuple[str, list[str], float]]:
        """Name, command, and how many seconds it may take to stop."""
        yield "api", programs.api(self._options.host, self.port), 15.0
        yield "worker", programs.worker(), WORKER_STOP_SECONDS
        yield "sweeper", programs.sweeper(), 10.0
        if os.environ.get("SLIMTUNE_WEBHOOK_ALLOWED"):
            yield "webhooks", programs.webhooks(), 15.0  # it ends what it is sending, at most ten seconds

    def _spawn(self, name: str, command: list[str], environment: dict[str, str], stop_seconds: float) -> Child:
        return spawn(
            name,
            tethered(command),
            log=self._logs / f"{name}.log",
            environment=environment,
            directory=ROOT,
            stop_seconds=stop_seconds,
        )

    def _migrate(self, environment: dict[str, str]) -> None:
        migration = self._spawn("migration", programs.migrate("head"), environment, 10.0)
        try:
            if migration.process.wait() != 0:
                raise StackError(migration.obituary())
        finally:
            migration.stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        said = ""
        with Client(self.url, timeout_seconds=5.0) as client:
            while missing := client.missing():
                self.check()
                # The worker comes last, after its measurements; what comes before it is there within seconds.
                late = ", ".join(name for name in missing if name != "worker")
                if late != said and time.monotonic() > deadline - READY_SECONDS + LATE_SECONDS:
                    said = late
                    if late:
                        self._say(f"still waiting for {late}; {self._logs / 'api.log'} says why")
                if time.monotonic() > deadline:
                    logs = "\n".join(child.obituary() for child in self._services if child.name in missing)
                    raise StackError(f"not ready after {READY_SECONDS:.0f} s: {', '.join(missing)} missing\n{logs}")
                time.sleep(0.2)


def run_until_stopped(options: Options, say: Callable[[str], None]) -> None:
    """Keep the service up until SIGINT, SIGTERM or SIGHUP. Raises StackError if a part of it dies."""
    with on_signals(interrupt):
        try:
            with Stack(options, say) as stack:
                say(f"slimtune is ready: {stack.url} is the dashboard, {stack.url}/docs describes the API")
                if asks_for_keys(options.host):
                    say("it asks for API keys: make one with `slimtune keys create --tenant default --name ...`")
                say(f"data and logs: {options.home}; stop it with Ctrl-C")
                while True:
                    stack.check()
                    time.sleep(0.5)
        except KeyboardInterrupt:
            say("stopped")


def asks_for_keys(host: str) -> bool:
    """Whether an API on this address asks for keys, by the rule that it has itself (service/settings.py)."""
    chosen = os.environ.get("SLIMTUNE_AUTHENTICATION")
    if chosen is not None:
        return chosen == "keys"
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def interrupt(number: int, _frame: FrameType | None) -> None:
    """A handler that makes every way of asking for the end look like Ctrl-C."""
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have `handler` called for SIGINT, SIGTERM and SIGHUP (the terminal was closed). Only in the main thread."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock file that the kernel releases when this process ends. Raises StackError if another one has it."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise StackError(f"slimtune already runs in {path.parent} (process {file.read().strip()})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises StackError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            hint = "another program uses it; choose one with --port" if error.errno == errno.EADDRINUSE else str(error)
            raise StackError(f"cannot listen on {host} port {port}: {hint}") from error
        return int(listener.getsockname()[1])
