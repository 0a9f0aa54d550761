"""The API under uvicorn, without the guard that the environment names: `python -m tests.chaos.server SOCKET`."""

from __future__ import annotations

import sys

import uvicorn

from api.app import create_app
from tests.chaos import guards

if __name__ == "__main__":
    guards.remove_as_told()
    uvicorn.run(create_app(), uds=sys.argv[1], log_level="warning")
