"""The application factory: `uvicorn api.app:create_app --factory`."""

from __future__ import annotations

import gc
import logging
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from api import errors
from api.access import Access
from api.authentication import Authenticator
from api.dependencies import Context
from api.event_hub import EventHub
from api.looks import Looks
from api.middleware import BodyLimit, RequestContext
from api.openai import router as openai
from api.openapi import document
from api.places import Places
from api.prometheus import RequestNumbers
from api.readiness import Readiness
from api.routes import checkpoints, datasets, devices, generate, health, jobs, models, plans, tokenizers, webhooks
from api.sampler import Slots
from api.shutdown import before_the_server_stops
from api.waker import Waker
from api.web import router as web_router
from service import database, logs, queue
from service.settings import Settings, load_settings
from service.storage import open_storage

logger = logging.getLogger(__name__)

DESCRIPTION = """Fine-tuning jobs under a hard memory budget: give a cap, get a plan that keeps it, the exact gradient,
and the checkpoints. Errors are problem details (RFC 9457) with a stable `code`."""

STREAMING = re.compile(r"/datasets|/tokenizers|/models|/v1/files|/v1/uploads/[^/]+/parts")
"""Paths that take uploads."""
CHECKS_AT_ONCE = 2
"""Of uploaded models and tokenizers: each has a process of its own with up to a gigabyte."""
READERS_AT_ONCE = 2
"""Of a tenant's datasets, as they come. They compute in Python, which more threads make no faster."""
COMPLETIONS_AT_ONCE = 1
"""Of a tenant's uploads in parts."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application on these settings. It connects to nothing before the first request.

    Without settings it is what its process is for: on the environment's settings, which also say how that writes its
    log. uvicorn calls this after it has set up its own loggers.
    """
    own_process = settings is None
    if settings is None:
        settings = load_settings()
        logs.configure(settings.log_format)
    engine = database.engine(settings)
    producer = queue.producer(settings.redis_url)
    files = open_storage(settings)
    context = Context(
        settings=settings,
        engine=engine,
        storage=files,
        producer=producer,
        waker=Waker(producer),
        sampler_slots=Slots(settings.generate_slots),
        event_hub=EventHub(engine, settings.event_streams),
        looks=Looks(engine),
        check_limiter=CapacityLimiter(CHECKS_AT_ONCE),
        readers=Places(READERS_AT_ONCE),
        completions=Places(COMPLETIONS_AT_ONCE),
        stopping=threading.Event(),
        numbers=RequestNumbers(),
        readiness=Readiness(engine, producer, files),
    )
    authenticator = Authenticator(engine) if settings.keys_required else None
    app = FastAPI(
        title="slimtune", version="0.1.0", description=DESCRIPTION, redirect_slashes=False, lifespan=_lifespan
    )
    app.state.context = context
    app.state.authenticator = authenticator
    errors.install(app)
    app.add_middleware(BodyLimit, streaming=STREAMING)
    app.add_middleware(Access, authenticator=authenticator)
    app.add_middleware(RequestContext, numbers=context.numbers)
    # Paths are tried in this order: what is asked most often first.
    for resource in (jobs, checkpoints, health, plans, generate, datasets, tokenizers, models, webhooks, devices):
        app.include_router(resource.router)
    app.include_router(openai.router)
    app.include_router(web_router.router)
    app.openapi = lambda: document(app, settings.keys_required)  # type: ignore[method-assign]  # FastAPI's documented way
    if own_process:
        # What exists by now stays, hundreds of thousands of objects: to look through them for garbage, every few
        # seconds under load, stops all requests for a tenth of a second.
        gc.collect()
        gc.freeze()
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: Context = app.state.context
    removed = await run_in_threadpool(context.storage.clean_temporary)
    if removed:
        logger.info("removed %d temporary files that earlier processes left", removed)
    before_the_server_stops(context.event_hub.close)
    before_the_server_stops(context.stopping.set)
    yield
    context.stopping.set()
    context.event_hub.close()
    context.engine.dispose()
    context.producer.close()
