"""Values that break programs, JSON that is none, and mutations of JSON that is."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from random import Random
from typing import Any

MARK = "Qx7"
"""What long texts are made of: an answer can be searched for it."""


@dataclass(frozen=True)
class Raw:
    """Text that goes into a body as it stands."""

    text: str


SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    -0.0,
    0.1,
    1e308,
    5e-324,
    "",
    " ",
    "0",
    "null",
    [],
    {},
    [[]],
    [None],
    {"": None},
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    Raw("1e999"),
    Raw("-1e999"),
    Raw("1E400"),
    Raw("-0"),
    Raw("01"),
    Raw("0x10"),
    Raw("+1"),
    Raw(".5"),
    Raw("1_000"),
    Raw("9" * 10_000),
    Raw("-" + "9" * 10_000),
    Raw("1." + "0" * 5_000),
    2**31,
    2**53,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    -(2**63) - 1,
    10**30,
    "\0",
    "a\0b",
    Raw('"\\ud800"'),
    Raw('"\\udfff\\ud800"'),
    Raw('"\\u0000"'),
    Raw('"\\x"'),
    Raw("'a'"),
    Raw('"\x01"'),
    "\u202e\u2066",
    "\ufeff",
    "\U0010ffff",
    "a\r\nSet-Cookie: a=b",
    "../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://169.254.169.254/",
    "%00",
    "%s%n%d",
    "{0.__class__}",
    "${jndi:ldap://x}",
    "'; DROP TABLE jobs; --",
    "\\",
    "\x7f",
    MARK * 100,
    MARK * 10_000,
    MARK * 100_000,
    "é" * 300,
    "\U0001f600" * 300,
    ["x"] * 3_000,
    {MARK * 200: 1},
    dict.fromkeys(map(str, range(2_000)), 1),
    "1GiB",
    "0GiB",
    "99999999TiB",
    "1e3GiB",
    "-1GiB",
    "\uff11GiB",
)

TEXTS: tuple[bytes, ...] = (
    b"",
    b"a",
    b"%00",
    b"a%00b",
    b"%ED%A0%80",
    b"%FF%FE",
    b"%C0%80",
    b"%0D%0ASet-Cookie:%20a=b",
    b"..%2F..%2Fetc%2Fpasswd",
    b"%2e%2e%2f%2e%2e%2f",
    b"..",
    b".",
    b"%25",
    b"%",
    b"%zz",
    b"*",
    b"-1",
    b"9" * 400,
    b"1e9",
    b"nan",
    b"0x1",
    b"null",
    b"true",
    b"latest",
    b"best",
    b"final",
    b"%F0%9F%98%80" * 50,
    (MARK * 700).encode(),
    (MARK * 15_000).encode(),
    b"%E2%80%AE",
    b"'%20OR%201=1",
    b"job_" + b"0" * 32,
    b"ds_" + b"f" * 32,
    b"job_" + b"0" * 31,
    b"job_%00" + b"0" * 28,
    b"performer-tiny",
)
"""For paths and queries, percent-encoded."""

HEADER_VALUES: tuple[bytes, ...] = (
    b"",
    b" ",
    b"*/*",
    b"text/csv",
    b"text/event-stream",
    b"application/json",
    b"\xff\xfe",
    b"\xc3\xa9",
    b"a\tb",
    b"bytes=0-",
    b"bytes=-1",
    b"bytes=0-0,2-3",
    b"bytes=" + b"0-1," * 2_000,
    b"bytes=99999999999999999999-",
    b"bytes=5-1",
    b"bytes=a-b",
    b"items=0-1",
    b'W/"a"',
    b"*",
    b'"' * 500,
    b"9" * 5_000,
    b"-1",
    b"0",
    (MARK * 1_000).encode(),
    b"gzip",
    b"Bearer ",
    b"Bearer " + b"x" * 5_000,
    b"Bearer slim_" + b"A" * 43,
    b"Basic YTpi",
    b"\x80\x81",
    b"multipart/form-data",
    b";;;===",
    b"application/json; charset=utf-16",
    b"application/json; charset=\xff",
    b"100-continue",
)


def dumps(value: Any) -> bytes:
    """JSON of it, `Raw` parts as they stand."""
    if isinstance(value, Raw):
        return value.text.encode()
    if isinstance(value, list):
        return b"[" + b",".join(map(dumps, value)) + b"]"
    if isinstance(value, dict):
        return b"{" + b",".join(dumps(name) + b":" + dumps(item) for name, item in value.items()) + b"}"
    return json.dumps(value).encode()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value inside."""
    found = [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        found += places(item, (*path, name))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at that place."""
    if not path:
        return new
    changed = copy.deepcopy(value)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = new
    return changed


def hostile_json(random: Random, example: Any, fields: list[str]) -> tuple[str, bytes]:
    """What is wrong, and a body: the example of a route with something done to it."""
    kinds = (
        "value",
        "value",
        "value",
        "values",
        "unknown field",
        "field",
        "encoding",
        "duplicate key",
        "nesting",
        "cut",
        "noise",
    )
    kind = random.choice(kinds)
    if kind == "value":
        return kind, dumps(put(example, random.choice(places(example)), random.choice(SCALARS)))
    if kind == "field" and fields:
        return kind, dumps({**example, random.choice(fields): random.choice(SCALARS)})
    if kind == "unknown field":
        return kind, dumps({**example, random.choice(("x", "__proto__", "id", "tenant", "", "\0", MARK * 300)): 1})
    if kind == "duplicate key":
        name = random.choice(list(example) or ["a"])
        return kind, dumps(example)[:-1] + b"," + dumps(name) + b":" + dumps(random.choice(SCALARS)) + b"}"
    if kind == "nesting":
        depth = random.choice((50, 200, 1_000, 10_000, 100_000))
        opened = random.choice((b"[", b'{"a":'))
        closed = (b"]" if opened == b"[" else b"1}") * depth if random.random() < 0.5 else b""
        return kind, b'{"metadata":' + opened * depth + closed + (b"}" if closed else b"")
    return _of_bytes(random, kind, dumps(example))


def _of_bytes(random: Random, kind: str, body: bytes) -> tuple[str, bytes]:
    if kind == "encoding":
        codec = random.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-7", "cp037"))
        return f"{kind} {codec}", body.decode().encode(codec)
    if kind == "cut":
        return kind, body[: random.randrange(len(body))]
    if kind == "noise":
        return kind, random.randbytes(random.choice((1, 10, 1_000)))
    changed = bytearray(body)
    for _ in range(random.randint(1, 5)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return "flipped bytes", bytes(changed)
