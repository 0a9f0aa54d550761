"""The rules of an API without keys: it serves programs on its own machine, and no page that a browser there shows.

A browser is on this machine too, and sends what any site asks it to send. Such a site can name the loopback address
itself, or have its own name point there (DNS rebinding); it cannot choose `Host`, `Origin` or `Sec-Fetch-Site`.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from api.errors import CrossSiteError, KeysRequiredError
from service.settings import is_loopback

_READING = frozenset({"GET", "HEAD"})
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


def check(scope: Scope) -> None:
    """Raises KeysRequiredError, CrossSiteError."""
    headers = Headers(scope=scope)
    server = scope.get("server")
    if server is not None and server[1] is not None:  # else a unix socket, which only this machine can reach
        if not is_loopback(server[0]):
            raise KeysRequiredError("this connection came in at an address that others can reach")
        if not is_loopback(_hostname(headers.get("host", ""))):
            raise KeysRequiredError("the Host header names neither localhost nor a loopback address")
    if any(name in headers for name in _FORWARDED):
        raise KeysRequiredError("this request came through a proxy, which may serve others")
    if scope["method"] not in _READING and from_another_site(headers):
        raise CrossSiteError


def from_another_site(headers: Headers) -> bool:
    """By what browsers say and pages cannot forge. Another port of this machine is another site's too."""
    if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
        return True
    origin = headers.get("origin")
    host = headers.get("host", "")
    return origin is not None and origin not in {f"http://{host}", f"https://{host}"}


def _hostname(host: str) -> str:
    """`[::1]` of `[::1]:8000`."""
    return host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]
