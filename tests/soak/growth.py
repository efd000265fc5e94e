"""Nothing grows with epochs: ``python -m tests.soak.growth [EPOCHS]`` (default 50).

Each way to read runs that many epochs, every third left in the middle. Descriptors, threads, children and files in
/dev/shm must be what they were after the warm-up; resident memory may grow by ``MAX_GROWTH_MIB`` over the second half.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Final, NamedTuple

from streamshards import CacheOptions, OrderOptions, StreamingDataLoader, StreamingDataset
from tests.datasets import write

MAX_GROWTH_MIB: Final = 10
ENDS_S: Final = 30
"""Threads of a pass that was left end on their own, within milliseconds."""


class Kept(NamedTuple):
    """What this process holds."""

    descriptors: int
    threads: int
    children: int
    shared_files: int


def kept() -> Kept:
    """Return what this process holds once what was let go has gone."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("streamshards") and not multiprocessing.active_children():
            thread.join(ENDS_S)
    gc.collect()
    return Kept(
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(multiprocessing.active_children()),
        sum(f"_{os.getpid()}_" in name for name in os.listdir("/dev/shm")),
    )


def resident_mib() -> float:
    """Return this process's resident memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(url: str, num_epochs: int, *, num_workers: int, persistent: bool, cache: CacheOptions | None) -> float:
    """Return how many MiB the second half of *num_epochs* epochs added.

    Raises:
        AssertionError: Something else has grown.
    """
    dataset = StreamingDataset(
        url, batch_size=32, shuffle=True, order=OrderOptions(lanes=2, shuffle_block=300), cache=cache
    )
    options: dict[str, Any] = {"multiprocessing_context": "fork" if num_workers else None}
    loader = StreamingDataLoader(dataset, num_workers=num_workers, persistent_workers=persistent, **options)
    after_warm_up, at_half = None, 0.0
    for epoch in range(num_epochs):
        for number, _ in enumerate(loader):
            if epoch % 3 == 2 and number == 3:
                break
        del _
        if epoch == 2:
            after_warm_up = kept()
        elif epoch % 10 == 9 or epoch == num_epochs - 1:
            now = kept()
            assert now == after_warm_up, f"epoch {epoch}: {now}; it was {after_warm_up}"
        if epoch == num_epochs // 2:
            at_half = resident_mib()
    return resident_mib() - at_half


WAYS: Final = tuple(
    (num_workers, persistent, is_cached)
    for num_workers, persistent in ((0, False), (2, False), (2, True))
    for is_cached in (False, True)
)


def main(num_epochs: int) -> int:
    """Print what each way to read added; return the exit code."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        write(str(Path(folder, "train")), range(2000))
        for num_workers, persistent, is_cached in WAYS:
            directory = str(Path(folder, f"cache-{num_workers}-{persistent}"))
            cache = CacheOptions(directory=directory, keep_free_bytes=0) if is_cached else None
            url = str(Path(folder, "train"))
            grown = growth(url, num_epochs, num_workers=num_workers, persistent=persistent, cache=cache)
            worst = max(worst, grown)
            print(f"{num_workers} workers, persistent={persistent}, cache={is_cached}: {grown:+.1f} MiB", flush=True)
    print(f"{num_epochs} epochs each: the most in the second half is {worst:.1f} MiB, {MAX_GROWTH_MIB} are allowed")
    return int(worst > MAX_GROWTH_MIB)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
