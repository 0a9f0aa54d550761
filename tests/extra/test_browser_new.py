"""A new job, a comparison and data in a real browser, at a real service: from a dropped file to a checkpoint."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from cli.specs import read_spec
from tests.e2e.running import Running
from tests.extra.conftest import PHONE

pytestmark = pytest.mark.extra

TALK = "the memory of a model grows with every token that it keeps and a chunk needs only its own part of it"
WORDS = TALK.split()
DROP = """([selector, name, text]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([text], name));
  for (const kind of ["dragenter", "dragover", "drop"])
    document.querySelector(selector).dispatchEvent(
      new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""
COLOURS = """() => {
  const canvas = document.querySelector("#curve canvas");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = new Set();
  for (let at = 0; at < data.length; at += 4) if (data[at + 3] > 200) seen.add(data.slice(at, at + 3).join());
  return seen.size;
}"""
"""How many colours were drawn; an empty canvas has none."""


def notes(documents: int = 40, words: int = 400) -> str:
    chance = random.Random(7)  # noqa: S311  # text to learn
    return "".join(
        json.dumps({"text": " ".join(chance.choice(WORDS) for _ in range(words))}) + "\n" for _ in range(documents)
    )


@pytest.fixture(scope="module")
def api(stack: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def dataset(api: httpx2.Client) -> str:
    answer = api.post("/datasets", files={"file": ("notes.jsonl", notes())}, data={"name": "Notes on memory"})
    dataset_id: str = answer.json()["id"]
    return dataset_id


@pytest.fixture(scope="module")
def twins(api: httpx2.Client, dataset: str) -> list[str]:
    """The same training under two caps, at work while other tests run."""
    body = {"model": "performer-tiny", "dataset": dataset, "sequence_length": 512, "steps": 12, "seed": 3}
    body |= {"validation_fraction": 0.1, "evaluate_every": 4, "optimizer": {"learning_rate": 0.003}}
    plan = api.post("/plans", json={**body, "memory_cap": "1GiB"}).json()
    caps = {"roomy": "1GiB", "tight": plan["minimum_cap_bytes"] + 2**20}
    made = [api.post("/jobs", json={**body, "name": name, "memory_cap": cap}) for name, cap in caps.items()]
    assert [each.status_code for each in made] == [202, 202]
    return [each.json()["id"] for each in made]


def succeeded(api: httpx2.Client, job_id: str) -> dict[str, Any]:
    wait_until(lambda: api.get(f"/jobs/{job_id}").json()["status"] not in ("queued", "running"), f"{job_id} ends")
    job: dict[str, Any] = api.get(f"/jobs/{job_id}").json()
    assert job["status"] == "succeeded", job["error"]
    return job


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"not within two minutes: {what}"
        time.sleep(0.2)


def planned(page: Any) -> str:
    """What the page says of the plan, when it says that of the form as it is now."""
    page.locator("#plan[aria-busy=false]").wait_for()
    return str(page.locator("#plan-says").inner_text())


def change(page: Any, label: str, value: str) -> str:
    with page.expect_response(lambda answer: answer.url.endswith("/plans")):
        page.get_by_label(label, exact=True).fill(value)
    return planned(page)


@pytest.mark.usefixtures("twins")
def test_from_a_dropped_file_to_a_checkpoint(
    open_page: Callable[..., Any], shot: Callable[..., Path], api: httpx2.Client, tmp_path: Path
) -> None:
    page = open_page("/ui/new")
    page.watched.allowed = ["status of 422"]
    page.wait_for_selector("#curve canvas")
    assert page.evaluate(COLOURS) > 10
    page.evaluate(DROP, ["#drop", "<b>broken.jsonl", '{"text": "fine"}\n{"text": \n'])
    page.get_by_text("<b>broken.jsonl was refused").wait_for()
    assert "Line 2" in page.locator("#upload .problems").inner_text()
    page.evaluate(DROP, ["#drop", "notes.jsonl", notes()])
    page.get_by_text("is uploaded").wait_for()
    assert page.locator("#f-dataset option:checked").inner_text().startswith("notes.jsonl")
    page.get_by_label("Name", exact=True).fill("From a dropped file")

    text = change(page, "Memory cap *", "100 MiB")
    least = re.search(r"the smallest needs (\d+) MiB", text)
    assert least is not None
    page.get_by_role("button", name=re.compile("Raise the cap to")).click()
    page.locator("#plan-says dt", has_text="Predicted peak").wait_for()
    rows = page.locator("#plan-table tbody tr")
    assert rows.count() > 5
    assert page.locator("#plan-table tr.chosen").count() == 1

    handle = page.get_by_role("slider", name="Memory cap")
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 60, steps=5)
    page.mouse.up()
    dragged = int(page.get_by_label("Memory cap *").input_value().split()[0])
    assert dragged > int(least[1]) + 10
    handle.press("ArrowLeft")
    assert int(page.get_by_label("Memory cap *").input_value().split()[0]) < dragged
    planned(page)
    page.evaluate("scrollTo(0, 0)")
    shot(page, "dashboard-new")

    change(page, "Sequence length *", "256")
    page.get_by_label("Steps", exact=True).fill("3")
    before = len(api.get("/jobs").json()["data"])
    page.get_by_role("button", name="Start the job").dblclick()
    page.wait_for_url(re.compile("/ui/jobs/job_"))
    assert len(api.get("/jobs").json()["data"]) == before + 1
    job = succeeded(api, page.url.rpartition("/")[2])
    assert (job["name"], job["steps"], job["sequence_length"]) == ("From a dropped file", 3, 256)
    page.reload()
    with page.expect_download() as download:
        page.locator('a[href$="/files/model.safetensors"]').first.click()
    kept = next(
        file
        for file in api.get(f"/jobs/{job['id']}/checkpoints/final").json()["files"]
        if file["name"] == "model.safetensors"
    )
    download.value.save_as(tmp_path / "model")
    assert hashlib.sha256((tmp_path / "model").read_bytes()).hexdigest() == kept["sha256"]


@pytest.mark.usefixtures("twins")
def test_by_keyboard_alone_and_epochs_that_wait_for_their_counts(
    open_page: Callable[..., Any], api: httpx2.Client, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join('{"prompt": "one and one", "completion": " is two"}\n' for _ in range(60)))
    page = open_page("/ui/new")
    page.watched.allowed = ["status of 409"]
    # From now on files are asked for here: told only when the key is pressed, the browser may be the faster one.
    page.on("filechooser", lambda _chooser: None)
    planned(page)

    def tab_to(wanted: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == wanted:
                return
        pytest.fail(f"the keyboard does not get to {wanted}")

    def type_over(wanted: str, text: str) -> None:
        tab_to(wanted)
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type(text)

    type_over("f-name", "By keyboard")
    tab_to("file")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(pairs)
    page.get_by_text("is uploaded").wait_for()
    type_over("f-memory_cap", "500 MiB")
    type_over("f-sequence_length", "64")
    tab_to("f-batch_size")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # from steps to epochs
    type_over("f-epochs", "1")
    planned(page)
    page.locator("#plan-says dt", has_text="Predicted peak").wait_for()
    tab_to("start")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/ui/jobs/job_"))
    job = api.get(f"/jobs/{page.url.rpartition('/')[2]}").json()
    assert (job["name"], job["epochs"], job["memory_cap"]) == ("By keyboard", 1, 500 * 2**20)
    api.post(f"/jobs/{job['id']}/cancel")


def test_the_same_job_as_a_file_and_as_commands(
    open_page: Callable[..., Any], api: httpx2.Client, twins: list[str]
) -> None:
    page = open_page(f"/ui/new?from={twins[0]}")
    page.get_by_label("Name", exact=True).fill('it\'s: 100% "new"')
    page.get_by_label("Epsilon").fill("0.0000001")
    page.get_by_label("Optimizer", exact=True).select_option("sgd")
    page.get_by_label("Optimizer", exact=True).select_option("adamw")
    page.get_by_label("Gradient clipping").fill("")
    page.get_by_label("Metadata").fill("team=on\nkey=a=b")
    page.get_by_label("Chunks", exact=True).select_option("own")
    page.get_by_label("Chunk length").fill("64")
    page.get_by_text("The same as a file or a command").click()

    def told(name: str) -> str:
        page.get_by_role("tab", name=name).click()
        return str(page.locator("#snippet").inner_text())

    body = json.loads(told("JSON"))
    assert body["optimizer"] == {"learning_rate": 0.003, "epsilon": 1e-7}
    assert (body["gradient_clip"], body["metadata"]) == (None, {"team": "on", "key": "a=b"})
    assert body["chunking"] == {"chunk_length": 64}
    assert "keep" not in body
    assert yaml.safe_load(told("YAML")) == body
    curl = shlex.split(told("curl").replace("\\\n", " "))
    assert json.loads(curl[curl.index("-d") + 1]) == body
    command = shlex.split(told("slimtune").replace("\\\n", " "))
    options = list(zip(command[2::2], command[3::2], strict=True))
    given = {flag[2:].replace("-", "_"): value for flag, value in options if flag not in ("--set", "--url")}
    spec = read_spec(None, given, [value for flag, value in options if flag == "--set"])
    numbers = ("sequence_length", "batch_size", "steps")
    assert spec | {name: int(spec[name]) for name in numbers if name in spec} == body
    assert api.post("/jobs", json={**body, "dataset": "ds_" + "0" * 32}).status_code == 404, "it is a request of ours"


def test_two_jobs_side_by_side(
    open_page: Callable[..., Any], shot: Callable[..., Path], api: httpx2.Client, twins: list[str]
) -> None:
    for job_id in twins:
        succeeded(api, job_id)
    page = open_page("/ui/compare")
    for index, job_id in enumerate(twins):
        page.get_by_label(f"{('First', 'Second')[index]} job").select_option(job_id)
    page.get_by_role("button", name="Compare").click()
    verdict = page.locator("#verdict")
    verdict.get_by_text("equal to within rounding at the 12 steps").wait_for()
    for by in ("tokens", "time"):
        page.get_by_label(by, exact=True).check()
        assert page.locator("#loss canvas").count() == 1
    page.get_by_label("steps", exact=True).check()
    differing = page.locator("section[aria-labelledby=asked] tr.differs th").all_inner_texts()
    assert [re.sub(r"\s*\(differs\)", "", each) for each in differing] == ["Name", "Memory cap"]
    assert page.locator(".bars dd").count() == 8
    shot(page, "dashboard-compare")


def test_data_comes_is_prepared_and_goes(open_page: Callable[..., Any], tmp_path: Path, api: httpx2.Client) -> None:
    text = tmp_path / "talk.txt"
    text.write_text(" ".join(WORDS) * 200)
    page = open_page("/ui/data")
    page.watched.allowed = ["status of 409"]
    page.locator("#file-datasets").set_input_files(text)
    item = page.locator("article", has_text="talk.txt")
    item.get_by_text("ready").wait_for()
    page.get_by_text("Train one on a dataset").click()
    page.locator("#train-dataset").select_option(label="talk.txt")
    page.get_by_label("Tokens in its vocabulary").fill("300")
    page.locator("#train").get_by_label("Name").fill("small words")
    page.get_by_role("button", name="Train", exact=True).click()
    words = page.locator("article", has_text="small words")
    words.get_by_text("ready").wait_for()
    words.get_by_role("button", name="Delete").click()
    sure = page.get_by_role("dialog")
    sure.get_by_role("button", name="Delete").click()
    page.get_by_text("None yet, and none is needed").wait_for()

    dataset = item.get_attribute("data-dataset")
    body = {"model": "performer-tiny", "dataset": dataset, "memory_cap": "1GiB", "sequence_length": 64, "steps": 10**6}
    job_id = api.post("/jobs", json=body).json()["id"]
    item.get_by_role("button", name="Delete").click()
    sure.get_by_role("button", name="Delete").click()
    sure.get_by_role("link", name=job_id).wait_for()
    sure.get_by_role("button", name="Keep it").click()
    api.post(f"/jobs/{job_id}/cancel")
    wait_until(lambda: api.get(f"/jobs/{job_id}").json()["status"] == "cancelled", "the job is cancelled")
    item.get_by_role("button", name="Delete").click()
    sure.get_by_role("button", name="Delete").click()
    item.wait_for(state="detached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_phone(open_page: Callable[..., Any], twins: list[str], scheme: str) -> None:
    for path in ("/ui/new", f"/ui/new?from={twins[0]}", f"/ui/compare?job={twins[0]}&job={twins[1]}", "/ui/data"):
        page = open_page(path, viewport=PHONE, color_scheme=scheme)
        page.wait_for_load_state("networkidle")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], path
