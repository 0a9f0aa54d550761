"""Log lines: whatever is in them, one line each, with what it is about and without passwords."""

from __future__ import annotations

import contextvars
import json
import logging
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from service import logs
from service.jsonable import clean_text
from service.settings import Settings

ODD = 'quote " newline \n return \r tab \t nul \x00 escape \x1b[31m next line \x85 separator \u2028 half \ud800 é'


def record(message: str, *arguments: Any, **options: Any) -> logging.LogRecord:
    return logging.getLogger("a.logger").makeRecord(
        "a.logger", logging.WARNING, __file__, 1, message, arguments, **{"exc_info": None, **options}
    )


def as_json(entry: logging.LogRecord) -> dict[str, Any]:
    text = logs.JsonFormatter().format(entry)
    assert text.isascii()
    assert "\n" not in text
    line: dict[str, Any] = json.loads(text)
    json.dumps(line, ensure_ascii=False).encode()  # no half of a character that no encoding has
    return line


def raised(error: Exception) -> Any:
    with pytest.raises(type(error)) as caught:
        raise error
    return caught._excinfo


def test_a_json_line_says_when_where_and_what() -> None:
    with logs.bound(request_id="req_1"), logs.bound(job_id="job_1", attempt=2):
        line = as_json(record("step %d", 3, extra={"fields": {"status": 202}}))
    assert datetime.now(UTC).timestamp() - datetime.fromisoformat(line.pop("time")).timestamp() < 60
    assert line == {
        "level": "WARNING", "logger": "a.logger", "message": "step 3",
        "request_id": "req_1", "job_id": "job_1", "attempt": 2, "status": 202,
    }  # fmt: skip
    assert set(as_json(record("after"))) == {"time", "level", "logger", "message"}


def test_a_text_line_says_the_same() -> None:
    with logs.bound(job_id="job_1", attempt=2):
        text = logs.TextFormatter().format(record("step %d", 3))
    time, rest = text.split(" ", 1)
    assert time.endswith("Z")
    assert rest == "WARNING a.logger: step 3 [job_id=job_1 attempt=2]"


def test_odd_characters_make_no_second_line() -> None:
    assert as_json(record("%s", ODD))["message"] == clean_text(ODD)
    text = logs.TextFormatter().format(record("%s", ODD))
    assert len(text.splitlines()) == 1
    assert r"newline \n return \r tab \t nul \x00 escape \x1b[31m" in text
    text.encode()


def test_an_exception_is_a_field_and_in_text_indented() -> None:
    entry = record("it broke", exc_info=raised(ValueError(ODD)))
    trace = as_json(entry)["exception"]
    assert trace.startswith("Traceback")
    assert "ValueError: quote" in trace
    first, *rest = logs.TextFormatter().format(entry).split("\n")
    assert first.endswith("a.logger: it broke")
    assert rest[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in rest)
    assert not {"\r", "\x1b", "\x85"} & set("".join(rest))


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://slimtune:ses'ame@db:5432/slimtune",
        "redis://:ses'ame@redis/0",
        "x://:ses'ame@",
        "redis://:ses/'ame@redis/0",
        "postgresql://slimtune:ses@'ame@db/slimtune",
    ],
)
def test_the_password_of_a_url_is_not_shown(formatter: logging.Formatter, url: str) -> None:
    text = formatter.format(record("no answer from %s", url, exc_info=raised(OSError(f"cannot reach {url}"))))
    assert "ame" not in text.replace("a.name", "").replace("slimtune", "")
    assert text.count("***@") == 2


def test_settings_that_cannot_be_read_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without them ends, and the exception is in its log."""
    monkeypatch.delenv("SLIMTUNE_DATA_DIR", raising=False)
    monkeypatch.setenv("DATABASE_URL", "postgresql://:sesame@db/slimtune")
    monkeypatch.setenv("REDIS_URL", "redis://:sesame@redis/0")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "data_dir" in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_a_copied_context_reaches_a_thread() -> None:
    lines: list[dict[str, Any]] = []
    with logs.bound(request_id="req_1"):
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(lambda: lines.append(as_json(record("a"))),)),
            threading.Thread(target=lambda: lines.append(as_json(record("b")))),
        ]
        for thread in threads:
            thread.start()
            thread.join()
    assert [line.get("request_id") for line in lines] == ["req_1", None]
