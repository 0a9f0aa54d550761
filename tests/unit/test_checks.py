"""Programs that look at files from strangers: who is blamed for their ends."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from api.model_check import check_model
from service.errors import ModelInvalidError
from service.tokenizer_files import problem_of
from slim_core.data.tokens import NO_MEMORY


def _ends(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    def run(command: Any, *, text: bool = False, **_options: Any) -> subprocess.CompletedProcess[Any]:
        return subprocess.CompletedProcess(command, status, "" if text else b"", "why" if text else b"why")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("status", "reason"), [(NO_MEMORY, "more memory"), (-signal.SIGABRT, "more memory"), (-signal.SIGXCPU, "too long")]
)
def test_a_model_that_takes_too_much_is_refused(status: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _ends(monkeypatch, status)
    with pytest.raises(ModelInvalidError) as error:
        check_model(Path("folder"), 1)
    assert reason in str(error.value.fields)


@pytest.mark.parametrize("status", [1, -signal.SIGKILL])
def test_a_check_that_fails_is_not_the_files_fault(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _ends(monkeypatch, status)
    with pytest.raises(RuntimeError, match=f"status {status}"):
        check_model(Path("folder"), 1)
    with pytest.raises(RuntimeError, match=f"status {status}"):
        problem_of(Path("file"))
    assert caplog.text.count("why") == 2


def test_a_tokenizer_that_takes_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("[" + "{}," * (16 << 20) + "{}]")
    assert problem_of(path) == "takes too much time or memory to be parsed"
