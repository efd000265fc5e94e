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
- *The budget* is kept by a meter and a lock, see ``cachemeter``; what goes from a full cache, ``eviction`` decides.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from streamshards.clock import unix_ns
from streamshards.engine.cachemeter import Meter, disk_bytes
from streamshards.engine.eviction import Entry, Pass, Verdict, allowance, decide

FORMAT: Final = "v1"
"""Of the whole folder. Another format gets another name, and finds nothing of this one."""
_STALE_NS: Final = 3600 * 10**9
"""No entry takes an hour to write."""
_OPEN_FLAGS: Final = (
    os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
)
_NEW: Final = "new"
_ANYBODY: Final = Pass()


class NotStored(Exception):
    """An entry was not stored.

    Args:
        text: Why.
        num_evicted: How many entries went all the same.
    """

    def __init__(self, text: str = "", num_evicted: int = 0) -> None:
        super().__init__(text)
        self.num_evicted = num_evicted


class Busy(NotStored):
    """Not now: another process is making room, or writes what takes it."""


class Full(NotStored):
    """Not in this pass: there is no room beside what is needed."""


class Refused(NotStored):
    """Nothing may be stored; the text says why."""


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
    verdict: Verdict = "granted"
    """On the entry that room was wanted for."""


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
        self._meter = Meter(self._root)
        self._is_scanned = False
        self._full: tuple[Pass] | None = None
        """Who was told last that it is full; another tuple each time."""

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

    def open_again(self, name: str, identity: Identity) -> int:
        """Return a descriptor of entry *name*, which the caller closes, if it still is the file of that *identity*.

        Raises:
            FileNotFoundError: It is not.
            OSError: It cannot be opened.
        """
        descriptor = os.open(self.path(name), _OPEN_FLAGS)
        if identity_of(os.fstat(descriptor)) != identity:
            os.close(descriptor)
            raise FileNotFoundError(f"{self.path(name)} is another file now")
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
    def writing(self, name: str, nbytes: int, reader: Pass = _ANYBODY) -> Iterator[tuple[int, int]]:
        """Yield a descriptor to write entry *name* to, and how many entries were evicted for it.

        The entry appears when the block ends without an exception. The descriptor is closed in any case.

        Raises:
            Busy: Not now.
            Full: There is no room beside what *reader* and others need.
            Refused: There is no room at all.
            OSError: The disk did not take it.
        """
        if disk_bytes(nbytes) > self._budget_bytes:
            raise Refused(f"a shard takes {nbytes:,} bytes, budget_bytes is {self._budget_bytes:,}")
        known = self._full
        descriptor, path = self._create(nbytes)
        try:
            yield descriptor, self._make_room(nbytes, reader, known)
            target = self.path(name)
            with contextlib.suppress(FileExistsError):
                os.mkdir(target.parent, 0o700)
            os.replace(path, target)
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def has_changed(self, nbytes: int) -> bool:
        """Return whether it is worth another try, after a ``Full``, to store *nbytes*: somebody made room, or others
        fill the disk. Costs a few calls of the system.

        Raises:
            OSError: It cannot be told.
        """
        try:
            return self._has_room(nbytes) or self._free_bytes() < self._keep_free_bytes
        except FileNotFoundError:  # somebody removed the folder
            return True

    def _create(self, nbytes: int) -> tuple[int, Path]:
        path = self._root / _NEW / f"{os.getpid()}-{os.urandom(8).hex()}-{nbytes}.tmp"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        try:
            return os.open(path, flags, 0o600), path
        except FileNotFoundError:  # the first entry, or somebody removed the folder
            self.make()
            return os.open(path, flags, 0o600), path

    def _make_room(self, nbytes: int, reader: Pass, known: tuple[Pass] | None) -> int:
        """Return how many entries had to go so that a file of *nbytes*, already in ``new``, may grow to its size.

        *known* is what was known of a full cache before: threads that waited while one looked through it don't.
        """
        # Looked at first: a claim that fails stays in the meter until somebody evicts.
        if self._is_scanned and self._has_room(nbytes) and self._meter.claim(disk_bytes(nbytes)) <= self._budget_bytes:
            return 0
        done = self.evict(nbytes, reader, known)
        if done is None:
            raise Busy
        self._is_scanned = True
        if done.verdict == "granted":
            return done.num_evicted
        if done.verdict != "refused":
            kind = Busy if done.verdict == "busy" else Full
            raise kind(num_evicted=done.num_evicted)
        free = self._free_bytes()
        text = f"{free:,} bytes are free on the disk, keep_free_bytes is {self._keep_free_bytes:,}"
        raise Refused(text, done.num_evicted)

    def _has_room(self, nbytes: int) -> bool:
        """Return whether a file of *nbytes* seems to fit."""
        is_within = self._meter.reading() + disk_bytes(nbytes) <= self._budget_bytes
        return is_within and self._free_bytes() - nbytes >= self._keep_free_bytes

    # -- evicting --------------------------------------------------------------------------------------------------

    def evict(self, new_bytes: int = 0, reader: Pass = _ANYBODY, known: tuple[Pass] | None = None) -> Eviction | None:
        """Remove stale files, and what ``eviction`` says must go; None if another process is at it.

        Args:
            new_bytes: Of a file, already in ``new``, that room is wanted for; the meter counts it if it is granted.
            reader: Whose it is.
            known: As for ``_make_room``.

        Raises:
            OSError: The folder cannot be read or written.
        """
        with self._meter.lock() as is_ours:
            if not is_ours:
                return None
            full = self._full if new_bytes else None
            if full is not None and full is not known and full[0] is reader and not self.has_changed(new_bytes):
                return Eviction(0, self._meter.reading(), "full")
            self._meter.close()
            pending, unwritten = self._pending()  # first: what becomes an entry meanwhile counts twice, not never
            entries = self.entries()
            ours = disk_bytes(new_bytes)
            others = max(0, pending - ours)
            allowed = allowance(
                sum(entry.nbytes for entry in entries) + pending,
                free_bytes=self._free_bytes() - unwritten,
                budget_bytes=self._budget_bytes,
                keep_free_bytes=self._keep_free_bytes,
            )
            done = decide(entries, new_bytes=ours, pending_bytes=others, allowed_bytes=allowed, reader=reader)
            for entry in done.gone:
                entry.path.unlink(missing_ok=True)
            cached = done.left_bytes + others + (ours if done.verdict == "granted" else 0)
            self._meter.set(cached)
            if done.verdict == "full":
                self._full = (reader,)
            return Eviction(len(done.gone), cached, done.verdict)

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
            return Eviction(0, 0)
        entries = self.entries()
        for entry in entries:
            entry.path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._pending()
        shutil.rmtree(self._root, ignore_errors=True)  # what lives comes back
        return Eviction(len(entries), sum(entry.nbytes for entry in entries))

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

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free


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
