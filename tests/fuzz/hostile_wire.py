"""What follows a head that has begun, and what is no HTTP at all."""

from __future__ import annotations

LIES: tuple[bytes, ...] = (
    b"Content-Length: 100\r\n\r\n{}",
    b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    b"Content-Length: -1\r\n\r\n{}",
    b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"Content-Length: +2\r\n\r\n{}",
    b"Content-Length: 0x2\r\n\r\n{}",
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
    b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}",
    b"\r\n{}",
    b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n2;" + b"x" * 100_000 + b"\r\n{}\r\n0\r\n\r\n",
    b"Transfer-Encoding: identity\r\n\r\n{}",
    b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
    b"X: a\r\n b\r\n\r\n",
    b"X\x00: a\r\n\r\n",
    b"X : a\r\n\r\n",
    b": a\r\n\r\n",
    b"X: \x00\r\n\r\n",
    b"X: a\rb\r\n\r\n",
    b"X: a\n\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n",
)
"""About the length of the body, and headers that are none."""

GARBAGE: tuple[bytes, ...] = (
    b"",
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /healthz\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /a b HTTP/1.1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT a:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET //evil/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://evil/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 30_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
)
