"""The pages of jobs and devices in a real browser, at a real service with a real job.

One job is followed from its first step to its end: a killed worker, a pause, another cap, the download. Pages have a
policy without `eval`, so waiting is for what can be seen (`expect`), not for expressions.
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cli.client import Client
from tests.e2e.running import Running

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-extra.lock)")

pytestmark = [pytest.mark.extra, pytest.mark.timeout(600)]

PHONE = {"width": 390, "height": 844}
STEPS = 80
"""Enough that a fast machine has some left when the job is paused."""
MIB = 1 << 20
READABLE = 4.5
"""WCAG 2.2, 1.4.3: contrast of text."""
VISIBLE = 3.0
"""1.4.11: of what shows where a control is."""


@pytest.fixture(scope="module")
def dataset(stack: Running, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "topics.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in pydoc_data.topics.topics.values()))
    with Client(stack.url) as client:
        return client.datasets.upload(path)["id"]


@pytest.fixture
def submit(stack: Running, dataset: str) -> Callable[..., str]:
    def create(name: str, **changes: Any) -> str:
        body: Any = {
            "name": name,
            "model": "performer-tiny",
            "dataset": dataset,
            "validation_fraction": 0.1,
            "memory_cap": "300MiB",
            "sequence_length": 4_096,
            "steps": STEPS,
            "optimizer": {"name": "adamw", "learning_rate": 3e-3},
            "evaluate_every": 20,
            "evaluate_sequences": 1,
            "checkpoint_every": 10,
        }
        with Client(stack.url) as client:
            return client.jobs.create(**(body | changes)).id

    return create


def pool_process_of_the_trainer(stack: Running) -> psutil.Process:
    """The worker's process that runs the job: the parent of the trainer."""
    children = psutil.Process(stack.process.pid).children(recursive=True)
    trainer = next(child for child in children if "worker.start" in " ".join(child.cmdline()))
    return trainer.parent()


def steps_shown(page: Any) -> int:
    return int(page.locator("#job").get_attribute("data-step"))


def press_until_focused(page: Any, locator: Any) -> None:
    """By the Tab key alone."""
    for _ in range(60):
        if locator.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    pytest.fail("the keyboard does not get there")


def expect(locator: Any, seconds: float = 60) -> Any:
    """Assertions that wait as long as a worker may take."""
    api.expect.set_options(timeout=seconds * 1_000)
    return api.expect(locator)


def watch_it_train(page: Any) -> None:
    expect(page.locator(".head .state")).to_have_text("Running")
    page.get_by_text("The curve as a table").click()
    rows = page.locator("#curve-table tbody tr")
    expect(rows.nth(5)).to_be_visible()
    expect(rows.nth(rows.count() + 2)).to_be_visible()  # it grows by itself
    expect(page.locator("#loss-chart canvas")).to_be_visible()
    expect(page.locator("#timeline")).to_contain_text("Checkpoint of step 10")


def kill_its_worker(page: Any, stack: Running) -> None:
    pool_process_of_the_trainer(stack).kill()
    expect(page.locator("#timeline")).to_contain_text("The worker is gone")
    expect(page.locator("#attempt")).to_have_text("attempt 2")
    expect(page.locator("#curve-details[open]")).to_be_visible()  # what was opened stays open
    before = steps_shown(page)
    expect(page.locator(f'#job[data-step="{before}"]')).to_have_count(0)


def pause_by_keyboard(page: Any) -> None:
    press_until_focused(page, page.locator("#pause"))
    page.keyboard.press("Enter")
    expect(page.locator(".head .state")).to_have_text("Paused")
    expect(page.locator("#resume")).to_be_visible()


def change_the_cap_by_keyboard(page: Any, new_cap: int) -> None:
    """After one that is too small, whose refusal offers the least that a plan exists for."""
    page.watched.allowed += ["status of 422"]
    press_until_focused(page, page.locator("#change-cap"))
    page.keyboard.press("Enter")
    field = page.locator("#cap-input")
    press_until_focused(page, field)
    page.keyboard.press("Control+A")
    page.keyboard.type("100MiB")
    expect(page.locator("#cap-plan .alert")).to_contain_text("No schedule fits 100 MiB")
    expect(page.locator("#cap-apply")).to_be_disabled()
    press_until_focused(page, page.locator("#cap-least"))
    page.keyboard.press("Enter")
    expect(page.locator("#cap-plan .done")).to_contain_text("chunks of")
    assert int(field.input_value()) > 200 * MIB
    page.keyboard.press("Control+A")
    page.keyboard.type(f"{new_cap}")
    expect(page.locator("#cap-apply")).to_be_enabled()
    press_until_focused(page, page.locator("#cap-apply"))
    page.keyboard.press("Enter")
    expect(page.locator("#cap")).to_be_hidden()
    expect(page.locator("#timeline")).to_contain_text("Planned anew")
    expect(page.locator(".head .state")).to_have_text("Running")


def download_its_weights(page: Any, sha256: str, target: Path) -> None:
    expect(page.locator(".checkpoint .mark", has_text="final")).to_be_visible()
    link = page.get_by_role("link", name="model.safetensors").first
    if not link.is_visible():
        page.locator(".checkpoint summary").first.click()
    with page.expect_download() as download:
        link.click()
    download.value.save_as(target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == sha256
    expect(page.locator(f'[data-copy="{sha256}"]').first).to_be_visible()


def try_the_model(page: Any) -> None:
    start, status = page.locator("#sample-start"), page.locator("#sample-status")
    page.locator("#prompt").fill("The import statement")
    page.locator("#max-tokens").fill("60")
    start.click()
    expect(status).to_contain_text("60 tokens in")
    assert len(page.locator("#sample-text").inner_text()) > len("The import statement") + 10
    page.locator("#max-tokens").fill("4096")
    start.click()
    expect(status).to_have_text("Writing…")
    page.locator("#sample-stop").click()
    expect(status).to_have_text("Stopped.")
    page.watched.allowed += ["status of 404"]
    page.locator("#which").fill("12345")
    start.click()
    expect(page.locator("#sample-error")).to_contain_text("There is no checkpoint")


def test_a_job_from_its_first_step_to_its_download(
    open_page: Callable[..., Any],
    shot: Callable[[Any, str], Path],
    submit: Callable[..., str],
    stack: Running,
    tmp_path: Path,
) -> None:
    job_id = submit("pydoc topics")
    page = open_page(f"/ui/jobs/{job_id}")
    watch_it_train(page)
    kill_its_worker(page, stack)
    pause_by_keyboard(page)
    change_the_cap_by_keyboard(page, 280 * MIB)
    expect(page.locator(".head .state"), 240).to_have_text("Succeeded")
    expect(page.get_by_text("Cap held")).to_be_visible()
    with Client(stack.url) as client:
        job = client.jobs.get(job_id)
        files = {file["name"]: file for file in job.checkpoint("final")["files"]}
    assert job.memory_cap_bytes == 280 * MIB
    assert job.data["attempt"] >= 3
    download_its_weights(page, files["model.safetensors"]["sha256"], tmp_path / "model.safetensors")
    page.locator("#curve-details").evaluate("element => { element.open = false; }")
    page.locator("#timeline .warn").first.scroll_into_view_if_needed()
    shot(page, "dashboard-job")
    try_the_model(page)


def test_the_list_is_alive_keeps_the_focus_and_cancels(
    open_page: Callable[..., Any], shot: Callable[[Any, str], Path], submit: Callable[..., str]
) -> None:
    first = submit("learning rate 3e-3", steps=100_000, memory_cap="280MiB")
    page = open_page("/")
    row = page.locator(f"#{first}")
    expect(row.locator(".state")).to_have_text("Running")
    box = page.locator(f"#pick-{first}")
    box.focus()
    page.keyboard.press("Space")
    second = submit("learning rate 1e-2", steps=1_000, optimizer={"name": "adamw", "learning_rate": 1e-2})
    expect(page.locator(f"#{second}")).to_be_visible()  # without a click
    expect(box).to_be_focused()
    expect(box).to_be_checked()
    compare = page.locator("#compare")
    expect(compare).to_be_disabled()
    page.locator(f"#pick-{second}").check()
    expect(compare).to_be_enabled()
    expect(row.locator(".progress")).to_contain_text("left")
    third = submit("too wide for now", memory_cap="1700MiB")
    for running in (first, second):
        expect(page.locator(f"#{running} .memory")).not_to_contain_text("planned")  # it is measured
    expect(page.locator(f"#{third} .state")).to_have_text("Queued")
    page.mouse.move(0, 0)
    shot(page, "dashboard-jobs")
    dark = open_page("/ui/devices", color_scheme="dark")
    expect(dark.get_by_role("link", name="learning rate 3e-3")).to_be_visible()
    expect(dark.get_by_text("Live")).to_be_visible()
    expect(dark.locator(f"#waits-{third}")).to_contain_text("at most are free")
    shot(dark, "dashboard-devices")

    page.get_by_role("link", name="learning rate 3e-3").focus()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("learning rate 3e-3")
    press_until_focused(page, page.locator("#ask-cancel"))
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Cancel this job?")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#ask-cancel")).to_be_focused()
    page.keyboard.press("Enter")
    press_until_focused(page, dialog.get_by_role("button", name="Cancel the job"))
    page.keyboard.press("Enter")
    expect(page.locator(".head .state")).to_have_text("Cancelled")
    expect(page.locator("#job[data-every]")).to_have_count(0)
    for other in (third, second):
        page.goto(f"/ui/jobs/{other}")
        page.locator("#ask-cancel").click()
        page.get_by_role("button", name="Cancel the job").click()
        expect(page.locator(".head .state")).to_have_text("Cancelled")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page("/", color_scheme=scheme)
    tinted = ("accent", "warn", "danger", "good")
    pairs = [(text, "page", READABLE) for text in ("text", "muted", "accent")]
    pairs += [(text, "card", READABLE) for text in ("text", "muted", "second", *tinted)]
    pairs += [(text, "shade", READABLE) for text in ("text", "muted")]
    pairs += [(text, f"{name}-tint", READABLE) for name in tinted for text in (name, "text", "muted")]
    pairs += [("accent-text", "accent", READABLE), ("card", "danger", READABLE)]
    pairs += [("edge", "card", VISIBLE), ("focus", "page", VISIBLE), ("focus", "card", VISIBLE)]
    read = """names => Object.fromEntries(names.map(
        name => [name, getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim()]))"""
    colours = page.evaluate(read, [name for pair in pairs for name in pair[:2]])
    poor = {(a, b): ratio for a, b, least in pairs if (ratio := contrast(colours[a], colours[b])) < least}
    assert poor == {}


def contrast(first: str, second: str) -> float:
    """Of two colours such as #0f6e66 (WCAG 2.2, contrast ratio)."""

    def luminance(colour: str) -> float:
        assert re.fullmatch(r"#[0-9a-f]{6}", colour), colour
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


ROLES = """
() => {
  const name = (e) => e.getAttribute("aria-label") || (e.getAttribute("aria-labelledby") || "").split(" ")
    .map((id) => document.getElementById(id)?.textContent ?? "").join(" ").trim() ||
    [...(e.labels ?? [])].map((l) => l.textContent).join(" ").trim() || e.textContent.trim() || e.title;
  const visible = (e) => e.offsetParent !== null || e.getClientRects().length > 0;
  const faults = [];
  const named = "a[href], button, input, select, textarea, summary, [role=img], [role=region], dialog";
  for (const e of document.querySelectorAll(named))
    if (!name(e)) faults.push("no name: " + e.outerHTML.slice(0, 120));
  if (document.querySelectorAll("main").length !== 1) faults.push("not one main");
  if (document.querySelectorAll("h1").length !== 1) faults.push("not one h1");
  if (!document.documentElement.lang) faults.push("no language");
  if (document.querySelector("nav:not([aria-label])")) faults.push("a nav without a name");
  for (const e of document.querySelectorAll("button, .choice a, input[type=checkbox]")) {
    const box = e.getBoundingClientRect();
    const small = box.height < 15 || box.width < 15;
    if (visible(e) && box.height > 0 && small) faults.push("too small: " + e.outerHTML.slice(0, 120));
  }
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) faults.push(`wider than the screen: ${width} of ${innerWidth}`);
  return faults;
}
"""


@pytest.mark.parametrize("viewport", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desktop"])
def test_pages_have_names_for_everything_and_fit_the_screen(
    open_page: Callable[..., Any], stack: Running, viewport: dict[str, int], submit: Callable[..., str]
) -> None:
    job_id = submit("a name " * 20 + "x" * 60, steps=1, metadata={"k" * 60: "v" * 400})
    page = open_page(f"/ui/jobs/{job_id}", viewport=viewport)
    expect(page.locator(".head .state")).to_have_text("Succeeded")
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    assert page.evaluate(ROLES) == []
    for path in ("/", "/ui/devices", "/?status=failed"):
        page.goto(path)
        assert page.evaluate(ROLES) == []


def test_a_service_that_is_gone_is_said_and_the_page_goes_on(open_page: Callable[..., Any]) -> None:
    page = open_page("/")
    page.watched.allowed += ["ERR_INTERNET_DISCONNECTED", "Failed to fetch"]
    page.context.set_offline(True)
    expect(page.locator("#messages")).to_contain_text("The service does not answer")
    page.context.set_offline(False)
    expect(page.locator("#messages")).to_be_empty()


def test_the_theme_can_be_chosen_and_stays(open_page: Callable[..., Any]) -> None:
    page = open_page("/", color_scheme="light")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate(ground) != light
    page.reload()
    assert page.evaluate(ground) != light
