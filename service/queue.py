"""The way to the workers. A message carries a job's id and nothing else: losing or doubling one is harmless."""

from __future__ import annotations

import contextvars
import functools
import logging
import threading
import time
from typing import Any

from celery import Celery

from service.settings import load_settings

QUEUE = "slimtune"
TASK = "slimtune.run"
PUBLISH_SECONDS = 0.8
"""The longest that `wake` may keep its caller."""

CELERY_SETTINGS: dict[str, Any] = {
    "task_default_queue": QUEUE,
    # The database owns the jobs. Late acknowledgement would start a job twice that outlasts the visibility timeout.
    "task_acks_late": False,
    "task_ignore_result": True,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    "worker_pool": "prefork",
    "worker_pool_start_method": "spawn",
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "task_time_limit": None,
    "task_serializer": "json",
    "accept_content": ["json"],
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "task_publish_retry": False,
    "worker_send_task_events": False,
    "broker_transport_options": {
        "visibility_timeout": 3_600,
        "socket_timeout": 10,
        "socket_connect_timeout": 3,
        "health_check_interval": 25,
    },
}
"""What producer and worker share; worker/app.py adds its own."""

logger = logging.getLogger(__name__)
_publishing = threading.Semaphore(4)


def celery_app(redis_url: str, **overrides: Any) -> Celery:
    """A Celery application on this broker. It connects on first use."""
    app = Celery("slimtune", broker=redis_url)
    app.conf.update({**CELERY_SETTINGS, **overrides})
    return app


def producer(redis_url: str) -> Celery:
    """An application that only publishes: it gives up on a silent broker in half a second instead of ten."""
    options = {
        **CELERY_SETTINGS["broker_transport_options"],
        "socket_timeout": 0.5,
        "socket_connect_timeout": 0.5,
        "retry_on_timeout": False,
        "max_retries": 0,
    }
    return celery_app(redis_url, broker_transport_options=options, broker_connection_timeout=0.5)


@functools.cache
def default_producer() -> Celery:
    """The producer on this process's own broker."""
    return producer(load_settings().redis_url)


def wake(job_id: str, app: Celery | None = None) -> bool:
    """Tell a worker that a job is queued and it should look; whether the broker took it. The sweeper asks again.

    Never raises on a dead broker and returns within a second: publishing has its own thread, as a name that does not
    resolve or a full backlog blocks longer than any socket timeout.
    """
    app = app or default_producer()
    if not _publishing.acquire(blocking=False):
        logger.warning("wake of %s not sent: earlier ones still hang", job_id)
        return False
    outcome: list[BaseException | None] = []

    def publish() -> None:
        try:
            app.send_task(TASK, args=[job_id], queue=QUEUE, retry=False)
            outcome.append(None)
        except Exception as error:  # noqa: BLE001  # the row is the truth: a message that cannot be sent only waits
            outcome.append(error)
        finally:
            _publishing.release()

    started = time.monotonic()
    publish_here = functools.partial(contextvars.copy_context().run, publish)  # the lines of libraries name the request
    thread = threading.Thread(target=publish_here, name=f"wake-{job_id}", daemon=True)
    thread.start()
    thread.join(PUBLISH_SECONDS)
    if outcome and outcome[0] is None:
        logger.info("wake of %s sent", job_id)
        return True
    cause = outcome[0] if outcome else f"no answer in {time.monotonic() - started:.1f} s"
    logger.warning("wake of %s not sent: %s", job_id, cause)
    return False


def waiting_messages(app: Celery) -> int | None:
    """How many messages wait in the broker; None if it does not answer."""
    try:
        with app.connection_for_write() as connection:
            return int(connection.default_channel.client.llen(QUEUE))
    except Exception as error:  # noqa: BLE001  # kombu and redis raise what they like; no broker is no error here
        logger.warning("the broker does not answer: %s", error)
        return None


def broker_answers(app: Celery) -> bool:
    """Whether the broker answers a ping in time; for readiness checks."""
    answered = threading.Event()

    def ping() -> None:
        try:
            with app.connection_for_write() as connection:
                connection.default_channel.client.ping()
            answered.set()
        except Exception as error:  # noqa: BLE001  # every way of not answering is the same answer
            logger.info("broker does not answer: %s", error)

    ping_here = functools.partial(contextvars.copy_context().run, ping)  # its line names the request
    threading.Thread(target=ping_here, name="broker-ping", daemon=True).start()
    return answered.wait(PUBLISH_SECONDS)
