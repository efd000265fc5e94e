"""DataLoader workers and signals: workers outlive one to the whole process group; a trainer hears of a worker's death.

Theory. A scheduler that preempts a job (Slurm, torchrun, Kubernetes) and Ctrl-C signal all processes of a group. A
worker that died of it would take the batches away from a trainer that wants to end its step and save. So a worker
takes no notice of SIGTERM and SIGINT, which needs somebody else to end it:

- ``guard``, when the trainer is gone;
- a trainer that promises to use SIGKILL for a worker that does not end when it is asked to (``StreamingDataLoader``).
  Its workers have handlers that do nothing. While one is being started, it inherits a mask that blocks both signals;
- else the worker itself, at its parent's SIGTERM: torch sends it, and ``multiprocessing`` at exit. Only who waits for
  a signal learns its sender, so all threads must block it. Libraries start threads that don't (OpenBLAS, when numpy is
  imported); where there is one, the worker stays as torch made it.

Not elegant yet: a fork server's worker inherits nothing from its trainer, and is as torch made it until it begins to
iterate; a fork server that ran before our first worker ends at SIGTERM (see ``forkserver``); and programs that a worker
of the last kind starts inherit what it blocks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import Any, Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def _has_pidfd() -> bool:
    """Return whether there is ``pidfd_open``, without which nothing would end the workers of a trainer that is gone."""
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):
        try:
            os.close(os.pidfd_open(os.getpid()))
        except OSError:  # an older kernel, or a sandbox that forbids the call
            return False
        return True
    return False


_IS_ABLE: Final = _has_pidfd()
_PRELOADED: Final = "streamshards.engine.forkserver"

_GRACE_S: Final = 1.0
"""torch notes that it lets a worker go just after it has told the worker so; a container that has used up its share of
the cores stands still for a tenth of a second in between."""

_shielded: Final[set[int]] = set()
"""The processes (this one, and in a fork its parents) that listen to their parent alone."""


@contextmanager
def blocked_for_children(start_method: str) -> Iterator[None]:
    """Start children in a ``with`` block of this: no SIGTERM or SIGINT ends them before they ignore them."""
    if start_method == "forkserver":
        _shield_fork_server()
    if not _IS_ABLE or start_method not in ("fork", "spawn"):
        yield
        return
    if start_method == "spawn":  # it starts with the first child, and would unblock both
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shield_fork_server() -> None:
    """Let SIGTERM not end the fork server that is about to start; one that runs already stays as it is."""
    server: Any = getattr(forkserver, "_forkserver", None)  # there is no public way to add a module to the others
    modules = getattr(server, "_preload_modules", None)
    if modules is not None and getattr(server, "_forkserver_pid", 0) is None and _PRELOADED not in modules:
        forkserver.set_forkserver_preload([*modules, _PRELOADED])


def ignore_signals() -> None:
    """Let no SIGTERM or SIGINT end this process.

    Call it on the main thread of a child that its parent ends by SIGKILL, if need be.
    """
    if _IS_ABLE and os.getpid() not in _shielded:
        _shielded.add(os.getpid())
        for number in _SIGNALS:
            # Not SIG_IGN: a program that is started from here would inherit it.
            signal.signal(number, _do_nothing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def obey_parent_alone() -> None:
    """Let no SIGTERM or SIGINT but its parent's SIGTERM end this process; once a process, and only in a child.

    Call it on the main thread, before others are started. Needs ``sigwaitinfo`` and Linux 5.3 (``pidfd_open``, without
    which nothing would end the workers of a trainer that is gone), and no thread that blocks less than this one;
    elsewhere nothing changes.
    """
    parent = multiprocessing.parent_process()
    if not _IS_ABLE or parent is None or parent.pid is None or os.getpid() in _shielded:
        return
    _shielded.add(os.getpid())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if _do_all_threads_block():
        threading.Thread(target=_listen_to, args=(parent.pid,), name="streamshards-signals", daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _do_nothing(number: int, frame: object) -> None:
    pass


def _do_all_threads_block() -> bool:
    wanted = sum(1 << (number - 1) for number in _SIGNALS)
    try:
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/status") as file:
                (blocked,) = (line.split()[1] for line in file if line.startswith("SigBlk:"))
            if int(blocked, 16) & wanted != wanted:
                return False
    except (OSError, ValueError):  # no /proc, or a thread that ends
        return False
    return True


def _listen_to(parent: int) -> None:
    if sys.platform == "linux":
        while True:
            received = signal.sigwaitinfo(_SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == parent:
                os._exit(0)  # as torch's own handler does: another code would be a worker that failed


def call_at_unexpected_end(
    sentinels: Mapping[int, int], *, is_expected: Callable[[int], bool], then: Callable[[], None]
) -> None:
    """Call *then*, on a thread of its own, when a process has ended and nobody meant it to.

    Args:
        sentinels: Number to sentinel (``Process.sentinel``) of each process; they may be closed meanwhile.
        is_expected: Asked, with its number, about each process that has ended.
        then: Called at most once.
    """
    descriptors = {os.dup(sentinel): number for number, sentinel in sentinels.items()}
    args = (descriptors, is_expected, then)
    threading.Thread(target=_watch, args=args, name="streamshards-watch", daemon=True).start()


def wait_for_all(sentinels: list[int], *, timeout_s: float) -> None:
    """Wait until all these processes have ended, or until there was no end of any for *timeout_s*."""
    left = set(sentinels)
    while left and (ended := wait(left, timeout_s)):
        left.difference_update(sentinel for sentinel in ended if isinstance(sentinel, int))


def _watch(descriptors: dict[int, int], is_expected: Callable[[int], bool], then: Callable[[], None]) -> None:
    while descriptors:
        for ended in wait(descriptors):
            assert isinstance(ended, int)  # for mypy: what was given
            number = descriptors.pop(ended)
            os.close(ended)
            if not is_expected(number) and not _is_expected_soon(is_expected, number):
                for rest in descriptors:
                    os.close(rest)
                then()
                return


def _is_expected_soon(is_expected: Callable[[int], bool], number: int) -> bool:
    threading.Event().wait(_GRACE_S)
    return is_expected(number)
