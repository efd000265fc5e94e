"""DataLoader workers end with the process that trains.

torch's own watchdog compares ``getppid()``: under forkserver (the default from Python 3.14 on) a worker's parent is the
fork server, which lives as long as its workers do, so a trainer that is killed would leave them all for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import threading
from typing import Final

_guarded: Final[set[int]] = set()
"""The processes (this one, and in a fork its parents) whose guard thread has been started."""


def end_with_parent() -> None:
    """End this process as soon as the process that started it is gone; once a process, and only in a child.

    Needs Linux 5.3 (``pidfd_open``); elsewhere torch's watchdog remains.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or os.getpid() in _guarded or not hasattr(os, "pidfd_open"):
        return
    _guarded.add(os.getpid())
    try:
        handle = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # an older kernel, or a sandbox that forbids the call
        return
    threading.Thread(target=_exit_after, args=(handle,), name="streamshards-guard", daemon=True).start()


def _exit_after(handle: int) -> None:
    select.select([handle], [], [])
    os._exit(1)
