"""Forms and files: parts that lie, names that climb, and things that are not what they are sent as."""

from __future__ import annotations

import functools
import gzip
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import zstandard

from tests.fuzz.hostile_values import MARK, SCALARS, dumps, places, put
from tests.fuzz.wire import Attack, head, request
from tests.integration.model_files import LLAMA, llama, tokenizer_json, with_header

EDGE = b"edge"
FORM = ("Content-Type", "multipart/form-data; boundary=edge")
UPLOADS = ("/datasets", "/tokenizers", "/models", "/v1/files", "/v1/uploads/{upload_id}/parts")

NAMES: tuple[bytes, ...] = (
    b"",
    b"..",
    b"../../etc/passwd.txt",
    b"..\\..\\a.txt",
    b"/etc/passwd.txt",
    b"a.txt/../../b.txt",
    b"a\0.txt",
    b"a%00.txt",
    b"a.txt\0",
    b"\xff\xfe.txt",
    b"\xed\xa0\x80.txt",
    (MARK * 1_400).encode() + b".txt",
    b"a.txt\\r\\nSet-Cookie: a=b",
    b".txt",
    b"a.exe",
    b"a.jsonl.gz.zst",
    b"CON.txt",
    b"a:b.txt",
    b"~.txt",
    b"a b\t.txt",
    b"\xe2\x80\xae.txt",
    b"-rf.txt",
    b"$(id).txt",
    b"config.json",
    b"model.safetensors",
    b"model.safetensors.index.json",
    b"../config.json",
    b"tokenizer.json",
    b"model-00001-of-00002.safetensors",
    b"pytorch_model.bin",
    b"a.gguf",
)


def part(content: bytes, name: bytes = b"file", filename: bytes | None = b"a.txt", more: bytes = b"") -> bytes:
    """One part of a form."""
    named = b"" if filename is None else b'; filename="' + filename + b'"'
    return (
        b'--edge\r\nContent-Disposition: form-data; name="'
        + name
        + b'"'
        + named
        + b"\r\n"
        + more
        + b"\r\n"
        + content
        + b"\r\n"
    )


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--edge--\r\n"


def hostile_form(random: Random, upload_id: str) -> Attack:
    """A form to one of the routes that take one; in parts, to the upload."""
    path = random.choice(UPLOADS).format(upload_id=upload_id)
    kind, make = random.choice(list(FORMS.items()))
    headers, body = make(random)
    if path == "/v1/files" and random.random() < 0.8:
        body = part(b"fine-tune", b"purpose", None) + body
    if path.endswith("/parts"):
        body = body.replace(b'name="file"', b'name="data"')
    return request(f"form: {kind}", "POST", path, body, headers)


def _named(random: Random) -> tuple[list[Any], bytes]:
    return [FORM], form(part(b"hello", filename=random.choice(NAMES)))


def _field(random: Random) -> tuple[list[Any], bytes]:
    values = (b"\0", b"\xff", MARK.encode() * 400, b"a\r\nb", b"", b"x" * 201, b"\xed\xa0\x80", b"tok_" + b"0" * 32)
    value = random.choice((*values, b"9" * 900))
    names = (b"name", b"tokenizer", b"purpose", b"expires_after[anchor]", b"expires_after[seconds]", b"other")
    name = random.choice((*names, b"", b"\0", MARK.encode() * 300))
    return [FORM], form(part(b"hello"), part(value, name, None))


def _boundary(random: Random) -> tuple[list[Any], bytes]:
    kinds = (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=other",
        'multipart/form-data; boundary="ed\\"ge"',
        "multipart/form-data; boundary=" + "x" * 5_000,
        "multipart/mixed; boundary=edge",
        "application/x-www-form-urlencoded",
        "text/plain",
        "",
        "multipart/form-data; boundary=\u00e9",
        "application/json",
        "multipart/form-data; boundary=edge; boundary=other",
        "multipart/form-data; charset=utf-16; boundary=edge",
    )
    return [("Content-Type", random.choice(kinds))], form(part(b"hello"))


def _broken(random: Random) -> tuple[list[Any], bytes]:
    whole = form(part(b"hello"))
    bodies = (
        b"",
        b"--edge--\r\n",
        b"--edge\r\n\r\n",
        whole[:-10],
        whole.replace(b"\r\n", b"\n"),
        whole.replace(b"Content-Disposition", b"X"),
        b"preamble" + whole,
        whole + b"epilogue" * 1_000,
        b"--edge\r\n" * 5_000,
        form(part(b"a"), part(b"b")),
        form(part(b"a", filename=None)),
        form(*[part(b"", b"name", None)] * 2_000),
        form(part(b"a", more=b"X-Long: " + b"x" * 100_000 + b"\r\n")),
        form(part(b"a", more=b"X: y\r\n" * 5_000)),
        form(part(b"a", more=b"Content-Transfer-Encoding: base64\r\n")),
        form(part(b"a", more=b"Content-Length: 999999\r\n")),
        b"--edge\r\nContent-Disposition: form-data; name=file; filename*=utf-8''%00.txt\r\n\r\na\r\n--edge--",
        b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.txt\r\n\r\na\r\n--edge--\r\n',
        random.randbytes(500),
    )
    return [FORM], random.choice(bodies)


def _data(random: Random) -> tuple[list[Any], bytes]:
    lines = (
        b'{"text": "a"}',
        b'{"text": 1}',
        b'{"text": "\\ud800"}',
        b'{"text": "\\u0000"}',
        b"{",
        b"NaN",
        b"[" * 5_000,
        b"\xff",
        b"",
        b"{}",
        b'{"messages": []}',
        b'{"prompt": "a"}',
        b'{"text": "' + MARK.encode() * 5_000 + b'"',
        b"\xef\xbb\xbf{}",
        b'{"text": "a", "text": 2}',
    )
    body = b"\n".join(random.choice(lines) for _ in range(random.randint(1, 60)))
    if not any(line in body for line in (b"{\n", b"NaN", b"\xff", b'"text": 1')):
        body += b"\n{"
    return [FORM], form(part(body, filename=b"a.jsonl"))


def _packed(random: Random) -> tuple[list[Any], bytes]:
    bombs = (
        _gzip_bomb(),
        _zstd_bomb(),
        gzip.compress(b"{}\n")[:-5],
        b"\x1f\x8b" + random.randbytes(200),
        gzip.compress(b"a") * 2_000,
        b"PK\x03\x04",
    )
    name = random.choice((b"a.txt.gz", b"a.jsonl.gz", b"a.jsonl.zst", b"a.txt.zst", b"a.parquet", b"a.parquet.gz"))
    return [FORM], form(part(random.choice(bombs), filename=name))


def _weights(random: Random) -> tuple[list[Any], bytes]:
    files = {**llama(), "model.safetensors": random.choice(_safetensors())}
    if random.random() < 0.3:
        name = random.choice(("pytorch_model.bin", "model.pt", "model.safetensors", "a.gguf"))
        files = {"config.json": files["config.json"], name: random.choice(_not_weights())}
    return [FORM], form(*(part(content, filename=name.encode()) for name, content in files.items()))


def _config(random: Random) -> tuple[list[Any], bytes]:
    name = random.choice(("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"))
    base: Any = LLAMA if name == "config.json" else json.loads(llama()[name])
    small = [place for place in places(base) if len(place) < 4][:200]
    files = {**llama(), name: dumps(put(base, random.choice(small), random.choice(SCALARS)))}
    return [FORM], form(*(part(content, filename=name.encode()) for name, content in files.items()))


def _tokenizer(random: Random) -> tuple[list[Any], bytes]:
    base = json.loads(tokenizer_json())
    hanging = {
        **base,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(a*)*b" * 50},
            "behavior": "Isolated",
            "invert": False,
        },
    }
    small = [place for place in places(base) if len(place) < 4][:200]
    choices = (
        dumps(hanging),
        b"[" * 50_000,
        b"{}",
        pickle.dumps({}),
        dumps(put(base, random.choice(small), random.choice(SCALARS))),
    )
    return [FORM], form(part(random.choice(choices), filename=b"tokenizer.json"))


FORMS: dict[str, Callable[[Random], tuple[list[Any], bytes]]] = {
    "name of a file": _named,
    "field": _field,
    "boundary": _boundary,
    "broken": _broken,
    "lines": _data,
    "compressed": _packed,
}
FILES: dict[str, tuple[str, Callable[[Random], tuple[list[Any], bytes]]]] = {
    "weights": ("/models", _weights),
    "config": ("/models", _config),
    "tokenizer": ("/tokenizers", _tokenizer),
}


def hostile_file(random: Random) -> Attack:
    """A model or tokenizer whose check may start a process: slower than the others, so fewer of them."""
    kind, (path, make) = random.choice(list(FILES.items()))
    headers, body = make(random)
    return request(f"file: {kind}", "POST", path, body, headers)


@functools.cache
def _gzip_bomb() -> bytes:
    return gzip.compress(b"a" * 100_000_000)


@functools.cache
def _zstd_bomb() -> bytes:
    return zstandard.compress(b"a" * 200_000_000)


@functools.cache
def _not_weights() -> tuple[bytes, ...]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return (
        pickle.dumps({"a": [1] * 100}),
        archive.getvalue(),
        b"GGUF" + bytes(64),
        b"GGUF\x03\0\0\0" + b"\xff" * 16,
        b"\x80\x04.",
        b"",
    )


@functools.cache
def _safetensors() -> tuple[bytes, ...]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    duplicate = b'{"a":' + dumps(entry) + b',"a":' + dumps(entry) + b"}"
    return (
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 9 * 2**20) + b" " * 1000,
        with_header({}),
        struct.pack("<Q", len(duplicate)) + duplicate + bytes(8),
        struct.pack("<Q", 4) + b"null",
        with_header({str(number): entry for number in range(20_000)}, bytes(8)),
        with_header({"a": entry, "b": {**entry, "data_offsets": [4, 12]}}, bytes(12)),
        with_header({"a": {**entry, "data_offsets": [0, 2**60]}}, bytes(8)),
        with_header({"a": {**entry, "data_offsets": [8, 0]}}, bytes(8)),
        with_header({"a": {**entry, "data_offsets": [-8, 0]}}, bytes(8)),
        with_header({"a": {**entry, "shape": [2**40, 2**40]}}, bytes(8)),
        with_header({"a": {**entry, "shape": [-2]}}, bytes(8)),
        with_header({"a": {**entry, "dtype": "X" * 900}}, bytes(8)),
        with_header({MARK * 2_000: entry}, bytes(8)),
        with_header({"a": 1}),
        with_header({"__metadata__": {"a": [1]}}),
        *_not_weights(),
    )


def large(random: Random) -> Attack:
    """50 MB, announced or not."""
    paths = ("/jobs", "/plans", "/datasets", "/models", "/v1/files", "/v1/uploads/upload_1/parts", "/jobs/job_1/cancel")
    path = random.choice(paths)
    kind = ("Content-Type", "application/json") if "s" not in path[-1] or random.random() < 0.5 else FORM
    portion, count = b"[" * 500_000, 100
    if random.random() < 0.5:
        size = portion_size = len(portion) * count
        return Attack(
            f"50 MB announced as {portion_size}",
            head("POST", path, [kind, ("Content-Length", str(size))]),
            [portion] * count,
        )
    chunk = b"%x\r\n" % len(portion) + portion + b"\r\n"
    return Attack(
        "50 MB in chunks",
        head("POST", path, [kind, ("Transfer-Encoding", "chunked")]),
        [*[chunk] * count, b"0\r\n\r\n"],
    )
