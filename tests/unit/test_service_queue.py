"""A broker that is not there, in each of its ways, never holds anybody up."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service import queue
from service.ids import new_id

LIMIT_SECONDS = 1.0


@contextlib.contextmanager
def refusing_port(_: Path) -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        yield f"redis://127.0.0.1:{taken.getsockname()[1]}/0"


@contextlib.contextmanager
def silent_port(_: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:  # accepts, never answers
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@contextlib.contextmanager
def full_backlog(_: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as stack:
        for _number in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@contextlib.contextmanager
def trickling_port(_: Path) -> Iterator[str]:
    """Each byte comes within every socket timeout; the answer never ends."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def trickle() -> None:
            connections: list[socket.socket] = []
            while not done.wait(0.1):
                with contextlib.suppress(TimeoutError):
                    connections.append(server.accept()[0])
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.send(b"+")
            for connection in connections:
                connection.close()

        thread = threading.Thread(target=trickle)
        thread.start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        done.set()
        thread.join()


@contextlib.contextmanager
def missing_socket(folder: Path) -> Iterator[str]:
    yield f"redis+socket://{folder / 'none.sock'}"


@contextlib.contextmanager
def unknown_name(_: Path) -> Iterator[str]:
    yield "redis://no-such-host.invalid:6379/0"


BROKERS = [refusing_port, silent_port, full_backlog, trickling_port, missing_socket, unknown_name]


@pytest.mark.parametrize("broker", BROKERS)
def test_waking_without_a_broker_is_quick_and_quiet(
    broker: Callable[[Path], contextlib.AbstractContextManager[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with broker(tmp_path) as url:
        app = queue.producer(url)
        job_id = new_id("job")
        started = time.monotonic()
        assert not queue.wake(job_id, app)
        assert time.monotonic() - started < LIMIT_SECONDS
        assert f"wake of {job_id} not sent" in caplog.text
        started = time.monotonic()
        assert not queue.broker_answers(app)
        assert time.monotonic() - started < LIMIT_SECONDS


def publishing() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("wake-")]


@pytest.mark.parametrize("broker", [silent_port, full_backlog])
def test_no_thread_hangs_on_a_silent_broker(
    broker: Callable[[Path], contextlib.AbstractContextManager[str]], tmp_path: Path
) -> None:
    with broker(tmp_path) as url:
        assert not queue.wake(new_id("job"), queue.producer(url))
        deadline = time.monotonic() + 3
        while publishing():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_hanging_messages_are_limited_in_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with trickling_port(tmp_path) as url:
        app = queue.producer(url)
        callers = [threading.Thread(target=queue.wake, args=(new_id("job"), app)) for _ in range(12)]
        for caller in callers:
            caller.start()
        assert len(publishing()) <= 4
        for caller in callers:
            caller.join(LIMIT_SECONDS)
            assert not caller.is_alive()
    assert "earlier ones still hang" in caplog.text
