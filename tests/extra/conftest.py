"""Pages in a real browser, at a service that was started as its users start it.

Every page is watched: what it logs as an error, every violation of its content security policy, and every request to
another host fails the test that opened it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.running import Running, up

CHROMIUM = Path("/usr/bin/chromium")
FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
FAST = {
    "SLIMTUNE_HEARTBEAT_SECONDS": "1",
    "SLIMTUNE_SELF_KILL_SECONDS": "4",
    "SLIMTUNE_LEASE_SECONDS": "6",
    "SLIMTUNE_SWEEP_SECONDS": "1",
    "SLIMTUNE_DEVICE_MEMORY_BYTES": str(2 << 30),
}
"""A killed worker is missed after six seconds in place of ninety; a device on which there is little room."""

_RECORD_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`content security policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@dataclass
class Watched:
    """What a browser did that no page of ours may do."""

    host: str
    faults: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    """Parts of faults that a test provokes: the browser logs each answer above 399."""

    def left(self) -> list[str]:
        return [fault for fault in self.faults if not any(part in fault for part in self.allowed)]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser. Skips where there is none, or nothing to drive it."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-extra.lock)")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def stack(scratch: Path, calibrated: Callable[[Path], None]) -> Iterator[Running]:
    """`slimtune up`, for all tests in a browser; its worker knows the machine. `stack.url` is where it answers."""
    home = scratch / "browser-home"
    calibrated(home)
    with up(home, **FAST) as running:
        yield running


@pytest.fixture
def open_page(chromium: Any, stack: Running) -> Iterator[Callable[..., Any]]:
    """`open_page("/", viewport=PHONE, color_scheme="dark")`: a page in a browser of its own, watched.

    `page.watched.allowed` takes parts of faults that the test expects.
    """
    contexts: list[tuple[Any, Watched]] = []

    def start(path: str = "/", **options: Any) -> Any:
        watched = Watched(urlsplit(stack.url).netloc)
        context = chromium.new_context(base_url=stack.url, **{"viewport": DESKTOP, **options})
        context.set_default_timeout(20_000)
        context.add_init_script(_RECORD_VIOLATIONS)
        contexts.append((context, watched))
        page = context.new_page()
        page.watched = watched
        page.on("console", lambda message: _log(watched, message))
        page.on("pageerror", lambda error: watched.faults.append(f"not caught: {error}"))
        page.on("request", lambda request: _check_host(watched, request.url))
        page.goto(path)
        return page

    yield start
    for context, _ in contexts:
        context.close()
    assert [fault for _, watched in contexts for fault in watched.left()] == []


@pytest.fixture
def shot() -> Callable[[Any, str], Path]:
    """`shot(page, "dashboard-jobs")`: the page as far as it has something, as docs/figures/dashboard-jobs.png."""

    def take(page: Any, name: str) -> Path:
        path = FIGURES / f"{name}.png"
        page.locator("body").screenshot(path=path, animations="disabled")
        return path

    return take


def _log(watched: Watched, message: Any) -> None:
    if message.type in ("error", "warning"):
        watched.faults.append(f"{message.type}: {message.text} ({message.location.get('url', '')})")


def _check_host(watched: Watched, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("data", "blob") and parts.netloc != watched.host:
        watched.faults.append(f"asked another host: {url}")
