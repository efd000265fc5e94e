"""What a process and all that descend from it have used: CPU time, bytes from disk, memory. Linux: it reads /proc.

Theory: a dead child's times and bytes are added to the parent that waits for it, and an orphan's to whoever adopts it.
So the sum over all living descendants, each with its dead children, only grows, and the difference of two such sums is
what was used in between - provided that orphans stay in the tree: ``adopt_orphans`` sees to that. What is lost is a
child of a parent that ignores its children's ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_EVERY_S = 0.2
"""Asking for a process's proportional memory walks its page tables: some ms for a process of a few GB."""
_PR_SET_CHILD_SUBREAPER = 36
_TICKS = os.sysconf("SC_CLK_TCK")


def adopt_orphans() -> None:
    """Let processes whose parents die become children of this one, instead of the machine's first."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def tree(root: int) -> list[int]:
    """Return *root* and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return found


@dataclass(frozen=True)
class Used:
    """What a tree of processes has used so far."""

    cpu_s: float
    disk_read_bytes: int
    """Asked from a block device: what the page cache gave is not in it."""

    def __sub__(self, earlier: Used) -> Used:
        return Used(self.cpu_s - earlier.cpu_s, self.disk_read_bytes - earlier.disk_read_bytes)


def used(root: int) -> Used:
    """Return what *root* and its descendants have used."""
    cpu_ticks = disk = 0
    for pid in tree(root):
        if fields := _stat(pid):
            cpu_ticks += sum(map(int, fields[11:15]))  # utime, stime, and of the dead children: cutime, cstime
        with contextlib.suppress(OSError):
            lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            disk += int(lines["read_bytes"])
    return Used(cpu_ticks / _TICKS, disk)


@dataclass(frozen=True)
class Memory:
    """Proportional memory of a tree: what is shared counts once."""

    at: float
    """``time.monotonic()``, which all processes share."""
    pss_bytes: int
    unreclaimable_bytes: int
    """Of it anonymous or in shared memory; the rest are mapped files, which the kernel may drop."""


def memory(root: int) -> Memory:
    """Return the memory of *root* and its descendants now."""
    sums = dict.fromkeys(("Pss", "Pss_Anon", "Pss_Shmem"), 0)
    for pid in tree(root):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, _, value = line.partition(":")
                if name in sums:
                    sums[name] += 1024 * int(value.split()[0])
    return Memory(time.monotonic(), sums["Pss"], sums["Pss_Anon"] + sums["Pss_Shmem"])


@dataclass
class Watch:
    """What was seen of a tree while it ran."""

    memory: list[Memory] = field(default_factory=list)
    pids: dict[int, str] = field(default_factory=dict)
    """Every process that was seen, and when it began: a number alone may be somebody else's by now."""

    def peak(self, since: float, until: float) -> dict[str, Any]:
        """Return the largest sums seen in a span of time."""
        span = [one for one in self.memory if since <= one.at <= until] or self.memory[-1:]
        return {
            "peak_pss_bytes": max((one.pss_bytes for one in span), default=None),
            "peak_unreclaimable_bytes": max((one.unreclaimable_bytes for one in span), default=None),
        }

    def survivors(self) -> list[int]:
        """Return those that still run."""
        return [pid for pid, began in self.pids.items() if (fields := _stat(pid)) and fields[19] == began]


@contextlib.contextmanager
def watched(root: int) -> Iterator[Watch]:
    """Look at *root* and its descendants every now and then, on a thread."""
    watch = Watch()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            watch.memory.append(memory(root))
            watch.pids |= {pid: fields[19] for pid in tree(root) if (fields := _stat(pid))}

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on (the second, a name, may hold blanks), or nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
