"""A small disk for a shared cache: mounted, watched, filled up and damaged, by someone who is not one of its users."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

DISK_BYTES: Final = 200_000_000
SAMPLING_S: Final = 0.02
"""Between two looks at the cache: several in the life of every entry."""
_RENAME_EXCHANGE: Final = 2
_FILL_BYTES: Final = 1 << 20
_FILL_S: Final = 0.002

# A namespace of our own: nobody else sees the mounts, and they go with its last process, however that ends. Shared
# memory is ours alone, too: whatever lies there in the end, we left.
_MOUNT: Final = """
mount -t tmpfs -o size=$1,nr_inodes=4096,mode=0700 soak "$2" &&
mount -t tmpfs -o mode=1777 soak /dev/shm &&
shift 2 && exec "$@"
"""


def mounted(folder: Path, size_bytes: int = DISK_BYTES) -> list[str] | str:
    """Return how a command line must begin to see a disk of that size at *folder*; why there can be none, as a text."""
    if shutil.which("unshare") is None:
        return "there is no 'unshare' here"
    begin = ["unshare", "--mount", "--map-root-user", "sh", "-c", _MOUNT, "sh", str(size_bytes), str(folder)]
    probe = subprocess.run([*begin, "true"], capture_output=True, text=True, check=False)
    return begin if probe.returncode == 0 else f"mounting is not permitted: {probe.stderr.strip()}"


def blocks_of(folder: Path) -> dict[tuple[int, int], int]:
    """Return the bytes of disk that each entry of the cache takes, also one that is being written, by device and inode.

    The budget is of these. The meter beside them takes a byte for each 4 KiB.
    """
    found: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in set(names) - {"meter", "lock"}:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(os.path.join(place, name))
                found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found


def taken_at_once(before: dict[tuple[int, int], int], after: dict[tuple[int, int], int]) -> int:
    """Return the bytes that files took for certain at the instant between two looks.

    One look takes a while: it may see a file that is gone when it sees the one that took its place. What both looks saw
    was there in between.
    """
    return sum(min(before[file], after[file]) for file in before.keys() & after.keys())


class Watch:
    """A thread that looks at a folder all the time; runs inside a ``with``.

    Args:
        folder: What to look at.
        limit_bytes: What it may take.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.looks = 0
        self.max_bytes = 0
        self.num_over = 0
        """Looks that found more than the limit."""
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="soak-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        before = blocks_of(self._folder)
        while not self._stop.wait(SAMPLING_S):
            after = blocks_of(self._folder)
            nbytes = taken_at_once(before, after)
            self.looks += 1
            self.max_bytes = max(self.max_bytes, nbytes)
            self.num_over += nbytes > self._limit_bytes
            before = after


@contextlib.contextmanager
def filled(disk: Path, *, with_files: bool = False) -> Iterator[None]:
    """Keep *disk* full inside this ``with``, also when others make room.

    Args:
        disk: Where it is mounted.
        with_files: There is room for bytes, but for no further file. A writer that looks for room first meets this one.
    """
    stop = threading.Event()
    ballast = disk / "ballast"
    ballast.mkdir()

    def add_files() -> None:
        while not stop.is_set():
            (ballast / f"{time.monotonic_ns()}").touch()

    def add_bytes() -> None:
        with (ballast / "bytes").open("ab", buffering=0) as file:
            while not stop.is_set():
                file.write(bytes(_FILL_BYTES))

    def fill() -> None:
        while not stop.wait(_FILL_S):
            with contextlib.suppress(OSError):
                (add_files if with_files else add_bytes)()

    thread = threading.Thread(target=fill, name="soak-ballast", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        shutil.rmtree(ballast)


def damage(entries: Sequence[Path], spare: Path, rng: random.Random) -> str | None:
    """Put a copy with one wrong bit in the place of one of *entries*; return its name, None if that was gone.

    The file itself is not touched: who has it open has verified it. The two files change places in one step, so a file
    that is evicted meanwhile does not come back.

    Args:
        entries: Files of the cache.
        spare: A file of the same disk that does not exist.
        rng: Chooses.
    """
    if not entries:
        return None
    entry = rng.choice(entries)
    try:
        data = bytearray(entry.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        spare.write_bytes(data)
        _exchange(spare, entry)
    except OSError:  # gone meanwhile, or the disk is full
        return None
    finally:
        spare.unlink(missing_ok=True)
    return entry.name


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one))
