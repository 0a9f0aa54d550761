from __future__ import annotations

import pytest

from api import sse
from api.event_hub import TAIL, Watch


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream; charset=utf-8", True),
        ("text/event-stream, */*", True),
        ("text/event-stream;q=0.5", True),
        ("text/event-stream;q=0.5, */*;q=0.1", True),
        ("application/json;q=0.9, text/event-stream", True),
        ("*/*;q=1, application/json;q=0.2, text/event-stream;q=0.3", True),
        ("", False),
        ("*/*", False),
        ("text/*", False),
        ("application/json", False),
        ("application/json, text/event-stream", False),
        ("text/event-stream;q=0.5, application/json;q=0.6", False),
        ("text/event-stream;q=0.5, */*", False),
        ("text/event-stream;q=0", False),
        ("text/event-stream;q=0.000, */*;q=0", False),
        ("text/event-stream;q=nan", False),
        ("text/event-stream;q=1e9", False),
        ("text/event-stream;q=", False),
        ("text/event-streams", False),
        (",;,;q", False),
    ],
)
def test_a_stream_is_for_those_who_ask_for_one(accept: str, wanted: bool) -> None:
    assert sse.is_wanted(accept) is wanted


def test_a_watch_keeps_the_newest_events_alone_and_knows_since_when() -> None:
    watch = Watch(7)
    watch.add([(8 + number, b"") for number in range(TAIL + 10)], None)
    assert (len(watch.tail), watch.since, watch.position) == (TAIL, 17, 17 + TAIL)
    assert [entry[0] for entry in watch.after(17 + TAIL - 2)[0]] == [16 + TAIL, 17 + TAIL]
