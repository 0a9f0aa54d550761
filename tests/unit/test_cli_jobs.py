"""The commands for jobs, against a server that says what the test wants."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.live import sparkline
from cli.main import app
from cli.specs import SpecError, read_spec
from tests.unit.scripted_service import Script

DATASET = "ds_" + 32 * "0"
PLAN = {
    "chunk_length": 512,
    "num_chunks": 8,
    "state_policy": "reverse",
    "predicted_peak_bytes": 300 << 20,
    "predicted_step_seconds": 2.0,
    "predicted_total_seconds": 40.0,
    "unchunked_peak_bytes": 900 << 20,
    "minimum_cap_bytes": 200 << 20,
    "reason": "It is the fastest.",
    "frontier": [
        {
            "chunk_length": 512,
            "state_policy": "reverse",
            "micro_batch_size": 1,
            "predicted_peak_bytes": 300 << 20,
            "predicted_step_seconds": 2.0,
        }
    ],
}
INFEASIBLE = {
    "code": "memory_cap_infeasible",
    "detail": "No schedule fits 1 MiB.",
    "suggestions": ["raise memory_cap to 209715200 bytes (200 MiB) or more"],
}


def job(status: str = "queued", step: int = 0, **fields: Any) -> dict[str, Any]:
    progress = {
        "step": step,
        "total_steps": 20,
        "loss": 3.5 if step else None,
        "step_seconds": 2.0 if step else None,
        "eta_seconds": None,
    }
    return {
        "id": "job_1",
        "name": "mine",
        "status": status,
        "desired": "run",
        "plan": PLAN,
        "memory_cap": 400 << 20,
        "measured_peak_bytes": 290 << 20 if step else None,
        "progress": progress,
        "error": None,
        **fields,
    }


def run(script: Script, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--url", script.url])


def body_of(script: Script, path: str) -> Any:
    return json.loads(next(body for request, body in script.requests if request == f"POST {path}"))


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("model: performer-tiny\ndataset: data.txt\nsteps: 20\noptimizer: {learning_rate: 3e-4}\n")
    (tmp_path / "data.txt").write_text("text " * 1_000)
    return path


def test_a_file_is_uploaded_and_the_flags_win(script: Script, spec: Path) -> None:
    script.json("/datasets?limit=100", {"data": [], "has_more": False})
    script.json("/datasets", {"id": DATASET}, 201)
    script.json("/jobs", job(), 202)
    options = ["--steps", "30", "--memory-cap", "1GiB", "--set", "optimizer.name=adafactor", "--set", "metadata.a='1'"]
    result = run(script, "submit", str(spec), *options)
    assert (result.exit_code, result.stdout) == (0, "job_1\n"), result.output
    assert body_of(script, "/jobs") == {
        "model": "performer-tiny",
        "dataset": DATASET,
        "steps": 30,
        "memory_cap": "1GiB",
        "optimizer": {"learning_rate": 0.0003, "name": "adafactor"},
        "metadata": {"a": "1"},
    }


def test_what_the_service_has_already_is_not_sent_again(script: Script, spec: Path) -> None:
    sha256 = hashlib.sha256((spec.parent / "data.txt").read_bytes()).hexdigest()
    known = {"id": DATASET, "filename": "data.txt", "sha256": sha256}
    script.json("/datasets?limit=100", {"data": [known], "has_more": False})
    script.json("/jobs", job(), 202)
    assert run(script, "submit", str(spec)).exit_code == 0
    assert "POST /datasets" not in [request for request, _ in script.requests]
    assert body_of(script, "/jobs")["dataset"] == DATASET


def test_a_plan_in_steps_sends_no_data(script: Script, spec: Path) -> None:
    script.json("/plans", PLAN)
    result = run(script, "plan", str(spec), "--memory-cap", "400MiB")
    assert result.exit_code == 0, result.output
    assert "dataset" not in body_of(script, "/plans")
    assert "8 chunks of 512 tokens, states: reverse, peak 300 MiB, 2.0 s per step" in result.stdout
    assert json.loads(run(script, "plan", str(spec), "--json").stdout) == PLAN


def test_a_cap_that_is_too_small_ends_with_what_would_help(script: Script, spec: Path) -> None:
    script.json("/plans", INFEASIBLE, 422, "application/problem+json")
    result = run(script, "plan", str(spec))
    assert result.exit_code == 1
    assert "No schedule fits 1 MiB." in result.stderr
    assert "  - raise memory_cap to 209715200 bytes" in result.stderr
    assert json.loads(run(script, "plan", str(spec), "--json").stderr) == INFEASIBLE


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 4), ("cancelled", 4), ("paused", 4)])
def test_watching_ends_with_the_job(script: Script, status: str, code: int) -> None:
    error = {"code": "diverged", "message": "NaN", "step": 7, "hint": "lower it"} if status == "failed" else None
    script.json("/jobs/job_1", job(status, step=7, error=error))
    rows = [{"step": 7, "loss": 3.5, "validation_loss": None}]
    script.json("/jobs/job_1/metrics?after_step=-1&limit=1000", {"data": rows, "has_more": False})
    result = run(script, "watch", "job_1")
    assert result.exit_code == code, result.output
    assert f"step 7/20 {status}, loss 3.500, 2.0 s/step, memory 290 MiB of 400 MiB" in result.stdout
    assert ("diverged: NaN (lower it)" in result.stderr) == (status == "failed")
    assert json.loads(run(script, "watch", "job_1", "--json").stdout)["status"] == status


def test_steering_says_what_will_come_of_it(script: Script) -> None:
    script.json("/jobs/job_1", job("running"))
    script.json("/jobs/job_1/pause", job("running", desired="pause"))
    script.json("/jobs/job_1/resume", job("queued"))
    script.json("/jobs/job_1/cancel", job("cancelled", desired="cancel"))
    assert run(script, "pause", "job_1").stdout == "job_1 running, will pause\n"
    assert run(script, "resume", "job_1", "--memory-cap", "1GiB").stdout == "job_1 queued\n"
    assert body_of(script, "/jobs/job_1/resume") == {"memory_cap": "1GiB"}
    assert run(script, "cancel", "job_1").stdout == "job_1 cancelled\n"


def test_lists_logs_and_curves_for_people_and_programs(script: Script) -> None:
    script.json("/jobs?limit=100&status=running", {"data": [job("running", step=3)], "has_more": False})
    script.json("/jobs/job_1", job("running"))
    event = {"id": 1, "attempt": 0, "type": "queued", "created_at": "2026-01-01T00:00:00Z", "data": {"request_id": "r"}}
    script.json("/jobs/job_1/events?after=0&limit=1000", {"data": [event], "has_more": False})
    row = {"step": 1, "attempt": 1, "loss": None}
    script.json("/jobs/job_1/metrics?after_step=-1&limit=1000", {"data": [row], "has_more": False})
    assert "290 MiB of 400 MiB" in run(script, "list", "--status", "running").stdout
    assert json.loads(run(script, "list", "--status", "running", "--json").stdout)[0]["id"] == "job_1"
    assert run(script, "logs", "job_1").stdout == "2026-01-01T00:00:00Z queued request_id=r\n"
    streamed = f"id: 1\nevent: queued\ndata: {json.dumps(event)}\n\nid: 1.end\nevent: end\ndata: {{}}\n\n"
    script.answers["/jobs/job_1/events"] = (200, "text/event-stream", streamed.encode())
    assert run(script, "logs", "job_1", "--follow").stdout == run(script, "logs", "job_1").stdout
    assert run(script, "metrics", "job_1").stdout == "step,attempt,loss\n1,1,\n"
    assert json.loads(run(script, "metrics", "job_1", "--json").stdout) == row


def test_a_checkpoint_comes_home(script: Script, tmp_path: Path) -> None:
    content = b"weights"
    file = {"name": "model.safetensors", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    script.json("/jobs/job_1", job("succeeded"))
    script.json("/jobs/job_1/checkpoints/final", {"step": 20, "is_best": True, "files": [file]})
    path = "/jobs/job_1/checkpoints/20/files/model.safetensors"
    script.answers[path] = (200, "application/octet-stream", content)
    result = run(script, "download", "job_1", "--out", str(tmp_path / "out"))
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "out" / "model.safetensors"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == content
    assert run(script, "download", "job_1", "--file", "other").exit_code == 1
    script.answers[path] = (200, "application/octet-stream", b"broken!")
    assert run(script, "download", "job_1", "--out", str(tmp_path / "again")).exit_code == 5


def test_no_service_is_another_code_than_a_refusal() -> None:
    result = CliRunner().invoke(app, ["list", "--url", "http://127.0.0.1:9"])  # the discard port: nobody listens
    assert (result.exit_code, "no answer from http://127.0.0.1:9" in result.stderr) == (3, True)


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("a: [", (), "job.yaml"),
        ("- a\n- b\n", (), "must be fields and values"),
        ("steps: 1\nsteps: 2\n", (), "line 1: a key is there twice"),
        ("steps: 1\n", ("steps",), "--set steps: must be field=value"),
        ("idempotency_key: a\n", (), "an option of `slimtune submit`"),
        ("steps: 1\n", ("steps.x=1",), "steps is no group of fields"),
    ],
)
def test_a_description_that_cannot_be_read_says_where(
    tmp_path: Path, text: str, settings: tuple[str, ...], reason: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=reason):
        read_spec(path, {}, settings)


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("epochs: 2\n", {"steps": 5, "epochs": None}, {"steps": 5}),
        ("steps: 5\n", {"steps": None, "epochs": 2}, {"epochs": 2}),
        ("steps: 5\n", {"steps": None, "epochs": None}, {"steps": 5}),
        ("seed: 1\n", {"steps": 5, "epochs": 2}, {"seed": 1, "steps": 5, "epochs": 2}),
    ],
)
def test_steps_take_the_place_of_the_files_epochs(
    tmp_path: Path, text: str, given: dict[str, int | None], expected: dict[str, int]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert read_spec(path, given) == expected


def test_where_nothing_answers_it_says_how_to_start_something() -> None:
    result = CliRunner().invoke(app, ["list", "--url", "http://127.0.0.1:9"])
    assert (result.exit_code, "slimtune up" in result.stderr) == (3, True)


def test_a_dataset_that_is_neither_file_nor_id(script: Script) -> None:
    result = run(script, "submit", "--dataset", "nothing.txt")
    assert (result.exit_code, "neither a file nor the id" in result.stderr) == (1, True)
    assert script.requests == []


def test_a_curve_in_eight_heights() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert len(sparkline(list(range(1_000)), width=12)) == 12
    assert sparkline([float("nan")]) == ""


def test_loss_curves_come_home_a_folder_for_each_job(script: Script, tmp_path: Path) -> None:
    name = "events.out.tfevents.1.slimtune"
    for each in ("job_1", "job_2"):
        script.json(f"/jobs/{each}", {"id": each})
        script.json(f"/jobs/{each}/artifacts", {"data": [{"name": name}], "has_more": False})
        script.answers[f"/jobs/{each}/artifacts/{name}"] = (200, "application/octet-stream", each.encode())
    for _ in range(2):  # what is there of an earlier time is replaced
        done = run(script, "artifacts", "job_1", "job_2", "--out", str(tmp_path / "runs"))
        assert done.exit_code == 0, done.output
    assert (tmp_path / "runs" / "job_2" / name).read_bytes() == b"job_2"
    script.truncate = True
    del script.answers[f"/jobs/job_2/artifacts/{name}"]
    script.json("/jobs/job_1/artifacts", {"data": [{"name": name}], "has_more": False})
    assert run(script, "artifacts", "job_1", "--out", str(tmp_path / "runs")).exit_code != 0
    assert [path.read_bytes() for path in (tmp_path / "runs" / "job_1").iterdir()] == [b"job_1"]
