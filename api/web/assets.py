"""Styles and scripts. They are asked for again each time, and sent where they have changed: none is large, and after an
update no page has old ones.
"""

from __future__ import annotations

import hashlib
import mimetypes
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

_FILES = {path.name: path.read_bytes() for path in sorted(Path(__file__).with_name("static").iterdir())}
_TAGS = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in _FILES.items()}


@router.get("/ui/static/{name}")
async def static(name: str, request: Request) -> Response:
    if name not in _FILES:
        raise HTTPException(404)
    headers = {"ETag": _TAGS[name], "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == _TAGS[name]:
        return Response(status_code=304, headers=headers)
    return Response(_FILES[name], headers=headers, media_type=mimetypes.guess_type(name)[0])
