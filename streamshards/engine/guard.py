"""DataLoader workers end with the process that trains.

torch's own watchdog compares ``getppid()``: under forkserver (the default from Python 3.14 on) a worker's parent is the
fork server, which lives as long as its workers do, so a trainer that is killed would leave them all for ever.

A worker that ends at once leaves nothing behind all the same. What is outside of it: the folder of the sockets through
which multiprocessing hands batches on, and shared memory between the moment it has a name and the moment torch takes
that name away. The folder is the trainer's, who removes it at its end, whatever became of the workers; if the trainer
is killed, the first worker does. The memory of a worker that is itself killed stays.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import shutil
import tempfile
import threading
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

_AFTER_SOCKETS: Final = -100
"""As multiprocessing itself removes such folders."""
_MAX_BASE_CHARS: Final = 70
"""A socket's path has at most 107 bytes, and a worker that cannot make one sends nothing."""
_guarded: Final[set[int]] = set()
"""The processes (this one, and in a fork its parents) whose guard thread has been started."""
_chosen: tuple[int, str] | None = None
"""Which process chose a folder for its workers' sockets, and that folder."""
_adopted: str | None = None
"""The folder that our trainer chose for us."""
_tidying: Final = threading.Lock()
"""Held while the folder is made; and for ever once it is removed."""


def sockets_folder() -> str:
    """Return the folder for the sockets of this process's workers; they make it. It is gone when this process ends."""
    global _chosen
    if _chosen is None or _chosen[0] != os.getpid():
        base, name = tempfile.gettempdir(), f"pymp-{os.urandom(4).hex()}"
        folder = os.path.join(base if len(base) <= _MAX_BASE_CHARS else "/tmp", name)
        multiprocessing.util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=_AFTER_SOCKETS)
        _chosen = os.getpid(), folder
    return _chosen[1]


def adopt_sockets_folder(folder: str) -> None:
    """Let multiprocessing put this worker's sockets into *folder*, which its trainer chose; before it has any."""
    global _adopted
    _adopted = folder
    end_with_parent()
    with _tidying:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    config = getattr(multiprocessing.current_process(), "_config", None)  # there is no public way
    if isinstance(config, dict):
        config["tempdir"] = folder


def end_if_a_batch_is_lost() -> None:
    """End this worker when something cannot be sent: multiprocessing would go on, and its trainer wait for ever."""

    def give_up(error: Exception, _: object) -> None:
        traceback.print_exception(error)
        os._exit(1)

    # Made for overriding, says multiprocessing; a queue looks it up when it first sends something.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(give_up)  # type: ignore[attr-defined]  # private


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
    wait([handle])  # not select.select, which takes no descriptor from 1024 on
    _tidying.acquire()
    with contextlib.suppress(OSError):
        if sockets is not None:
            gone = f"{sockets}-gone"
            os.rename(sockets, gone)  # first: one of us does it, and a socket that is just being made keeps nothing
            shutil.rmtree(gone)
    with contextlib.suppress(OSError):
        for path in Path("/dev/shm").glob(f"torch_{os.getpid()}_*"):
            path.unlink()
    os._exit(1)


def _sockets_folder() -> str | None:
    """Return the folder for the sockets of this process; None if it is one that others use, too.

    Made now, not with the first batch: that may be on its way when the parent goes.
    """
    if _adopted is not None:
        return _adopted
    config = getattr(multiprocessing.current_process(), "_config", {})
    with contextlib.suppress(OSError):
        return None if config.get("tempdir") else multiprocessing.util.get_temp_dir()
    return None
