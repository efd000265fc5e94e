"""The meter and the lock of the node cache: how its writers, in any number of processes, stay within one budget.

Theory:

- *The meter* is a file whose length says, in units of 4 KiB, about how much the cache takes. A writer appends a byte
  for each unit that its file will take. Appends are atomic, and where its own ended tells the writer how much all have
  claimed. Only if that is within the budget does it go on. So all writers together stay within it, if the meter is
  right. It is not trusted: each process scans the folder once before it first writes, and who finds no room scans,
  evicts and sets the meter anew.
- *Setting it.* Who evicts first makes it so long that no writer goes on. Claims from before have their file in the
  folder of unfinished ones, which is scanned after, and counts with the size in its name; claims from then on fail, and
  may be lost. If the evictor is killed, the next writer finds the meter too long, and evicts.
- *The lock* is a POSIX record lock: the kernel gives it back at death, and a fork does not inherit it. Nobody waits for
  another process: who does not get the lock does not store what it has. The lock does not tell threads apart; within a
  process they take turns.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from streamshards.shard.raw import write_all

if sys.platform != "win32":
    import fcntl

UNIT_BYTES: Final = 4096
_CLOSED_BYTES: Final = 1 << 48
"""What the meter says while it is set: more than any budget."""
_TURN_S: Final = 5.0
"""An eviction takes milliseconds, or what it takes to unlink a sixteenth of the cache."""

_evicting = threading.Lock()


def _forget_parent() -> None:
    """A thread of the parent may have held it when we were forked."""
    global _evicting
    _evicting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


def disk_bytes(nbytes: int) -> int:
    """Return what a file of *nbytes* takes on disk."""
    return -(-nbytes // UNIT_BYTES) * UNIT_BYTES


class Meter:
    """The files ``meter`` and ``lock`` of one folder.

    Args:
        folder: Which; must exist for all but ``reading``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reading(self) -> int:
        """Return the bytes that the cache takes, as far as it is known; 0 if there is no meter."""
        try:
            return os.stat(self._folder / "meter").st_size * UNIT_BYTES
        except FileNotFoundError:
            return 0

    def claim(self, nbytes: int) -> int:
        """Add *nbytes*, whole units; return what it said just after."""
        descriptor = self._open("meter", os.O_WRONLY | os.O_APPEND)
        try:
            write_all(descriptor, bytes(nbytes // UNIT_BYTES))
            # Not the file's size: it may have been set meanwhile, and what we added be lost.
            return os.lseek(descriptor, 0, os.SEEK_CUR) * UNIT_BYTES
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let no claim succeed until it is set."""
        self.set(_CLOSED_BYTES)

    def set(self, nbytes: int) -> None:
        """Let it say *nbytes*. Only for who has the lock."""
        descriptor = self._open("meter", os.O_WRONLY)
        try:
            os.ftruncate(descriptor, nbytes // UNIT_BYTES)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Yield whether we have the lock, until the block ends."""
        ours = _evicting
        if not ours.acquire(timeout=_TURN_S):
            yield False
            return
        try:
            descriptor = self._open("lock", os.O_RDWR)
            try:
                yield _try_lock(descriptor)
            finally:
                os.close(descriptor)
        finally:
            ours.release()

    def _open(self, name: str, flags: int) -> int:
        flags |= os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        return os.open(self._folder / name, flags, 0o600)


def _try_lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them, POSIX leaves open
        return False
    return True
