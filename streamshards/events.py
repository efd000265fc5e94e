"""What happened: frozen event values, the observer that receives them, and counters.

Every retry, second request, skip, refill and slow read is one event, one counter and one line in the ``streamshards``
logger (skips: errors, second requests: infos, the rest: warnings). The library never configures logging and never
prints.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

logger: Final = logging.getLogger("streamshards")


@dataclass(frozen=True, slots=True)
class FetchRetried:
    """A request failed and will be tried again."""

    url: str
    attempt: int
    wait_s: float
    cause: str

    def __str__(self) -> str:
        return (
            f"{self.url}: attempt {self.attempt} failed, next in {self.wait_s:.1f} s: {_beside(self.url, self.cause)}"
        )


@dataclass(frozen=True, slots=True)
class FetchHedged:
    """A shard was asked for a second time, because it had not come after ``RetryOptions.hedge_s``."""

    url: str
    after_s: float
    is_won: bool
    """Whether the second request brought it."""

    def __str__(self) -> str:
        first = "second" if self.is_won else "first"
        return f"{self.url}: not there after {self.after_s:g} s, asked a second time; the {first} request was faster"


@dataclass(frozen=True, slots=True)
class ShardSkipped:
    """A shard is lost for this epoch; its rows' places are refilled from others."""

    url: str
    shard: int
    rows: int
    cause: str

    def __str__(self) -> str:
        cause = _beside(self.url, self.cause)
        return f"{self.url}: shard {self.shard} skipped, its {self.rows:,} rows to be refilled: {cause}"


@dataclass(frozen=True, slots=True)
class ReadSlow:
    """The training loop has been waiting for a batch."""

    url: str
    waited_s: float
    waiting_for: str
    attempt: int = 0
    """Which request for that shard is meant, from 1; 0: none was made yet, or it is no shard that is waited for."""
    doing: str = ""
    """What is happening to it: ``"asked 12 s ago"``."""
    cause: str = ""
    """Why the attempt before failed; empty if none did."""

    def __str__(self) -> str:
        attempt = f", attempt {self.attempt}" if self.attempt else ""
        doing = f", {self.doing}" if self.doing else ""
        cause = f"; failed before: {self.cause}" if self.cause else ""
        return f"{self.url}: waited {self.waited_s:.0f} s for {self.waiting_for}{attempt}{doing}{cause}"


@dataclass(frozen=True, slots=True)
class CacheOff:
    """The node cache cannot be used, or cannot take more; streaming goes on without it."""

    directory: str
    cause: str

    def __str__(self) -> str:
        return f"{self.directory}: the node cache is off: {self.cause}; streaming goes on without it"


@dataclass(frozen=True, slots=True)
class CacheDamaged:
    """An entry of the node cache was not what it should be; it is removed, and the shard fetched from the store."""

    path: str
    url: str
    cause: str

    def __str__(self) -> str:
        cause = _beside(self.path, self.cause)
        return f"{self.path}: this cache entry is damaged, and {self.url} is fetched anew: {cause}"


def _beside(url: str, cause: str) -> str:
    """Return *cause* without the url that the line begins with anyway."""
    return cause.removeprefix(f"{url}: ")


Event = FetchRetried | FetchHedged | ShardSkipped | ReadSlow | CacheOff | CacheDamaged
Observer = Callable[[Event], None]
"""Receives each event, on the thread where it happened; must be quick and must not raise."""

COUNTERS: Final = (
    "samples", "batches", "shards_read", "bytes_read", "bytes_decoded",
    "retries", "shards_skipped", "rows_skipped", "slow_reads",
    "cache_hits", "cache_misses", "cache_evicted", "cache_full", "cache_damaged", "bytes_cached",
    "hedges", "hedges_won",
    "wait_ns", "fetch_ns", "decode_ns", "gather_ns",
)  # fmt: skip
"""What is counted, in the order of a ``Counters`` row. Names ending in ``_ns`` are nanoseconds, summed over threads."""


class Counters:
    """Counts of one reader, kept in one row of a (shared) int64 tensor.

    Args:
        row: int64 ``(len(COUNTERS),)``. One process writes it, any process may read it.
    """

    def __init__(self, row: torch.Tensor) -> None:
        self._row = row.numpy()
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Add *amounts* to the counters of those names; thread-safe."""
        with self._lock:
            for name, amount in amounts.items():
                self._row[COUNTERS.index(name)] += amount


def summarize(rows: torch.Tensor) -> dict[str, int | float]:
    """Return the sum of counter *rows* ``(readers, len(COUNTERS))`` as a flat dict; ``_ns`` becomes ``_s``."""
    totals = dict(zip(COUNTERS, rows.sum(dim=0).tolist(), strict=True))
    return {
        (name[:-3] + "_s" if name.endswith("_ns") else name): (value / 1e9 if name.endswith("_ns") else value)
        for name, value in totals.items()
    }


def emit(event: Event, *, observer: Observer | None, counters: Counters) -> None:
    """Log, count and hand on one event."""
    match event:
        case FetchRetried():
            logger.warning("%s", event)
            counters.add(retries=1)
        case FetchHedged():
            logger.info("%s", event)
            counters.add(hedges=1, hedges_won=int(event.is_won))
        case ShardSkipped():
            logger.error("%s", event)
            counters.add(shards_skipped=1, rows_skipped=event.rows)
        case ReadSlow():
            logger.warning("%s", event)
            counters.add(slow_reads=1)
        case CacheOff():
            logger.warning("%s", event)
        case CacheDamaged():
            logger.warning("%s", event)
            counters.add(cache_damaged=1)
    if observer is not None:
        observer(event)
