"""DataLoader workers end with the process that trains.

torch's own watchdog compares ``getppid()``: under forkserver (the default from Python 3.14 on) a worker's parent is the
fork server, which lives as long as its workers do, so a trainer that is killed would leave them all for ever.

A worker that ends at once leaves nothing behind all the same. What it had outside of itself: the folder of the sockets
through which multiprocessing hands batches on, and shared memory between the moment it has a name and the moment torch
takes that name away. A worker that is itself killed cannot see to that; nobody else can, who does not know that it was.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import select
import shutil
import threading
from pathlib import Path
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
    threading.Thread(
        target=_exit_after, args=(handle, _sockets_folder()), name="streamshards-guard", daemon=True
    ).start()


def _exit_after(handle: int, sockets: str | None) -> None:
    select.select([handle], [], [])
    with contextlib.suppress(OSError):
        if sockets is not None:
            gone = f"{sockets}-gone"
            os.rename(sockets, gone)  # first: a socket that is just being made would keep the folder
            shutil.rmtree(gone)
    with contextlib.suppress(OSError):
        for path in Path("/dev/shm").glob(f"torch_{os.getpid()}_*"):
            path.unlink()
    os._exit(1)


def _sockets_folder() -> str | None:
    """Return the folder that multiprocessing makes for the sockets of this process; None if it uses its parent's.

    Made now, not with the first batch: that may be on its way when the parent goes.
    """
    config = getattr(multiprocessing.current_process(), "_config", {})
    with contextlib.suppress(OSError):
        return None if config.get("tempdir") else multiprocessing.util.get_temp_dir()
    return None
