"""What Python's fork server imports before it forks DataLoader workers: SIGTERM to the process group does not end it.

It would take nothing of ours along, but its end is all that a trainer hears of its workers' ends: torch takes all of
them for dead then. The server ends when the last process is gone that may ask it for children. These get the default
back: they are also other people's.
"""

from __future__ import annotations

import os
import signal
import sys


def _do_nothing(number: int, frame: object) -> None:
    pass


def _back_to_default() -> None:
    if signal.getsignal(signal.SIGTERM) is _do_nothing:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if "multiprocessing.forkserver" in " ".join(sys.orig_argv):  # a tool that imports all modules keeps its SIGTERM
    signal.signal(signal.SIGTERM, _do_nothing)
    os.register_at_fork(after_in_child=_back_to_default)
