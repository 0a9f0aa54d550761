"""Pages of jobs and devices: every state renders, whole and by its pieces, and what a tenant wrote stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest
from sqlalchemy import Engine, func, text, update
from starlette.testclient import TestClient

from api.app import create_app
from api.web import timeline
from api.web.pages import SECURITY_HEADERS
from service import claims, database, devices, jobs, keys, metrics, runs
from service.database import transaction
from service.devices import Announcement
from service.failures import job_error
from service.models import Device, Job
from service.settings import Settings
from service.status import JobStatus
from service.storage import Storage
from tests.integration.seed import LEASE_SECONDS, add_checkpoint, add_dataset, add_job, claim, metric

MIB = 1 << 20
HOSTILE = """<script>alert("1")</script>'"`{{7*7}}&amp;"""
SPEC = {
    "memory_cap": 500_000_000,
    "sequence_length": 128,
    "batch_size": 1,
    "epochs": None,
    "validation_dataset": None,
    "optimizer": {"name": "adamw"},
    "schedule": {"name": "cosine"},
    "gradient_clip": None,
    "evaluate_every": 5,
    "evaluate_sequences": 8,
    "checkpoint_every": None,
    "early_stopping": None,
    "chunking": "auto",
    "seed": 0,
}
VOID = frozenset({"meta", "link", "input", "img", "br"})
SVG_ENDS = frozenset({"rect", "line", "path", "circle"})


@dataclass
class Page(HTMLParser):
    """A page as far as these tests look at it. Raises AssertionError where a tag ends that is not open."""

    open: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)
    fields: list[dict[str, str | None]] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    scripts: list[dict[str, str | None]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if len(found) != len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in SVG_ENDS:
            self.faults.append(f"<{tag}/> does not end there")
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        opened = self.open.pop()
        assert opened == tag, f"</{tag}> ends <{opened}>"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def _note(self, tag: str, found: dict[str, str | None]) -> None:
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "label":
            self.labels.add(str(found.get("for")))
        if tag in ("input", "select", "textarea") and found.get("type") != "hidden":
            self.fields.append(found)
        for name in ("aria-labelledby", "aria-describedby"):
            self.references += str(found.get(name) or "").split()
        if tag == "script":
            self.scripts.append(found)
        self.faults += [f"<{tag} {name}>" for name in found if name == "style" or name.startswith("on")]


def read(html: str) -> Page:
    """Well-formed, inputs labelled, ids once each and there where they are named, nothing the policy forbids."""
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert page.faults == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    inside = re.findall(r"<label[^>]*>\s*<input[^>]* id=\"([^\"]+)\"", html)
    for each in page.fields:
        assert each.get("aria-label") or each.get("id") in page.labels | set(inside), each
    assert all(script.get("src") for script in page.scripts)
    return page


def words(html: str) -> str:
    return " ".join("".join(read(html).text).split())


@pytest.fixture(scope="module")
def shared(shared_settings: Settings) -> Iterator[Engine]:
    engine = database.engine(shared_settings)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def in_each_state(shared: Engine, shared_settings: Settings) -> dict[str, str]:
    """Ids of jobs, one in each state, by state."""
    bind, storage = shared, Storage(shared_settings.data_dir)
    dataset = add_dataset(bind, storage).id

    def make(name: str | None, **changes: Any) -> Job:
        return add_job(bind, dataset, **{**SPEC, **changes, "name": name})

    found = {}
    with transaction(bind) as session:
        devices.announce(session, Announcement("cpu-here", "cpu", 600 * MIB, 4), "celery@here")
    running = make(HOSTILE, metadata={HOSTILE: HOSTILE})
    with transaction(bind) as session:
        first = claims.next_job(session, "cpu-here", "celery@here", lease_seconds=LEASE_SECONDS)
        assert first is not None
        runs.record_metrics(session, running.id, 1, [metric(step) for step in range(1, 5)])
        failure = job_error("trainer_crashed", "The trainer was killed by SIGKILL.", 4)
        data = {"status": -9, "signal": "SIGKILL", "error": failure, "log": [HOSTILE]}
        runs.add_event(session, running.id, 1, "trainer_failed", data)
        runs.release(session, running.id, 1, "trainer_crashed", progressed=False, error=failure)
    with transaction(bind) as session:
        assert claims.next_job(session, "cpu-here", "celery@here", lease_seconds=LEASE_SECONDS) is not None
    found["running"] = running.id
    found["queued"] = make("waits").id
    succeeded = make("done")
    claimed = claim(bind, succeeded.id)
    with transaction(bind) as session:
        runs.record_metrics(session, succeeded.id, 1, [metric(step) for step in range(1, 11)])
        runs.record_evaluation(session, succeeded.id, 1, 10, 3.5)
        add_checkpoint(session, storage, claimed, 10, 3.5)
        check = {"chunk_length": 64, "compared_with": 128, "relative_error": 2e-7}
        runs.record_gradient_check(session, succeeded.id, 1, 350_000_000, check)
        runs.finish(session, succeeded.id, 1, "succeeded")
    found["succeeded"] = succeeded.id
    for status, code in (("failed", "diverged"), ("paused", "disk_full")):
        made = make(status)
        claim(bind, made.id)
        with transaction(bind) as session:
            error = job_error(code, f"It is {code}.", 3)
            if status == "failed":
                runs.finish(session, made.id, 1, "failed", error=error)
            else:
                runs.release(session, made.id, 1, code, progressed=False, error=error)
        found[status] = made.id
    found["cancelled"] = make(None).id
    with transaction(bind) as session:
        jobs.request(session, found["cancelled"], "cancel")
    return found


def test_every_state_renders_as_a_page_and_as_a_piece(shared_client: TestClient, in_each_state: dict[str, str]) -> None:
    assert set(in_each_state) == {status.value for status in JobStatus}
    expected = {
        "running": ["Running", "attempt 2", "The trainer was killed (SIGKILL)", "Back in the queue", "Pause", "Cancel"],
        "queued": ["Queued", "Planned", "Pause", "Cancel", "None yet."],
        "succeeded": ["Succeeded", "Cap held", "2.0e-07", "final", "best", "validation loss 3.5", "New job like this"],
        "failed": ["Failed at step 3: It is diverged.", "lower the learning rate", "It left none."],
        "paused": ["Paused at step 3: It is disk_full.", "free space", "Resume", "Cancel"],
        "cancelled": ["Cancelled", in_each_state["cancelled"]],
    }
    for status, job_id in in_each_state.items():
        answer = shared_client.get(f"/ui/jobs/{job_id}")
        assert answer.status_code == 200
        assert all(answer.headers[name] == value for name, value in SECURITY_HEADERS.items())
        shown = words(answer.text)
        assert [each for each in expected[status] if each not in shown] == []
        piece = shared_client.get(f"/ui/jobs/{job_id}", headers={"HX-Request": "true"}).text
        assert "<html" not in piece
        assert ("data-every" in piece) == (status in ("running", "queued", "paused"))
        read(piece)


def test_the_list_filters_pages_and_says_how_to_begin(
    shared_client: TestClient, shared: Engine, in_each_state: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = shared_client.get("/").text
    assert all(job_id in everything for job_id in in_each_state.values())
    assert "Running1" in words(everything)
    for status, job_id in in_each_state.items():
        page = shared_client.get("/", params={"status": status}).text
        assert [each for each in in_each_state.values() if f'id="{each}"' in page] == [job_id]
        read(page)
    monkeypatch.setattr("api.web.jobs.PAGE", 4)
    first = shared_client.get("/").text
    assert 'id="job_' in first
    (older,) = re.findall(r'rel="next" href="([^"]+)"', first)
    second = shared_client.get(older).text
    on_pages = [re.findall(r'<tr role="row" id="(job_\w+)"', page) for page in (first, second)]
    assert sorted(on_pages[0] + on_pages[1], reverse=True) == on_pages[0] + on_pages[1]
    assert set(on_pages[0] + on_pages[1]) == set(in_each_state.values())
    assert "Newest" in words(second)
    assert shared_client.get("/?status=nonsense").status_code == 422


def test_there_is_a_beginning(client: TestClient) -> None:
    assert "Upload a dataset" in words(client.get("/").text)
    assert "No job is failed" in words(client.get("/?status=failed").text)
    assert "No worker has announced a device" in words(client.get("/ui/devices").text)


def test_what_a_tenant_wrote_stays_text(shared_client: TestClient, in_each_state: dict[str, str]) -> None:
    for path in ("/", f"/ui/jobs/{in_each_state['running']}", "/ui/devices"):
        page = shared_client.get(path).text
        assert "<script>alert" not in page
        assert HOSTILE in "".join(read(page).text)
    shown = read(shared_client.get(f"/ui/jobs/{in_each_state['running']}").text)
    assert sum(HOSTILE in each for each in shown.text) >= 5, "name, title, metadata twice, log"


def test_a_curve_is_whole_or_by_averages(
    shared_client: TestClient, in_each_state: dict[str, str], shared: Engine
) -> None:
    job_id = in_each_state["running"]
    with transaction(shared) as session:
        runs.record_metrics(session, job_id, 2, [metric(1, loss=float("nan")), metric(5_000, loss=0.0)])
        fill = "INSERT INTO metrics (job_id, step, attempt, loss) SELECT :job, step, 2, step % 2"
        between = "FROM generate_series(2, 4999) AS step ON CONFLICT (job_id, step) DO UPDATE SET loss = excluded.loss"
        session.execute(text(f"{fill} {between}"), {"job": job_id})
        runs.record_evaluation(session, job_id, 2, 4_000, 2.5)
    whole = shared_client.get(f"/ui/jobs/{job_id}/curve").json()
    assert whole["width"] == 3
    assert 1_600 < len(whole["step"]) <= 2_000
    assert (whole["lowest_loss"][9], whole["highest_loss"][9]) == (0.0, 1.0)
    assert [loss for loss in whole["validation_loss"] if loss is not None] == [2.5]
    assert whole["step"][-1] == 5_000
    part = shared_client.get(f"/ui/jobs/{job_id}/curve", params={"first": 1, "last": 100}).json()
    assert part["width"] == 1
    assert part["step"] == list(range(1, 101))
    assert part["loss"][:3] == [None, 0.0, 1.0]
    assert shared_client.get("/ui/jobs/job_00000000000000000000000000000000/curve").status_code == 404
    nothing = shared_client.get(f"/ui/jobs/{in_each_state['queued']}/curve").json()
    assert nothing["step"] == []
    assert set(nothing) == set(metrics.Curve.__slots__)


def test_a_long_story_is_told_in_parts(
    shared_client: TestClient, in_each_state: dict[str, str], shared: Engine
) -> None:
    job_id = in_each_state["running"]
    with transaction(shared) as session:
        for step in range(1, 101):
            runs.record_evaluation(session, job_id, 2, step, 2.5)
    told, page = [], shared_client.get(f"/ui/jobs/{job_id}").text
    while True:
        read(page)
        told += re.findall(r'<li id="event-(\d+)"', page)
        more = re.search(rf'"/ui/jobs/{job_id}/events\?before=\d+"', page)
        if more is None:
            break
        page = shared_client.get(more[0].strip('"'), headers={"HX-Request": "true"}).text
    assert len(told) == len(set(told)) > 100
    assert sorted(told, key=int, reverse=True) == told


def test_a_story_that_goes_on_leaves_no_gap_in_an_open_page(
    shared_client: TestClient, in_each_state: dict[str, str], shared: Engine
) -> None:
    job_id = in_each_state["running"]
    page = shared_client.get(f"/ui/jobs/{job_id}").text
    (look,) = re.findall(r'hx-get="([^"]+\?since=\d+)"', page)
    with transaction(shared) as session:
        for step in range(201, 231):
            runs.record_evaluation(session, job_id, 2, step, 2.5)
    again = shared_client.get(look, headers={"HX-Request": "true"}).text
    assert look in again
    before, after = (re.findall(r'<li id="event-(\d+)"', each) for each in (page, again))
    assert len(before) == 25
    assert after[30:] == before
    assert re.findall(r"/events\?before=\d+", again) == re.findall(r"/events\?before=\d+", page)


def test_devices_show_who_holds_them_and_why_others_wait(
    shared_client: TestClient, shared: Engine, in_each_state: dict[str, str]
) -> None:
    with transaction(shared) as session:
        devices.announce(session, Announcement("gpu-0", "cuda", 100 * MIB, 1), "celery@gpu")
        session.execute(
            update(Device).where(Device.id == "gpu-0").values(updated_at=func.now() - timedelta(seconds=300))
        )
    page = shared_client.get("/ui/devices").text
    shown = words(page)
    assert "Silent since" in shown
    assert HOSTILE in "".join(read(page).text)
    assert re.search(r"waits .* at most are free now\.", shown), shown


@pytest.fixture
def tenants(shared_settings: Settings, shared: Engine) -> Iterator[Callable[[str], TestClient]]:
    """A browser of each tenant, logged in."""
    app = create_app(shared_settings.model_copy(update={"authentication": "keys"}))
    with TestClient(app, base_url="https://slimtune.example", follow_redirects=False) as running:

        def browser(tenant: str) -> TestClient:
            with transaction(shared) as session:
                _, key = keys.create(session, tenant, "a key")
            running.cookies.clear()
            assert running.post("/ui/login", data={"key": key}).status_code == 303
            return running

        yield browser


def test_other_tenants_see_a_404_and_others(
    tenants: Callable[[str], TestClient], in_each_state: dict[str, str]
) -> None:
    stranger = tenants("stranger")
    job_id = in_each_state["running"]
    for path in (f"/ui/jobs/{job_id}", f"/ui/jobs/{job_id}/curve", f"/ui/jobs/{job_id}/events?before=9999"):
        answer = stranger.get(path)
        assert answer.status_code == 404
        assert answer.headers["content-type"].startswith("text/html")
        read(answer.text)
    assert "No jobs yet" in words(stranger.get("/").text)
    page = stranger.get("/ui/devices").text
    assert "Others, 1 job" in words(page)
    assert "No job of yours waits" in words(page)
    assert not [each for each in in_each_state.values() if each in page]
    assert "celery@here" in page


def test_every_type_of_event_has_words() -> None:
    """Also one that a later version adds, and one whose data are not what they were."""
    for event_type in timeline.TYPES:
        assert timeline.told(event_type, {}).title
    lost = timeline.told("requeued", {"reason": "lease_expired", "failures": 1, "step": 4})
    assert (lost.title, lost.tone) == ("Back in the queue", "warn")
    assert lost.detail.startswith("The worker is gone: it was killed")
    assert timeline.told("exported_to_mars", {}).title == "Exported to mars"


def test_the_page_has_the_request_for_another_plan(shared_client: TestClient, in_each_state: dict[str, str]) -> None:
    page = shared_client.get(f"/ui/jobs/{in_each_state['running']}").text
    (spec,) = re.findall(r'data-spec="([^"]+)"', page)
    assert json.loads(unescape(spec))["metadata"] == {HOSTILE: HOSTILE}
