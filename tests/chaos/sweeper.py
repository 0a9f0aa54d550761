"""The sweeper, without the guard that the environment names: `python -m tests.chaos.sweeper`."""

from __future__ import annotations

from tests.chaos import guards
from worker import sweeper

if __name__ == "__main__":
    guards.remove_as_told()
    sweeper.main()
