"""HTTP as the service speaks it: problems become exceptions, and what may be sent again is sent again."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import httpx2

from cli.client.errors import ConflictError, RateLimitedError, ServiceError, UnavailableError, error_of

FIRST_PAUSE_SECONDS = 0.1
"""Before the second try of a request that was not answered; four times as long before each further one."""
LONGEST_PAUSE_SECONDS = 10.0
TURN_SECONDS = 60.0
"""How long to ask again where the service says when to (`Retry-After`): an earlier try is still being worked on, a
dataset's tokens are still counted, too many requests came at once."""
UPLOAD_SECONDS = 300.0
"""How long the service may be silent at the end of an upload: the files are checked."""
NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)

Found = TypeVar("Found")


class ServerEvent(NamedTuple):
    """One message of a stream (Server-Sent Events)."""

    id: str
    name: str
    data: Any


class Connection:
    """Requests to one service. Methods raise ServiceError.

    A request that did not leave is sent again a few times, and so is one that was not answered (no answer, or a 502,
    503, 504) where doing it twice does no more than doing it once (`again`). A 409 or 429 with `Retry-After`, which
    did nothing, is too. Pauses grow and vary by chance, so that many who lost one service do not come back in step.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout_seconds: float, retries: int) -> None:
        # No proxy of the environment's: the service is local or on a network of ours.
        self._http = httpx2.Client(base_url=url, headers=dict(headers), timeout=timeout_seconds, trust_env=False)
        self._retries = retries

    def close(self) -> None:
        self._http.close()

    def request(self, method: str, path: str, *, again: bool = False, **arguments: Any) -> Any:
        """The answer's JSON; None where it has no body."""
        return self.repeatedly(lambda: self.once(method, path, **arguments), again=again)

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        return self.request("GET", path, again=True, params=params)

    def try_get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of one try, whatever they are; status 0 without an answer in JSON. Raises nothing."""
        try:
            response = self._http.get(path)
            return response.status_code, response.json()
        except (httpx2.TransportError, ValueError):
            return 0, None

    def pages(self, path: str, params: Mapping[str, Any], place: Callable[[Any], Mapping[str, Any]]) -> Iterator[Any]:
        """All entries of a list, page by page; `place` says what asks for those after a given one."""
        asked = dict(params)
        more = True
        while more:
            page = self.get(path, asked)
            yield from page["data"]
            more = page["has_more"] and bool(page["data"])
            if more:
                asked.update(place(page["data"][-1]))

    def repeatedly(self, act: Callable[[], Found], *, again: bool) -> Found:
        """What `act` returns, tried again where that is safe and may help."""
        tries = 0
        deadline = time.monotonic() + TURN_SECONDS
        while True:
            try:
                return act()
            except UnavailableError as error:
                pause = _pause(tries) if error.retry_after_seconds is None else error.retry_after_seconds
                if tries >= self._retries or pause > TURN_SECONDS or not (again or not error.sent):
                    raise
                tries += 1
            except (ConflictError, RateLimitedError) as error:
                pause = error.retry_after_seconds or 0.0
                if not pause or time.monotonic() + pause > deadline:
                    raise
                pause *= random.uniform(1.0, 1.25)  # noqa: S311
            time.sleep(pause)

    @contextmanager
    def stream(self, method: str, path: str, *, read_seconds: float | None = None, **arguments: Any) -> Iterator[Any]:
        """A response whose body comes while the block reads it. Not tried again."""
        timeout = self._http.timeout
        if read_seconds is not None:
            timeout = httpx2.Timeout(timeout.connect, read=read_seconds)
        try:
            with self._http.stream(method, path, timeout=timeout, **arguments) as response:
                if not response.is_success:
                    response.read()
                    _raise_for_problem(response)
                yield response
        except NOT_SENT as error:
            raise self._unreachable(method, path, error) from error
        except httpx2.TransportError as error:
            raise _lost(f"{method} {path}: it broke off ({error})") from error

    def once(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx2.TransportError as error:
            raise self._unreachable(method, path, error) from error
        _raise_for_problem(response)
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise _not_ours(response, "what is answered is no JSON") from error

    def _unreachable(self, method: str, path: str, error: httpx2.TransportError) -> UnavailableError:
        found = _lost(f"{method} {path}: no answer from {self._http.base_url} ({error})")
        found.sent = not isinstance(error, NOT_SENT)
        return found


def server_events(lines: Iterator[str]) -> Iterator[ServerEvent]:
    """The messages of a stream; what comes between them, heartbeats among it, is passed over."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
            continue
        if "data" in fields:
            yield ServerEvent(fields.get("id", ""), fields.get("event", ""), json.loads(fields["data"]))
        fields = {}


def quoted(identifier: str) -> str:
    """An id as part of a path, whatever somebody took for one."""
    return quote(identifier, safe="")


def problem_error(where: str, status: int, problem: dict[str, Any]) -> ServiceError:
    """The exception of a problem of the service's (RFC 9457)."""
    code = problem.get("code", "unknown")
    return error_of(f"{where}: {problem.get('detail') or problem.get('title')} ({code})", status, code, problem)


def _raise_for_problem(response: httpx2.Response) -> None:
    """Errors come as application/problem+json; one that does not was not made by the service."""
    if response.is_success:
        return
    if response.has_redirect_location:
        raise _not_ours(response, f"it sends to {response.headers['location']}")
    where = f"{response.request.method} {response.request.url.path}"
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        error = problem_error(where, response.status_code, response.json())
    else:
        error = error_of(f"{where}: HTTP {response.status_code}", response.status_code, "unknown")
    seconds = response.headers.get("retry-after", "")
    error.retry_after_seconds = float(seconds) if seconds.isdecimal() else None
    raise error


def _not_ours(response: httpx2.Response, why: str) -> ServiceError:
    """Something else answers at this address, a proxy for example: what it says helps nobody who looks for a job."""
    message = f"{response.request.method} {response.request.url}: {why}; is this the address of the service?"
    return ServiceError(message, status=response.status_code, code="unknown")


def _lost(message: str) -> UnavailableError:
    return UnavailableError(message, status=0, code="unreachable")


def _pause(tries: int) -> float:
    longest = min(FIRST_PAUSE_SECONDS * 4.0**tries, LONGEST_PAUSE_SECONDS)
    return random.uniform(longest / 2, longest)  # noqa: S311  # to spread requests, not to keep a secret
