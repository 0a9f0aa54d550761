"""The real trainer, without the guards that are named, and with a limit on the size of the files that it writes.

python -m tests.chaos.trainer [--largest-file BYTES] [GUARD ...]
"""

from __future__ import annotations

import argparse
import resource
import sys

from tests.chaos import guards
from worker import start

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest-file", type=int, default=resource.RLIM_INFINITY)
    parser.add_argument("guards", nargs="*")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_FSIZE, (arguments.largest_file, resource.RLIM_INFINITY))
    for guard in arguments.guards:
        guards.remove(guard)
    sys.exit(start.main())
