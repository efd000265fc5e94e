"""Memory for decoded columns: page faults cost more than copies, so large buffers ask for huge pages."""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

import torch

from streamshards.options import MiB

LARGE_BYTES: Final = 4 * MiB
"""From here on a mapping of its own pays: below, malloc reuses warm memory; above, it would fault in anew anyway."""

HUGE_PAGE_BYTES: Final = 2 * MiB
"""Mappings are whole huge pages, so that the last part does not fault in 4 KiB at a time."""


def allocate(nbytes: int) -> torch.Tensor:
    """Return a fresh uint8 tensor ``(nbytes,)``, its start aligned to 64 bytes.

    Large ones are private anonymous mappings, hugepage-advised where the platform can (decoding into them is as fast
    as into warm memory; into plain fresh pages it is half as fast), zero-filled, and unmapped when the last view
    dies. Small ones come from torch's allocator and hold anything.
    """
    if nbytes < LARGE_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8)
    return torch.frombuffer(_map(-(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES), dtype=torch.uint8, count=nbytes)


def _map(nbytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, nbytes)
    # Private: the default is a shared mapping, which Linux backs with shmem, where huge pages are off by default.
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without huge pages: the mapping works, only slower
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
