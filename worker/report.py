"""The trainer's end of the contract with its supervisor: exit statuses, and messages as JSON lines on a pipe."""

from __future__ import annotations

import json
import os
from typing import Any

EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, EXIT_MEMORY = 0, 1, 3, 4


class Reporter:
    """Writes messages to the supervisor's pipe (worker/messages.py reads them)."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")

    def send(self, message_type: str, **fields: Any) -> None:
        """One message. A number that is not finite is written as Python does; the supervisor makes it null."""
        self._pipe.write(json.dumps({"type": message_type, **fields}) + "\n")
