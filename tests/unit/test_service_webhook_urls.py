"""Where webhooks may go, and what does not pass for it."""

from __future__ import annotations

import pytest

from service.settings import Settings
from service.webhook_urls import Allowed, UrlError, parse

ALLOWED = Allowed.parse(
    "https://hooks.example.com/in/slim, https://xn--bcher-kva.example, http://10.1.2.3:8080/a/,https://[2001:DB8::1]:9000"
)


@pytest.mark.parametrize(
    ("url", "sent_to"),
    [
        ("https://hooks.example.com/in/slim", "https://hooks.example.com/in/slim"),
        ("https://hooks.example.com/in/slim/", "https://hooks.example.com/in/slim/"),
        ("HTTPS://Hooks.Example.COM:443/in/slim/x?token=a%20b&c", "https://hooks.example.com/in/slim/x?token=a%20b&c"),
        ("https://hooks.example.com:0443/in/slim", "https://hooks.example.com/in/slim"),
        ("https://hooks.example.com/in/slim/@other.com:80", "https://hooks.example.com/in/slim/@other.com:80"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example/"),
        ("https://XN--Bcher-KVA.example/any/thing", "https://xn--bcher-kva.example/any/thing"),
        ("http://10.1.2.3:8080/a/b", "http://10.1.2.3:8080/a/b"),
        ("http://10.1.2.3:8080/a", "http://10.1.2.3:8080/a"),
        ("https://[2001:db8:0:0::1]:9000/x", "https://[2001:db8::1]:9000/x"),
    ],
)
def test_what_lies_below_an_allowed_address(url: str, sent_to: str) -> None:
    target = parse(url)
    assert ALLOWED.covers(target)
    assert target.url == sent_to
    assert parse(target.url) == target


DISGUISES = [
    "http://hooks.example.com/in/slim",
    "https://hooks.example.com",
    "https://hooks.example.com/in",
    "https://hooks.example.com/in/slimmer",
    "https://hooks.example.com/IN/slim",
    "https://hooks.example.com/in/slim/../admin",
    "https://hooks.example.com/in/slim/..",
    "https://hooks.example.com/in/slim/./x",
    "https://hooks.example.com/in/slim/%2e%2e/admin",
    "https://hooks.example.com/in/slim/%2E./admin",
    "https://hooks.example.com/in/slim/%252e%252e/admin",
    "https://hooks.example.com/in/slim/..%2fadmin",
    "https://hooks.example.com/in/slim/..%5cadmin",
    "https://hooks.example.com/in/slim/..;/admin",
    "https://hooks.example.com/in/slim/..%3b/admin",
    "https://hooks.example.com/in/slim\\..\\admin",
    "https://hooks.example.com/in//slim/x",
    "https://hooks.example.com//in/slim",
    "https://hooks.example.com/in/slim//x",
    "https://hooks.example.com/in/%73lim",
    "https://hooks.example.com/in/slim%00",
    "https://hooks.example.com/in/slim#/x",
    "https://hooks.example.com?/in/slim",
    "https://hooks.example.com:8443/in/slim",
    "https://hooks.example.com:0/in/slim",
    "https://hooks.example.com:99999/in/slim",
    "https://hooks.example.com:/in/slim",
    "https://hooks.example.com:443@evil.com/in/slim",
    "https://hooks.example.com@evil.com/in/slim",
    "https://evil.com@hooks.example.com/in/slim",
    "https://user:pass@hooks.example.com/in/slim",
    "https://hooks.example.com%40evil.com/in/slim",
    "https://hooks.example.com\\@evil.com/in/slim",
    "https://evil.com\\@hooks.example.com/in/slim",
    "https://evil.com/hooks.example.com/in/slim",
    "https://evil.com?https://hooks.example.com/in/slim",
    "https://evil.com#@hooks.example.com/in/slim",
    "https://hooks.example.com.evil.com/in/slim",
    "https://hooks.example.com./in/slim",
    "https://.hooks.example.com/in/slim",
    "https://hooks..example.com/in/slim",
    "https://evilhooks.example.com/in/slim",
    "https://x.hooks.example.com/in/slim",
    "https://hooks.example.co/in/slim",
    "https://hooks\u3002example\u3002com/in/slim",
    "https://hooks.\uff45xample.com/in/slim",
    "https://h\u043eoks.example.com/in/slim",
    "https://b\u00fccher.example/",
    "https://hooks.example.com/in/slim\r\nHost: evil.com",
    "https://hooks.example.com/in/slim x",
    "https://hooks.example.com\t/in/slim",
    " https://hooks.example.com/in/slim",
    "https://hooks.example.com/in/slim\n",
    "https:/hooks.example.com/in/slim",
    "https:hooks.example.com/in/slim",
    "https:///hooks.example.com/in/slim",
    "//hooks.example.com/in/slim",
    "hooks.example.com/in/slim",
    "ftp://hooks.example.com/in/slim",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "unix:///in/slim",
    "http+unix://hooks.example.com/in/slim",
    "https://10.1.2.3:8080/a",
    "http://10.1.2.3/a",
    "http://10.1.2.3:8080/ab",
    "http://10.1.2.03:8080/a",
    "http://10.1.515:8080/a",
    "http://167838211:8080/a",
    "http://0x0a010203:8080/a",
    "http://0x0a.1.2.3:8080/a",
    "http://012.1.2.3:8080/a",
    "http://10.1.2.3.:8080/a",
    "http://10.1.2.3.nip.io:8080/a",
    "http://[::ffff:10.1.2.3]:8080/a",
    "http://[10.1.2.3]:8080/a",
    "https://[2001:db8::1%25eth0]:9000/x",
    "https://[2001:db8::2]:9000/x",
    "https://[2001:db8::1]/x",
    "https://2001:db8::1:9000/x",
    "https://[2001:db8::1]:9000@evil.com/",
    "https://[::1/x",
    "https://hooks.example.com/in/slim?a=%0g",
    "https://hooks.example.com/in/slim?a=<b>",
    "https://hooks.example.com/in/slim/" + "x" * 2_048,
    "https://" + "a" * 64 + ".example.com/in/slim",
    "https://-hooks.example.com/in/slim",
    "",
    "https://",
    "https://*/in/slim",
]


@pytest.mark.parametrize("url", DISGUISES)
def test_what_only_looks_like_an_allowed_address(url: str) -> None:
    try:
        passes = ALLOWED.covers(parse(url))
    except UrlError:
        passes = False
    assert not passes


def test_nothing_is_allowed_by_default() -> None:
    assert not Allowed.parse("").covers(parse("https://hooks.example.com/"))
    assert not Allowed.parse(" , ").covers(parse("https://hooks.example.com/"))


@pytest.mark.parametrize("text", ["hooks.example.com", "https://a.example,https://u@b.example", "https://a.example/?x"])
def test_a_setting_that_cannot_be_compared_starts_nothing(text: str, tmp_path: str) -> None:
    with pytest.raises(ValueError, match="webhook_allowed"):
        Settings(database_url="postgresql://", redis_url="redis://", data_dir=tmp_path, webhook_allowed=text)
