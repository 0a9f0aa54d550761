"""Messages on a real Redis."""

from __future__ import annotations

import base64
import json

import anyio
import pytest
import redis

from api.waker import Waker
from cli.embedded import EmbeddedServers
from service import queue
from service.ids import new_id


@pytest.fixture
def broker(servers: EmbeddedServers) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(servers.redis_socket))


def messages(broker: redis.Redis) -> list[list[object]]:
    """The positional arguments of all waiting messages, oldest first."""
    raw = [json.loads(item) for item in broker.lrange(queue.QUEUE, 0, -1)]
    assert all(item["headers"]["task"] == queue.TASK for item in raw)
    return [json.loads(base64.b64decode(item["body"]))[0] for item in raw][::-1]


def test_a_message_carries_the_id_and_nothing_else(redis_url: str, broker: redis.Redis) -> None:
    app = queue.producer(redis_url)
    ids = [new_id("job") for _ in range(3)]
    assert all(queue.wake(job_id, app) for job_id in ids)
    assert messages(broker) == [[job_id] for job_id in ids]
    app.close()
    broker.close()


def test_waking_survives_a_broker_that_dropped_its_connections(redis_url: str, broker: redis.Redis) -> None:
    app = queue.producer(redis_url)
    assert queue.wake(new_id("job"), app)
    broker.client_kill_filter(_type="normal", skipme=True)
    assert queue.wake(new_id("job"), app)
    assert queue.broker_answers(app)
    assert broker.llen(queue.QUEUE) == 2
    app.close()
    broker.close()


def test_many_jobs_at_once_are_few_messages(redis_url: str, broker: redis.Redis) -> None:
    """The last of them, at the latest, is sent after the last job was there."""
    app = queue.producer(redis_url)
    ids = [new_id("job") for _ in range(20)]

    async def wake_all() -> None:
        waker = Waker(app)
        async with anyio.create_task_group() as tasks:
            for job_id in ids:
                tasks.start_soon(waker.wake, job_id)
        assert len(messages(broker)) == 2  # at once, and once more for all that came meanwhile
        await waker.wake("job_later")
        assert messages(broker)[-1] == ["job_later"]

    anyio.run(wake_all)
    app.close()
    broker.close()
