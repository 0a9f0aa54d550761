"""How pages are made: templates, what all of them know, and the headers that keep a page to itself."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from api import browsers
from service import web_sessions

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Nothing from elsewhere, no scripts or styles in the page itself, in nobody's frame, in no cache."""
NOTHING = "\N{EN DASH}"
"""In place of a number that there is not."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def shown_bytes(count: float | None) -> str:
    """`1.5 GiB`: three digits where there are as many."""
    if count is None:
        return NOTHING
    size, unit = float(count), 0
    while abs(size) >= 999.5 and unit < len(UNITS) - 1:
        size, unit = size / 1_024, unit + 1
    return f"{size:.3g} {UNITS[unit]}"


def shown_seconds(seconds: float | None) -> str:
    """`2 h 5 min`, `3 min 20 s`, `0.52 s`: the two largest units."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(index for index, (amount, _) in enumerate(parts) if amount)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[first : first + 2] if amount)


def shown_number(value: float | None, digits: int = 4) -> str:
    """Whole numbers with their thousands apart, others with so many digits."""
    if value is None:
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def shown_ratio(ratio: float) -> str:
    """Two digits, and all of those before the point: `0.35`, `2.1`, `1,234`."""
    return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:,.0f}"


def plain(value: Any) -> str:
    """As an input has it: nothing for None, and no point where a number is whole."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)


def shown_time(moment: datetime | None) -> str:
    """In UTC, to the second; scripts put the reader's own time in its place."""
    return NOTHING if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters.update(
    bytes=shown_bytes,
    seconds=shown_seconds,
    number=shown_number,
    ratio=shown_ratio,
    plain=plain,
    time=shown_time,
    iso=lambda moment: moment.isoformat(),
)


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """The answer with a template filled in: a page, or a piece of one. All know `path`, `csrf`, `caller` and
    `logged_in`."""
    token = browsers.session_token(request.headers)
    known = {
        "path": request.url.path,
        "csrf": "" if token is None else web_sessions.csrf_token(token),
        "caller": getattr(request.state, "caller", None),
        "logged_in": token is not None and request.app.state.authenticator is not None,
    }
    html = _environment.get_template(template).render({**known, **values})
    return HTMLResponse(html, status, SECURITY_HEADERS)
