"""Runs a command that does not outlive the process that asked for it.

    python -I -S lifeline.py <parent pid> <signal number> <user id, or "same"> <command> <arguments...>

The kernel sends the signal when the parent is gone, however it ended: `kill -9` leaves nothing running. This is a
program of its own because code that runs between fork and exec in a process with threads can deadlock, and because
the request is lost when credentials change. So it also changes the user: that way only the command has to be
readable to that user, not this interpreter, which may lie in root's home.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, death_signal, user, command = int(arguments[0]), int(arguments[1]), arguments[2], arguments[3:]
    if user != "same":
        os.setgroups([])
        os.setgid(int(user))
        os.setuid(int(user))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl: {os.strerror(code)}")
    if os.getppid() != parent:  # the parent went away before the request was made: no signal will come
        sys.exit(f"{command[0]}: parent {parent} is gone")
    os.execvp(command[0], command)  # noqa: S606  # what its one caller was to run


if __name__ == "__main__":
    main(sys.argv[1:])
