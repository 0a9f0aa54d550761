"""All rows of the table."""

from __future__ import annotations

from tests.chaos.fault import Fault
from tests.chaos.lifecycle import LIFECYCLE
from tests.chaos.limits import LIMITS
from tests.chaos.processes import PROCESSES
from tests.chaos.replies import REPLIES
from tests.chaos.servers import SERVERS
from tests.chaos.stop import STOP
from tests.chaos.storage import STORAGE
from tests.chaos.training import TRAINING

FAULTS: tuple[Fault, ...] = (*TRAINING, *PROCESSES, *SERVERS, *LIFECYCLE, *STOP, *STORAGE, *LIMITS, *REPLIES)
