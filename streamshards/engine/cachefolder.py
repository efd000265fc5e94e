"""The folder of the node cache: immutable files under content names, published and evicted by any number of processes.

::

    DIRECTORY/user-1000/                  0700, ours, no link: what others could write is not read
        v1/3f/3fa9….raw                   an entry: there whole or not at all, never changed; atime is its last use
        v1/new/4711-9c0d…-33554432.tmp    being written by process 4711, to that size
        v1/meter                          its length, in units of 4 KiB, says about how much the cache takes
        v1/lock                           held by whoever evicts

Theory:

- *Reading needs no lock.* An entry appears by rename and goes by unlink; whoever has it open goes on reading it.
- *A kill at any instant* leaves whole entries, and at most a file in ``new``, which the next eviction removes. Nothing
  is synced to the disk: after a power cut an entry may be damaged, and its first reader notices.
- *The budget.* A writer makes its file, then appends a byte to the meter for each unit that the file will take. Appends
  are atomic, and where its own ended tells the writer how much all have claimed. Only if that is within the budget does
  it go on. So all writers together stay within it, if the meter is right. It is not trusted: each process scans once
  before it first writes, and whoever finds it over the budget scans, evicts and sets it anew.
- *Setting the meter.* Who evicts first makes it so long that no writer goes on. Claims from before have their file in
  ``new``, which is scanned after, and counts with the size in its name; claims from then on fail, and may be lost. If
  the evictor is killed, the next writer finds the meter too long, and evicts.
- *The lock* is a POSIX record lock: the kernel gives it back at death, and a fork does not inherit it. Nobody waits for
  another process: who does not get the lock does not store what it has. The lock does not tell threads apart; within a
  process they take turns.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from streamshards.clock import unix_ns
from streamshards.shard.raw import write_all

if sys.platform != "win32":
    import fcntl

FORMAT: Final = "v1"
"""Of the whole folder. Another format gets another name, and finds nothing of this one."""
_UNIT_BYTES: Final = 4096
_SLACK: Final = 16
"""An eviction leaves 1/16 of the budget free, so that not every new entry needs one."""
_STALE_NS: Final = 3600 * 10**9
"""No entry takes an hour to write."""
_OPEN_FLAGS: Final = (
    os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
)
_NEW: Final = "new"
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


class Refused(Exception):
    """Nothing may be stored; the text says why."""


class Busy(Exception):
    """This entry cannot be stored now: another process is making room."""


class Entry(NamedTuple):
    """A file of the cache."""

    path: Path
    nbytes: int
    """Of disk."""
    used_ns: int
    """When it was last used."""


class Identity(NamedTuple):
    """Which file it is, and whether it was written to."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Eviction:
    """What an eviction found and did."""

    num_evicted: int
    cached_bytes: int
    """What is left, files that are being written included."""
    allowed_bytes: int


def disk_bytes(nbytes: int) -> int:
    """Return what a file of *nbytes* takes on disk."""
    return -(-nbytes // _UNIT_BYTES) * _UNIT_BYTES


def allowance(cached_bytes: int, *, free_bytes: int, budget_bytes: int, keep_free_bytes: int) -> int:
    """Return how much the cache may take: the budget, and no more than leaves *keep_free_bytes* free."""
    return max(0, min(budget_bytes, cached_bytes + free_bytes - keep_free_bytes))


def evictable(entries: Sequence[Entry], *, allowed_bytes: int) -> list[Entry]:
    """Return what must go, least recently used first, so that the rest fits. Touches nothing."""
    excess = sum(entry.nbytes for entry in entries) - allowed_bytes
    gone: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.used_ns, entry.path)):
        if excess <= 0:
            break
        gone.append(entry)
        excess -= entry.nbytes
    return gone


def identity_of(status: os.stat_result) -> Identity:
    """Return which file *status* is of."""
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class CacheFolder:
    """One user's entries.

    Args:
        directory: Where the cache lies; need not exist. Others may use it too, each in a folder of their own.
        budget_bytes: All entries together.
        keep_free_bytes: Of the disk.
    """

    def __init__(self, directory: str, *, budget_bytes: int, keep_free_bytes: int) -> None:
        self.directory = directory
        self._home = Path(directory, f"user-{os.geteuid()}" if hasattr(os, "geteuid") else "user")
        self._root = self._home / FORMAT
        self._budget_bytes = budget_bytes
        self._keep_free_bytes = keep_free_bytes
        self._is_scanned = False

    def __repr__(self) -> str:
        return f"CacheFolder({str(self._home)!r})"

    # -- the folder itself -----------------------------------------------------------------------------------------

    def require_safe(self) -> bool:
        """Return whether the folder exists.

        Raises:
            Refused: It is a link, not a folder, someone else's, or open to others: what lies there may be anyone's.
            OSError: It cannot be looked at.
        """
        if sys.platform == "win32":
            raise Refused("it needs the file system of a Unix")
        try:
            status = os.lstat(self._home)
        except FileNotFoundError:
            return False
        if stat.S_ISLNK(status.st_mode):
            raise Refused(f"{self._home} is a link")
        if not stat.S_ISDIR(status.st_mode):
            raise Refused(f"{self._home} is not a folder")
        if hasattr(os, "geteuid"):
            if status.st_uid != os.geteuid():
                raise Refused(f"{self._home} belongs to user {status.st_uid}")
            if status.st_mode & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise Refused(f'{self._home} is open to others ({mode:04o}); remove it, or "chmod 700" it')
        return True

    def make(self) -> None:
        """Make the folder.

        Raises:
            Refused: As ``require_safe``.
            OSError: It cannot be made.
        """
        os.makedirs(self.directory, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._home, 0o700)
        self.require_safe()
        for folder in (self._root, self._root / _NEW):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)

    # -- reading ---------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """Return where entry *name* lies, or would."""
        return self._root / name[:2] / name

    def open(self, name: str) -> int | None:
        """Return a descriptor of entry *name*, which the caller closes; None if there is none. Marks it as used.

        Raises:
            OSError: There is something else under its name, or it cannot be opened.
        """
        try:
            descriptor = os.open(self.path(name), _OPEN_FLAGS)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(f"{self.path(name)} is not a file")
            with contextlib.suppress(OSError):  # a read-only disk: its entries can be used, but not marked
                os.utime(descriptor, ns=(unix_ns(), status.st_mtime_ns))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def is_no_file(self, name: str) -> bool:
        """Return whether something else than a file lies under the name of an entry."""
        try:
            return not stat.S_ISREG(os.lstat(self.path(name)).st_mode)
        except OSError:
            return False

    def discard(self, name: str, bad: Identity | None) -> None:
        """Remove entry *name* if it still is the *bad* file, or no file at all. Raises nothing."""
        path = self.path(name)
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path)
            elif not stat.S_ISREG(status.st_mode) or (bad is not None and identity_of(status)[:2] == bad[:2]):
                path.unlink()

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, name: str, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield a descriptor to write entry *name* to, and how many entries were evicted for it.

        The entry appears when the block ends without an exception. The descriptor is closed in any case.

        Raises:
            Busy: Another process is making room.
            Refused: There is no room.
            OSError: The disk did not take it.
        """
        if disk_bytes(nbytes) > self._budget_bytes:
            raise Refused(f"a shard takes {nbytes:,} bytes, budget_bytes is {self._budget_bytes:,}")
        descriptor, path = self._create(nbytes)
        try:
            yield descriptor, self._make_room(nbytes)
            target = self.path(name)
            with contextlib.suppress(FileExistsError):
                os.mkdir(target.parent, 0o700)
            os.replace(path, target)
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _create(self, nbytes: int) -> tuple[int, Path]:
        path = self._root / _NEW / f"{os.getpid()}-{os.urandom(8).hex()}-{nbytes}.tmp"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        try:
            return os.open(path, flags, 0o600), path
        except FileNotFoundError:  # the first entry, or somebody removed the folder
            self.make()
            return os.open(path, flags, 0o600), path

    def _make_room(self, nbytes: int) -> int:
        """Return how many entries had to go so that a file of *nbytes*, already in ``new``, may grow to its size."""
        claimed = self._claim(disk_bytes(nbytes))
        is_roomy = claimed <= self._budget_bytes and self._free_bytes() - nbytes >= self._keep_free_bytes
        if self._is_scanned and is_roomy:
            return 0
        done = self.evict()
        if done is None:
            raise Busy
        self._is_scanned = True
        if done.cached_bytes > done.allowed_bytes == self._budget_bytes:
            raise Busy  # with what others are writing
        if done.cached_bytes > done.allowed_bytes:
            raise Refused(
                f"{self._free_bytes():,} bytes are free on the disk, keep_free_bytes is {self._keep_free_bytes:,}"
            )
        return done.num_evicted

    # -- evicting --------------------------------------------------------------------------------------------------

    def evict(self) -> Eviction | None:
        """Remove stale files, and entries if there are too many; None if another process is at it.

        Raises:
            OSError: The folder cannot be read or written.
        """
        with self._lock() as is_ours:
            if not is_ours:
                return None
            self._set_meter(_CLOSED_BYTES)
            pending, unwritten = self._pending()  # first: what becomes an entry meanwhile counts twice, not never
            entries = self.entries()
            cached = sum(entry.nbytes for entry in entries) + pending
            allowed = allowance(
                cached,
                free_bytes=self._free_bytes() - unwritten,
                budget_bytes=self._budget_bytes,
                keep_free_bytes=self._keep_free_bytes,
            )
            gone: list[Entry] = []
            if cached > allowed:
                gone = evictable(entries, allowed_bytes=allowed - allowed // _SLACK - pending)
            for entry in gone:
                entry.path.unlink(missing_ok=True)
            left = cached - sum(entry.nbytes for entry in gone)
            self._set_meter(left)
            return Eviction(len(gone), left, allowed)

    def entries(self) -> list[Entry]:
        """Return all entries, in no order."""
        found: list[Entry] = []
        for folder in _scan(self._root):
            if len(folder.name) == 2 and folder.is_dir(follow_symlinks=False):
                for file in _scan(folder.path):
                    if file.is_dir(follow_symlinks=False):  # not ours
                        continue
                    with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                        status = file.stat(follow_symlinks=False)
                        found.append(Entry(Path(file.path), disk_bytes(status.st_size), status.st_atime_ns))
        return found

    @property
    def home(self) -> Path:
        """The user's folder."""
        return self._home

    def clear(self) -> Eviction:
        """Remove all entries, and what writers left behind.

        Raises:
            Refused: As ``require_safe``.
            OSError: Something cannot be removed.
        """
        if not self.require_safe():
            return Eviction(0, 0, 0)
        entries = self.entries()
        for entry in entries:
            entry.path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._pending()
        shutil.rmtree(self._root, ignore_errors=True)  # what lives comes back
        return Eviction(len(entries), sum(entry.nbytes for entry in entries), 0)

    def _pending(self) -> tuple[int, int]:
        """Return what the files in ``new`` will take, and how much of it they don't yet; remove those of the dead."""
        pending = unwritten = 0
        for file in _scan(self._root / _NEW):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat(follow_symlinks=False)
                pid, nbytes = _parse(file.name)
                if not _is_alive(pid) or unix_ns() - status.st_mtime_ns > _STALE_NS:
                    os.unlink(file.path)
                    continue
                pending += disk_bytes(nbytes)
                unwritten += max(0, nbytes - status.st_size)
        return pending, unwritten

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        ours = _evicting
        if not ours.acquire(timeout=_TURN_S):
            yield False
            return
        try:
            descriptor = self._open_own("lock", os.O_RDWR)
            try:
                yield _try_lock(descriptor)
            finally:
                os.close(descriptor)
        finally:
            ours.release()

    def _claim(self, nbytes: int) -> int:
        """Add *nbytes* to the meter; return what it said just after."""
        descriptor = self._open_own("meter", os.O_WRONLY | os.O_APPEND)
        try:
            write_all(descriptor, bytes(nbytes // _UNIT_BYTES))
            # Not the file's size: it may have been set meanwhile, and what we added be lost.
            return os.lseek(descriptor, 0, os.SEEK_CUR) * _UNIT_BYTES
        finally:
            os.close(descriptor)

    def _set_meter(self, nbytes: int) -> None:
        descriptor = self._open_own("meter", os.O_WRONLY)
        try:
            os.ftruncate(descriptor, nbytes // _UNIT_BYTES)
        finally:
            os.close(descriptor)

    def _open_own(self, name: str, flags: int) -> int:
        flags |= os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        return os.open(self._root / name, flags, 0o600)

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free


def _try_lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them, POSIX leaves open
        return False
    return True


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _parse(name: str) -> tuple[int, int]:
    """Return the process and the size in the name of a file in ``new``; zeros if it is none of ours."""
    pid, _, rest = name.partition("-")
    size = rest.rpartition("-")[2].removesuffix(".tmp")
    return (int(pid), int(size)) if pid.isdecimal() and size.isdecimal() else (0, 0)


def _is_alive(pid: int) -> bool:
    """Return whether there is such a process. One of another container may seem dead: it then stores one entry less."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
