"""`slimtune demo`, with fewer steps: the main job from upload to sample."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("home")]


def start(home: Path, steps: int) -> subprocess.Popen[str]:
    ours = ("DATABASE_URL", "REDIS_URL", "SLIMTUNE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", "demo", "--home", str(home), "--steps", str(steps)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_job_from_upload_to_sample(home: Path) -> None:
    with start(home, steps=3) as demo:
        output = demo.communicate()[0]
    assert demo.returncode == 0, output
    assert re.search(r"step 3/3 succeeded, loss \d\.\d+", output)
    assert re.search(r"validation loss, nats per byte: \d\.\d+ at step 0, \d\.\d+ at step 3", output)
    assert re.search(r"│ cap +│ .* │ held", output)
    error = re.search(r"│ gradient error +│ 0 +│ (\d\.\de-\d+) against chunks of", output)
    assert error is not None, output
    assert 0 < float(error[1]) < 1e-5
    assert "every SHA-256 verified" in output
    assert "a sample of 200 bytes" in output
    assert "everything that was started has stopped" in output
    (folder,) = (home / "demo").glob("job_*")
    assert {"config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}


def test_ctrl_c_stops_the_job_and_the_service(home: Path) -> None:
    with start(home, steps=10_000) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if re.search(r"step \d+/10000 loss", line):
                break
        else:
            pytest.fail("the job did not start")
        descendants = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(signal.SIGINT)
        demo.communicate()
    assert demo.returncode == 130
    assert psutil.wait_procs(descendants, timeout=5)[1] == []
