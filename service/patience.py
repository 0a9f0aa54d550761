"""How long to go on trying while an object store does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from service.errors import StorageUnavailableError

FIRST_PAUSE_SECONDS = 0.5
LAST_PAUSE_SECONDS = 15.0
_BEAT_SECONDS = 0.25

T = TypeVar("T")


def _nothing() -> None:
    return None


def _ignored(_error: StorageUnavailableError) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Patience:
    """Tries again, with pauses that grow from half a second to 15, as long as it may."""

    seconds: float = 0.0
    """From the first failure of a call to the last try."""
    beat: Callable[[], object] = _nothing
    """Called several times a second while it waits, and now and then while bytes move; what it raises ends the work."""
    trouble: Callable[[StorageUnavailableError], object] = _ignored
    """Told of each failure after which there is another try."""

    def run(self, call: Callable[[], T]) -> T:
        """What `call` returns. Raises what it raises, StorageUnavailableError once the time is over."""
        until: float | None = None
        pause = FIRST_PAUSE_SECONDS
        while True:
            self.beat()
            try:
                return call()
            except StorageUnavailableError as error:
                now = time.monotonic()
                until = now + self.seconds if until is None else until
                if now >= until:
                    raise
                self.trouble(error)
            self._wait(min(pause, until - now))
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.beat()
            time.sleep(min(left, _BEAT_SECONDS))


NONE = Patience()
"""One try: who waits for an answer is told at once."""
