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
import shutil
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

_guarded: Final[set[int]] = set()
"""The processes (this one, and in a fork its parents) whose guard thread has been started."""

_own_folders: Final[dict[int, str]] = {}
"""By process, as above."""


def own_sockets_folder() -> str | None:
    """Return the folder for sockets that this process has made here, and its children use, too; None if it has another.

    It goes when this process ends, however its children end. That it may be killed itself is their guards' business,
    but not with a folder that may be its parent's.
    """
    if not getattr(multiprocessing.current_process(), "_config", {}).get("tempdir"):
        with contextlib.suppress(OSError):
            _own_folders[os.getpid()] = multiprocessing.util.get_temp_dir()
    return _own_folders.get(os.getpid())


def end_with_parent(sockets: str | None = None) -> None:
    """End this process as soon as the process that started it is gone; once a process, and only in a child.

    Needs Linux 5.3 (``pidfd_open``); elsewhere torch's watchdog remains.

    Args:
        sockets: The parent's ``own_sockets_folder``, which goes with it.
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
        target=_exit_after, args=(handle, sockets or _sockets_folder()), name="streamshards-guard", daemon=True
    ).start()


def _exit_after(handle: int, sockets: str | None) -> None:
    wait([handle])  # not select.select, which takes no descriptor from 1024 on
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
