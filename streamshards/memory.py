"""Memory for large objects: page faults cost more than copies, so large buffers ask for huge pages."""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

from streamshards.options import MiB

LARGE_BYTES: Final = 4 * MiB
"""From here on a mapping of its own pays: below, malloc reuses warm memory; above, it would fault in anew anyway."""

_HUGE_PAGE_BYTES: Final = 2 * MiB
"""Mappings are whole huge pages, so that the last part does not fault in 4 KiB at a time."""


def map_memory(nbytes: int) -> memoryview:
    """Return *nbytes* of fresh, writable, zeroed memory, unmapped when the last view dies.

    A private anonymous mapping, hugepage-advised where the platform can: reading or decoding into it is as fast as into
    warm memory, into plain fresh pages half as fast or less.
    """
    mapping = _map(-(-max(nbytes, 1) // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without huge pages: the mapping works, only slower
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)[:nbytes]


def _map(nbytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, nbytes)
    # Private: the default is a shared mapping, which Linux backs with shmem, where huge pages are off by default.
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
