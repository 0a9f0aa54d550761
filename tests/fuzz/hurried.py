"""uvicorn with the API's time limits made short: `python -m tests.fuzz.hurried SECONDS ...`, then as uvicorn."""

from __future__ import annotations

import sys

import uvicorn

from api import middleware, protocol, uploads

if __name__ == "__main__":
    seconds = float(sys.argv.pop(1))
    middleware.BODY_SECONDS = protocol.HEAD_SECONDS = uploads.STALL_SECONDS = seconds
    uvicorn.main()
