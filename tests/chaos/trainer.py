"""The real trainer, without the guards that are named: `python -m tests.chaos.trainer [GUARD]`."""

from __future__ import annotations

import sys

from tests.chaos import guards
from worker import start

if __name__ == "__main__":
    for guard in sys.argv[1:]:
        guards.REMOVE[guard]().start()
    sys.exit(start.main())
