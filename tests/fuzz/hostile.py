"""A stream of hostile requests over every route of the document, drawn from a seed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.fuzz.hostile_files import hostile_file, hostile_form, large
from tests.fuzz.hostile_values import HEADER_VALUES, SCALARS, TEXTS, dumps, hostile_json
from tests.fuzz.hostile_wire import GARBAGE, LIES
from tests.fuzz.wire import Attack, head, request

JSON = ("Content-Type", "application/json")
HEADERS = (
    "Accept",
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-None-Match",
    "If-Range",
    "Last-Event-ID",
    "Origin",
    "Range",
    "Cookie",
    "X-Forwarded-For",
    "X-Request-ID",
    "X-HTTP-Method-Override",
    "Accept-Encoding",
    "Content-Encoding",
    "Expect",
    "TE",
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "QUERY")
PATHS = (b"/jobs", b"/plans", b"/datasets", b"/models", b"/v1/files", b"/v1/fine_tuning/jobs", b"/nothing")
"""Of requests whose framing lies."""
SPARED = {"/jobs/{job_id}/generate", "/v1/uploads/{upload_id}/cancel"}
"""Never with a real id: to sample takes a process and seconds, and has tests of its own; the upload is for others."""


class Arsenal:
    """What the document says can be sent, and the things that are there to send it about."""

    def __init__(self, document: dict[str, Any], ids: dict[str, str], seed: int) -> None:
        """`ids` are real values of path parameters."""
        self._random = Random(seed)  # noqa: S311  # of a test, to be repeated
        self._ids = ids
        self._schemas = document["components"]["schemas"]
        self._operations = [
            (method.upper(), path, operation)
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        ]
        self._with_json = [entry for entry in self._operations if _json_of(entry[2]) is not None]

    def attacks(self, count: int) -> Iterator[Attack]:
        """So many, of every kind."""
        kinds = (self._json, self._parameters, self._headers, self._forms, self._wire, self._files, self._large)
        for kind in self._random.choices(kinds, weights=(45, 15, 10, 15, 10, 4.7, 0.3), k=count):
            yield kind()

    def _json(self) -> Attack:
        method, path, operation = self._random.choice(self._with_json)
        content = _json_of(operation)
        assert content is not None
        examples = [example["value"] for example in content.get("examples", {}).values()] or [{}]
        kind, body = hostile_json(self._random, self._random.choice(examples), self._fields(content))
        headers = (
            [JSON]
            if self._random.random() < 0.95
            else [("Content-Type", self._random.choice(("text/plain", "application/xml", "")))]
        )
        return request(f"json: {kind}", method, self._path(path), body, headers)

    def _parameters(self) -> Attack:
        method, path, operation = self._random.choice(self._operations)
        names = re.findall(r"{(\w+)", path)
        chosen = self._random.choice(names) if names else ""
        target = self._path(path, {chosen: self._random.choice(TEXTS)})
        query = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"] + [
            "limit",
            "metadata[a]",
            "x",
        ]
        if not names or self._random.random() < 0.4:
            pairs = [
                f"{self._random.choice(query)}=".encode() + self._random.choice(TEXTS)
                for _ in range(self._random.randint(1, 3))
            ]
            target += b"?" + b"&".join(pairs)
        if self._random.random() < 0.1:
            method = self._random.choice(METHODS)
        body = None if method in {"GET", "HEAD"} else b"{}"
        return request("path or query", method, target, body, [JSON], malformed=True)

    def _headers(self) -> Attack:
        method, path, _ = self._random.choice(self._operations)
        chosen = [
            (self._random.choice(HEADERS), self._random.choice(HEADER_VALUES))
            for _ in range(self._random.randint(1, 4))
        ]
        if self._random.random() < 0.1:
            chosen += [(f"X-{number}", b"x" * 50) for number in range(self._random.choice((200, 2_000)))]
        body = None if method == "GET" else self._random.choice((b"", b"{}", dumps(self._random.choice(SCALARS))))
        return request("header", method, self._path(path), body, chosen, malformed=True)

    def _forms(self) -> Attack:
        return hostile_form(self._random, self._ids["upload_id"])

    def _files(self) -> Attack:
        return hostile_file(self._random)

    def _large(self) -> Attack:
        return large(self._random)

    def _wire(self) -> Attack:
        """Framing that lies, and what is no HTTP."""
        path = self._random.choice(PATHS)
        post = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sent = (
            post + self._random.choice(LIES)
            if self._random.random() < 0.7
            else self._random.choice((*GARBAGE, self._random.randbytes(300)))
        )
        return Attack("wire", sent, complete=False, malformed=True)

    def _path(self, path: str, hostile: dict[str, bytes] | None = None) -> bytes:
        """With real ids, or hostile texts in place of parameters."""

        def value(found: re.Match[str]) -> str:
            name = found[1]
            if path in SPARED:
                return "job_" + "0" * 32
            if hostile and name in hostile:
                return hostile[name].decode("latin-1")
            return self._ids.get(name, "1")

        return re.sub(r"{(\w+)(?::\w+)?}", value, path).encode("latin-1")

    def _fields(self, content: dict[str, Any]) -> list[str]:
        schema = content["schema"]
        for choice in schema.get("anyOf", [schema]):
            if "$ref" in choice:
                schema = self._schemas[choice["$ref"].rsplit("/", 1)[1]]
        return list(schema.get("properties", {}))


def _json_of(operation: dict[str, Any]) -> dict[str, Any] | None:
    content: dict[str, Any] | None = operation.get("requestBody", {}).get("content", {}).get("application/json")
    return content


def harmless() -> Attack:
    """A request that any server that lives answers."""
    return Attack("harmless", head("GET", "/healthz"))
