"""What pages do when something goes wrong on the way: answers that are late, refusals, a proxy in place of the service.

The faults are made in the browser, so that each comes when it is to come; the service behind them is a real one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.client import Client
from tests.e2e.running import Running

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-extra.lock)")

pytestmark = pytest.mark.extra

expect = api.expect
BODY: Any = {"model": "performer-tiny", "memory_cap": "300MiB", "sequence_length": 256, "steps": 8}
METADATA = {"plain": "text", "a=b": "two\nlines", '"q': ' "x" ', "__proto__": "=", "path": "C:\\new", "شعر": "\u2028"}
PROBLEM = {"title": "Unavailable", "detail": "No database.", "code": "database_unavailable", "status": 503}


@pytest.fixture(scope="module")
def client(stack: Running) -> Iterator[Client]:
    with Client(stack.url) as client:
        yield client


@pytest.fixture(scope="module")
def dataset(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {number} of some text " * 20}) for number in range(40)))
    return client.datasets.upload(path)["id"]


@pytest.fixture(scope="module")
def done(client: Client, dataset: str) -> str:
    """A job that has succeeded."""
    job = client.jobs.create(**BODY, dataset=dataset, name="done", metadata=METADATA)
    return job.wait(timeout_seconds=120).id


@pytest.fixture
def paused(client: Client, dataset: str) -> Iterator[str]:
    """A job that waits for somebody: its page looks at it again and again, and nothing changes."""
    job = client.jobs.create(**BODY | {"steps": 100_000}, dataset=dataset, name="paused").pause()
    with pytest.raises(Exception, match="paused"):
        job.wait(timeout_seconds=60)
    yield job.id
    job.cancel()


def is_look(request: Any) -> bool:
    return bool(request.headers.get("hx-request") == "true")


@pytest.mark.parametrize("body", ["", "<html><body><h1>Bad gateway</h1></body></html>"])
def test_what_a_proxy_says_is_no_piece_of_the_page(open_page: Callable[..., Any], paused: str, body: str) -> None:
    page = open_page(f"/ui/jobs/{paused}")
    page.watched.allowed += ["status of 502", "htmx:"]
    page.route("**/ui/jobs/*", lambda route: route.fulfill(status=502, body=body, content_type="text/html"))
    expect(page.locator("#messages")).to_contain_text("does not answer", timeout=15_000)
    expect(page.locator("h1")).to_have_text("paused")
    page.unroute("**/ui/jobs/*")
    expect(page.locator("#messages")).to_be_empty(timeout=10_000)
    expect(page.locator("#resume")).to_be_visible()


def test_a_fault_is_said_once_and_taken_back(open_page: Callable[..., Any], paused: str) -> None:
    page = open_page("/")
    page.watched.allowed += ["status of 503", "htmx:"]
    message = '<p class="alert" role="alert">No database.</p>'
    headers = {"HX-Retarget": "#messages", "HX-Reswap": "innerHTML", "Content-Type": "text/html"}
    asked = []

    def refuse(route: Any) -> None:
        if is_look(route.request):
            asked.append(route.request.url)
            route.fulfill(status=503, body=message, headers=headers)
        else:
            route.continue_()

    page.route("**/", refuse)
    line = page.locator("#messages p")
    expect(line).to_have_text("No database.", timeout=15_000)
    line.evaluate("element => { element.dataset.first = 'yes'; }")
    while len(asked) < 3:
        page.wait_for_timeout(200)
    expect(line).to_have_attribute("data-first", "yes")
    page.unroute("**/")
    expect(page.locator("#messages")).to_be_empty(timeout=10_000)


def test_a_cap_that_was_not_planned_yet_pauses_nothing(open_page: Callable[..., Any], paused: str) -> None:
    page = open_page(f"/ui/jobs/{paused}")
    sent = []
    page.on("request", lambda request: sent.append(request.url) if "/resume" in request.url else None)
    page.locator("#change-cap").click()
    page.locator("#cap-input").fill("299MiB")
    expect(page.locator("#cap-apply")).to_be_enabled()
    page.locator("#cap-input").press("Backspace")
    assert page.locator("#cap-apply").is_disabled()
    page.locator("#cap-input").press("Enter")
    assert sent == []


def test_a_change_of_cap_outlives_refusals_and_ends_with_its_dialog(open_page: Callable[..., Any], paused: str) -> None:
    page = open_page(f"/ui/jobs/{paused}")
    page.watched.allowed += ["status of 429", "status of 503"]
    answers: list[Any] = [429, 503, "running", "paused"]
    resumed = []

    def status(route: Any) -> None:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, int):
            route.fulfill(status=answer, json=PROBLEM)
        else:
            route.fulfill(json={"status": answer})

    def resume(route: Any) -> None:
        resumed.append(route.request.post_data_json)
        route.fulfill(json={})

    page.route(f"**/jobs/{paused}/resume", resume)
    page.route(f"**/jobs/{paused}/pause", lambda route: route.fulfill(json={}))
    page.locator("#change-cap").click()
    page.locator("#cap-input").fill("299MiB")
    expect(page.locator("#cap-apply")).to_be_enabled()
    answers.insert(0, "running")
    page.route(f"**/jobs/{paused}", lambda route: route.fallback() if is_look(route.request) else status(route))
    page.locator("#cap-apply").click()
    expect(page.locator("#cap")).to_be_hidden(timeout=15_000)
    assert resumed == [{"memory_cap": "299MiB"}]
    answers[:] = ["running"]
    page.locator("#change-cap").click()
    page.locator("#cap-input").fill("298MiB")
    page.locator("#cap-apply").click()
    expect(page.locator("#cap-plan")).to_contain_text("Pausing")
    page.keyboard.press("Escape")
    answers[:] = ["paused"]
    expect(page.locator("#cap-plan")).to_be_empty()
    assert len(resumed) == 1


def test_a_curve_that_is_asked_for_meanwhile_is_drawn_too(open_page: Callable[..., Any], done: str) -> None:
    """Goes red if what was wanted while an answer was on its way is forgotten."""
    page = open_page("/")
    asked: list[str] = []
    late: list[Any] = []

    def hold(route: Any) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:
            late.append(route)
        else:
            route.continue_()

    page.route("**/curve?*", hold)
    page.goto(f"/ui/jobs/{done}")
    expect(page.locator("#loss-chart .waiting")).to_be_visible()
    while not late:
        page.wait_for_timeout(50)
    page.evaluate("document.getElementById('whole').click()")
    late[0].continue_()
    expect(page.locator("#loss-chart canvas")).to_be_visible()
    page.wait_for_timeout(300)
    assert len(asked) == 2


def test_a_sample_that_breaks_off_is_said(open_page: Callable[..., Any], done: str) -> None:
    page = open_page(f"/ui/jobs/{done}")
    half = 'event: token\ndata: {"text": "half of it"}\n\n'
    page.route("**/generate", lambda route: route.fulfill(body=half, content_type="text/event-stream"))
    page.locator("#prompt").fill("A line")
    page.locator("#sample-start").click()
    expect(page.locator("#sample-error")).to_contain_text("broke off")
    expect(page.locator("#sample-text")).to_contain_text("half of it")


def test_two_jobs_are_looked_at_until_they_are_over_whatever_comes_between(
    open_page: Callable[..., Any], done: str, paused: str
) -> None:
    page = open_page("/")
    page.watched.allowed += ["status of 503"]
    states = ["paused", 503, "succeeded"]
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(states.pop(0))
        if asked[-1] == 503:
            route.fulfill(status=503, json=PROBLEM)
        else:
            route.fulfill(json={"id": paused, "status": asked[-1]})

    page.route(f"**/jobs/{paused}", answer)
    page.goto(f"/ui/compare?job={done}&job={paused}")
    expect(page.locator("#loss canvas")).to_be_visible()
    expect(page.locator("#messages")).to_contain_text("does not answer", timeout=15_000)
    expect(page.locator("#messages")).to_be_empty(timeout=15_000)
    expect(page.locator("#verdict")).not_to_have_text("The curves could not be loaded.")
    page.wait_for_timeout(5_500)
    assert asked == ["paused", 503, "succeeded"]


def test_an_older_answer_of_the_lists_does_not_win(
    open_page: Callable[..., Any], client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "to-go.txt"
    path.write_text("a text " * 100)
    dataset = client.datasets.upload(path)
    client.datasets.wait(dataset["id"])
    page = open_page("/ui/data")
    stale = page.content()
    page.locator(f"#tokenize-{dataset['id']}").click()
    held: list[Any] = []
    arrived = threading.Event()

    def hold(route: Any) -> None:
        if held:
            route.continue_()
            return
        held.append(route)
        arrived.set()

    page.route("**/ui/data/lists*", hold)
    page.locator("#tokenize").click()  # asks for the lists, whose answer is late
    while not arrived.is_set():
        page.wait_for_timeout(50)
    page.keyboard.press("Escape")
    page.locator(f"#delete-{dataset['id']}").click()
    page.locator("#delete").click()
    expect(page.locator(f"#{dataset['id']}")).to_have_count(0)
    held[0].fulfill(body=stale, content_type="text/html")
    page.wait_for_timeout(500)
    expect(page.locator(f"#{dataset['id']}")).to_have_count(0)


def test_a_job_like_another_has_its_metadata(open_page: Callable[..., Any], done: str) -> None:
    page = open_page(f"/ui/new?from={done}")
    page.locator("#as-request summary").click()
    page.locator("#tab-json").click()
    assert json.loads(page.locator("#snippet").text_content())["metadata"] == METADATA


def test_a_curve_with_zeros_and_gaps_has_a_logarithm(open_page: Callable[..., Any], done: str) -> None:
    losses = [4.0, 0.0, None, 1e-9, 3.0, None, 0.0]
    nothing = [None] * len(losses)
    columns = {
        "width": 2,
        "step": list(range(1, 8)),
        "attempt": [1] * 7,
        "loss": losses,
        "lowest_loss": losses,
        "highest_loss": losses,
        **dict.fromkeys(("validation_loss", "learning_rate", "step_seconds"), nothing),
    }
    page = open_page("/")
    page.route("**/curve?*", lambda route: route.fulfill(json=columns))
    for values in (losses, nothing, [0.0] * 7):
        columns.update(dict.fromkeys(("loss", "lowest_loss", "highest_loss"), values))
        page.goto(f"/ui/jobs/{done}")
        expect(page.locator("#loss-chart canvas")).to_be_visible()
        page.locator("#log-scale").check()
        expect(page.locator("#log-scale")).to_be_checked()
        expect(page.locator("#loss-chart canvas")).to_be_visible()


@pytest.mark.parametrize("width", [390, 320])
def test_the_longest_names_fit_a_phone(
    open_page: Callable[..., Any], client: Client, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a text")
    client.datasets.upload(path, name="x" * 120 + "\u202eright to left" + "y" * 60)
    for address in ("/ui/data", "/ui/new", "/ui/compare", "/ui/devices", "/"):
        page = open_page(address, viewport={"width": width, "height": 800})
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address
