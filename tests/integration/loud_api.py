"""uvicorn and the API with every logger at DEBUG: `python -m tests.integration.loud_api PORT`."""

from __future__ import annotations

import logging
import sys

import uvicorn
from fastapi import FastAPI

from api.app import create_app


def create() -> FastAPI:
    """The application, after which the level is changed: of its own it logs at INFO."""
    app = create_app()
    logging.getLogger().setLevel(logging.DEBUG)
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).setLevel(logging.DEBUG)
    return app


if __name__ == "__main__":
    uvicorn.run(create, factory=True, port=int(sys.argv[1]), http="api.protocol:LimitedHttp", log_level="debug")
