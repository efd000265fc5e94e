"""A whole engine over a store in memory, piece by piece, and a watchdog for tests that could hang."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch

from streamshards.clock import Clock
from streamshards.engine.fetch import Fetcher
from streamshards.engine.loading import BlockLoader
from streamshards.engine.prefetch import BatchStream
from streamshards.engine.source import LossPolicy, Source
from streamshards.events import COUNTERS, Counters, Event, FetchRetried, ShardSkipped, emit, summarize
from streamshards.options import RetryOptions
from streamshards.plan.assignment import Assignment
from streamshards.plan.index import Index
from streamshards.plan.order import EpochOrder, OrderSettings
from streamshards.plan.schedule import schedule
from streamshards.plan.subset import Subset
from streamshards.plan.topology import Topology
from streamshards.shard.columns import Columns, RowBuffer
from streamshards.shard.payload import encode
from streamshards.shard.schema import Schema
from streamshards.storage.store import Store
from streamshards.testing import FakeClock, MemoryStore

T = TypeVar("T")

ALONE = Topology(rank=0, world_size=1)
SKIP = LossPolicy(skip=True, max_rows=1 << 60)
RETRY = RetryOptions()

HANGS_AFTER_S = 20.0
"""No test here takes a tenth of it; one that hangs shows where every thread stands."""


def watched(action: Callable[[], T]) -> T:
    """Return what *action* returns, or raise what it raises; if it hangs, print all threads' stacks and fail."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=run, name="watched", daemon=True)
    thread.start()
    thread.join(HANGS_AFTER_S)
    if thread.is_alive():
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        raise AssertionError("it hangs; the stacks are on stderr")
    if errors:
        raise errors[0]
    return results[0]


def until(predicate: Callable[[], bool]) -> None:
    """Return once *predicate* holds; meanwhile give the processor to others. For states that nothing announces."""

    def run() -> None:
        while not predicate():
            os.sched_yield()

    watched(run)


def engine_threads() -> list[threading.Thread]:
    """Return the threads that any reader of this process has running."""
    names = ("streamshards-assemble", "streamshards-read")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def join_all(threads: Iterable[threading.Thread]) -> None:
    """Return once *threads* have ended; fail if one does not."""
    for thread in threads:
        thread.join(HANGS_AFTER_S)
        assert not thread.is_alive(), f"{thread.name} has not ended"


def sample(number: int) -> dict[str, Any]:
    """Return sample *number*: fixed, ragged, text and optional, each told apart from its neighbours."""
    return {
        "id": number,
        "x": torch.tensor([number, -number], dtype=torch.float32),
        "tokens": torch.arange(number % 7, dtype=torch.int32) + number,
        "text": f"no {number}",
        "maybe": None if number % 3 else torch.tensor([number], dtype=torch.int16),
    }


def columns_of(samples: Iterable[dict[str, Any]]) -> Columns:
    """Return *samples* as columns."""
    buffer = RowBuffer()
    for row in samples:
        buffer.append(row)
    return buffer.finish()


def dataset_of(shards: Sequence[Sequence[dict[str, Any]]]) -> tuple[MemoryStore, Index]:
    """Return a store with one shard for each list of samples, and its index; the schema is what they all have."""
    known = columns_of(next(samples for samples in shards if samples)).schema
    columns = [columns_of(samples) if samples else RowBuffer(known).finish() for samples in shards]
    encoded = [encode(part, level=1) for part in columns]
    names = [f"{number:03}.pt.zst" for number in range(len(shards))]
    schema = columns[0].schema
    for part in columns[1:]:
        schema = schema.merge(part.schema)
    index = Index(
        schema=schema.to_json(),
        names=names,
        rows=np.array([part.num_rows for part in encoded], dtype=np.int64),
        sizes=np.array([len(part.data) for part in encoded], dtype=np.int64),
        raw_sizes=np.array([part.raw_bytes for part in encoded], dtype=np.int64),
        digests=[part.digest for part in encoded],
    )
    shards = {name: part.data for name, part in zip(names, encoded, strict=True)}
    return MemoryStore({**shards, "index.json": index.dump()}), index


def numbered(rows: Sequence[int]) -> tuple[MemoryStore, Index]:
    """Return a dataset of samples 0, 1, 2, … in shards of that many *rows*."""
    starts = np.cumsum([0, *rows]).tolist()
    return dataset_of([[sample(n) for n in range(lo, hi)] for lo, hi in pairwise(starts)])


@dataclass
class Rig:
    """One reader of one epoch, with all it needs; every part can be replaced."""

    store: Store
    index: Index
    lanes: int = 1
    chunk: int = 4
    shuffle_block: int = 16
    shuffle: bool = True
    seed: int = 7
    epoch: int = 0
    batch_size: int = 4
    topology: Topology = ALONE
    tail: Any = "pad"
    start: int = 0
    skip: int = 0
    threads: int = 2
    cores: int = 1
    budget_bytes: int = 1 << 30
    policy: LossPolicy = SKIP
    retry: RetryOptions = RETRY
    ready_batches: int = 2
    ready_bytes: int = 1 << 40
    slow_s: float = 1000.0
    clock: Clock = field(default_factory=FakeClock)
    convert: Callable[[Columns], Any] = lambda columns: columns
    schema: Schema | None = None
    on_event: Callable[[Event], None] | None = None

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        self.cancelled = threading.Event()
        self._counts = torch.zeros(len(COUNTERS), dtype=torch.int64)
        self.counters = Counters(self._counts)
        self.dataset_schema = Schema.from_json(self.index.schema)

    def but(self, **changes: Any) -> Rig:
        """Return another rig over the same store, with *changes*."""
        return replace(self, **changes)

    def emit(self, event: Event) -> None:
        self.events.append(event)
        emit(event, observer=self.on_event, counters=self.counters)

    @property
    def stats(self) -> dict[str, int | float]:
        return summarize(self._counts[None])

    @property
    def retried(self) -> list[FetchRetried]:
        return [event for event in self.events if isinstance(event, FetchRetried)]

    @property
    def skipped(self) -> list[ShardSkipped]:
        return [event for event in self.events if isinstance(event, ShardSkipped)]

    def order(self) -> EpochOrder:
        settings = OrderSettings(
            shuffle=self.shuffle,
            seed=self.seed,
            lanes=self.lanes,
            chunk=self.chunk,
            shuffle_block=self.shuffle_block,
        )
        return EpochOrder(self.index.rows, settings, self.epoch)

    def assignment(self) -> Assignment:
        return Assignment(
            num_samples=self.index.num_samples,
            start=self.start,
            batch_size=self.batch_size,
            topology=self.topology,
            tail=self.tail,
        )

    def fetcher(self) -> Fetcher:
        return Fetcher(
            self.store,
            self.index,
            self.dataset_schema,
            retry=self.retry,
            clock=self.clock,
            cancelled=self.cancelled,
            counters=self.counters,
            emit=self.emit,
        )

    def source(self) -> Source:
        return Source(
            index=self.index,
            subset=Subset(self.index.rows),
            schema=self.schema or self.dataset_schema,
            fetcher=self.fetcher(),
            policy=self.policy,
            counters=self.counters,
            emit=self.emit,
        )

    def loader(self) -> BlockLoader:
        return BlockLoader(
            [self.source()],
            threads=self.threads,
            cores=self.cores,
            budget_bytes=self.budget_bytes,
            cancelled=self.cancelled,
            clock=self.clock,
        )

    def stream(self, loader: BlockLoader | None = None) -> BatchStream[Any]:
        return BatchStream(
            schedule(self.order(), self.assignment(), skip=self.skip),
            loader or self.loader(),
            self.schema or self.dataset_schema,
            num_samples=self.index.num_samples,
            convert=self.convert,
            ready_batches=self.ready_batches,
            ready_bytes=self.ready_bytes,
            slow_s=self.slow_s,
            url=self.store.url,
            clock=self.clock,
            counters=self.counters,
            emit=self.emit,
        )

    def expected_ids(self) -> list[list[int]]:
        """Return the ids that each batch holds when nothing is lost, from the plan alone."""
        assignment = self.assignment()
        positions, lengths = assignment.positions(self.skip, max(0, assignment.num_batches - self.skip))
        shards, rows = self.order().rows_at(positions)
        first = np.concatenate([[0], np.cumsum(self.index.rows)])
        ids = (first[shards] + rows).tolist()
        ends = np.cumsum(lengths).tolist()
        return [ids[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def batches_of(stream: BatchStream[T]) -> Iterator[T]:
    """Yield every batch of *stream*."""
    end = object()
    return iter(lambda: _next_or(stream, end), end)  # type: ignore[arg-type]  # the end is not yielded


def _next_or(stream: BatchStream[T], end: object) -> T | object:
    try:
        return stream.next()
    except StopIteration:
        return end


def drain(stream: BatchStream[T]) -> list[T]:
    """Return every batch of *stream*; fail if it hangs or leaves a thread behind."""
    threads = [stream._thread, *stream._loader.threads]

    try:
        return watched(lambda: list(batches_of(stream)))
    finally:
        stream.close()
        join_all(threads)


def ids_of(columns: Columns) -> list[int]:
    ids: list[int] = columns.data[("id",)].values.tolist()
    return ids
