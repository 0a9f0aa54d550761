"""Where webhooks may go: URLs taken apart and compared part by part with what the operator allows.

Whatever is not plain is refused, not mended, so that no two programs can read it in two ways: no user before the host,
no dots that go up, no escapes that hide them, nothing but ASCII. What is sent to is put together from the parts that
were compared.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import unquote

MAX_URL_LENGTH = 2_048
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?]*)?(?:\?(?P<query>.*))?",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_SEGMENT = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,=:@-]|%[0-9A-Fa-f]{2})*")
_QUERY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_HIDDEN = frozenset("/\\%;")
"""What an escape must not stand for: a server behind a proxy may read it as the end of a segment."""
_PORTS = {"http": 80, "https": 443}


class UrlError(ValueError):
    """The text is no URL that can be compared; the message says why, without the text."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL in its parts."""

    scheme: str
    host: str
    port: int
    segments: tuple[str, ...]
    query: str | None = None

    @property
    def url(self) -> str:
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        query = "" if self.query is None else f"?{self.query}"
        return f"{self.scheme}://{self.host}{port}/{'/'.join(self.segments)}{query}"

    def is_below(self, prefix: Target) -> bool:
        """Same scheme, host and port, and a path that begins with the prefix's, segment by segment."""
        origin = (self.scheme, self.host, self.port) == (prefix.scheme, prefix.host, prefix.port)
        wanted = prefix.segments[:-1] if prefix.segments and not prefix.segments[-1] else prefix.segments
        return origin and self.segments[: len(wanted)] == wanted


def parse(text: str) -> Target:
    """Raises UrlError."""
    if len(text) > MAX_URL_LENGTH:
        raise UrlError(f"must have at most {MAX_URL_LENGTH} characters")
    if re.fullmatch(r"[!-~]*", text) is None:
        raise UrlError("must be visible ASCII: write other letters of a host as xn--, of a path as %XX")
    found = _URL.fullmatch(text)
    if found is None:
        raise UrlError("must be http or https with a host, without a user, and a port, if any, in digits")
    scheme = found["scheme"].lower()
    port = _PORTS[scheme] if found["port"] is None else int(found["port"])
    if not 1 <= port <= 65_535:
        raise UrlError("its port must be 1 to 65535")
    query = found["query"]
    if query is not None and _QUERY.fullmatch(query) is None:
        raise UrlError("its query has a character that must be written as %XX, or a fragment")
    return Target(scheme, _host(found["host"].lower()), port, _segments((found["path"] or "/")[1:]), query)


def _host(host: str) -> str:
    if host.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
        except ValueError:
            raise UrlError("its host is no IPv6 address") from None
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise UrlError("its host is no name")
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise UrlError("its host must be a name, or an IPv4 address as four numbers") from None
    return host


def _segments(path: str) -> tuple[str, ...]:
    segments = tuple(path.split("/")) if path else ()
    for segment in segments:
        if _SEGMENT.fullmatch(segment) is None:
            raise UrlError("its path has a character that must be written as %XX, or a fragment")
        plain = unquote(segment, errors="replace")
        if plain in (".", "..") or _HIDDEN & set(plain) or any(ord(character) < 32 for character in plain):
            raise UrlError("its path must have no . or .. and no escaped / \\ % ; or control character")
    if "" in segments[:-1]:
        raise UrlError("its path must not have // in it")
    return segments


@dataclass(frozen=True, slots=True)
class Allowed:
    """What an operator allows. Nothing by default."""

    prefixes: tuple[Target, ...] = ()

    @staticmethod
    def parse(text: str) -> Allowed:
        """Of prefixes with commas between them. Raises UrlError, which names the one that cannot be read."""
        return Allowed(tuple(_prefix(part.strip()) for part in text.split(",") if part.strip()))

    def covers(self, target: Target) -> bool:
        return any(target.is_below(prefix) for prefix in self.prefixes)


def _prefix(text: str) -> Target:
    try:
        target = parse(text)
    except UrlError as error:
        raise UrlError(f"{text[:80]!r} {error}") from None
    if target.query is not None:
        raise UrlError(f"{text[:80]!r} must have no query")
    return target
