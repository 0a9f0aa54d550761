"""The embedded servers: they start, answer, keep their data, and never outlive who started them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import kombu
import pytest
import redis
import sqlalchemy as sa

from cli import embedded
from cli.embedded import EmbeddedServerError, EmbeddedServers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def directory(scratch: Path) -> Path:
    """A directory with data in it from an earlier run. The tests share it: each leaves it fit for another start."""
    directory = scratch / "embedded"
    with EmbeddedServers(directory, durable=False) as servers, servers.connect() as connection:
        connection.execute("CREATE TABLE kept (number integer)")
        connection.execute("INSERT INTO kept VALUES (42)")
    return directory


def kept(servers: EmbeddedServers) -> int:
    """What `cluster` stored, read through the URL that the services get."""
    engine = sa.create_engine(servers.database_url)
    try:
        with engine.connect() as connection:
            number = connection.execute(sa.text("SELECT number FROM kept")).scalar_one()
    finally:
        engine.dispose()
    return int(number)


def running(pid: int) -> bool:
    """Whether the process is there; one that has ended but that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def listening_tcp_sockets(pid: int) -> list[str]:
    inodes = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


def test_answers_on_the_urls_that_the_services_get_and_keeps_data(directory: Path) -> None:
    with EmbeddedServers(directory, durable=False) as servers:
        assert kept(servers) == 42
        with kombu.Connection(servers.redis_url) as broker:
            queue = broker.SimpleQueue("greetings")
            queue.put("hello")
            message = queue.get(timeout=5)
            assert message.payload == "hello"
            message.ack()
            queue.close()
        with redis.Redis.from_url(f"unix://{servers.redis_socket}?db=0") as client:
            assert client.ping()
        pids = [child.process.pid for child in servers.children]
        assert len(pids) == 2
        assert [listening_tcp_sockets(pid) for pid in pids] == [[], []]
        assert stat.S_IMODE(servers.sockets.stat().st_mode) == 0o700
    assert not any(map(running, pids))
    assert not (directory / "sockets").exists()


def test_a_path_too_long_for_a_socket_gets_a_temporary_directory(directory: Path, scratch: Path) -> None:
    far = scratch / ("d" * 100)
    shutil.copytree(directory, far)
    with EmbeddedServers(far, durable=False) as servers:
        sockets = servers.sockets
        assert not sockets.is_relative_to(far)
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert kept(servers) == 42
    assert not sockets.exists()


def test_a_path_with_characters_that_mean_something_in_a_url(directory: Path, scratch: Path) -> None:
    strange = scratch / "a, b?c=d&e#f%20"
    shutil.copytree(directory, strange)
    with EmbeddedServers(strange, durable=False) as servers:
        assert kept(servers) == 42


def test_kill_9_of_the_parent_takes_the_servers_along_and_the_next_start_recovers(directory: Path) -> None:
    """Goes red without prctl in cli/lifeline.py."""
    code = """
        import json, sys, time
        from pathlib import Path
        from cli.embedded import EmbeddedServers
        servers = EmbeddedServers(Path(sys.argv[1]))
        servers.start()
        print(json.dumps([child.process.pid for child in servers.children]), flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", dedent(code), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        assert all(map(running, pids))
        parent.kill()
    deadline = time.monotonic() + 10
    while any(map(running, pids)):
        assert time.monotonic() < deadline, "the servers outlived their parent"
        time.sleep(0.01)
    with EmbeddedServers(directory, durable=False) as servers:
        assert kept(servers) == 42


def test_kill_9_of_postgresql_does_not_prevent_the_next_start(directory: Path) -> None:
    servers = EmbeddedServers(directory, durable=False)
    servers.start()
    postgres = servers.children[-1]
    postgres.process.kill()
    postgres.process.wait()
    assert postgres.obituary().startswith("postgresql was killed by SIGKILL")
    servers.stop()
    assert (directory / "postgresql" / "postmaster.pid").exists()
    with EmbeddedServers(directory, durable=False) as again:
        assert kept(again) == 42


def test_a_stale_lock_file_that_names_a_process_of_ours_does_not_prevent_a_start(directory: Path) -> None:
    """Numbers of processes are reused. Goes red without _wait_for_previous_postgres: PostgreSQL refuses."""
    with subprocess.Popen(["sleep", "600"]) as stranger:
        (directory / "postgresql" / "postmaster.pid").write_text(f"{stranger.pid}\n{directory}/postgresql\n")
        with EmbeddedServers(directory, durable=False) as servers:
            assert kept(servers) == 42
        assert stranger.poll() is None
        stranger.terminate()


def test_a_start_that_fails_says_why_and_leaves_nothing(directory: Path) -> None:
    version = directory / "postgresql" / "PG_VERSION"
    right = version.read_text()
    version.write_text("9.6\n")
    servers = EmbeddedServers(directory)
    with pytest.raises(EmbeddedServerError, match="version 9\\.6") as failure:
        servers.start()
    assert "postgresql ended with exit code 1" in str(failure.value)
    version.write_text(right)
    assert servers.children == []
    assert not (directory / "sockets").exists()


def test_an_interrupted_creation_is_done_again(scratch: Path) -> None:
    debris = scratch / "interrupted" / "postgresql.new"
    debris.mkdir(parents=True)
    (debris / "PG_VERSION").write_text("18\n")
    with EmbeddedServers(scratch / "interrupted", durable=False) as servers, servers.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
def test_root_without_user_namespaces(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of being root can follow each other on the same data."""
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_unshare_works", lambda: False)
        with EmbeddedServers(directory, durable=False) as servers:
            assert kept(servers) == 42
            pid = servers.children[-1].process.pid
            assert Path(f"/proc/{pid}").stat().st_uid == embedded.NOBODY
    with EmbeddedServers(directory, durable=False) as servers:
        assert kept(servers) == 42


def test_stops_by_signal_not_by_force(directory: Path) -> None:
    with EmbeddedServers(directory, durable=False) as servers:
        children = list(servers.children)
        with servers.connect():  # a session that is still there does not hold up the stop
            servers.stop()
    assert [child.process.returncode for child in children] == [0, 0]
    assert not (directory / "postgresql" / "postmaster.pid").exists()
