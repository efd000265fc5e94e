"""Shards on their way out: compressed and stored by background threads, bounded in bytes.

One thread takes a shard all the way: columns → bytes → store. More threads than cores keep the cores busy while
uploads wait for the network. The first failure stops everything and reaches the owner once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from streamshards.clock import Clock
from streamshards.engine.retry import Cancelled, circuit_of, with_retries
from streamshards.errors import StreamShardsError
from streamshards.events import FetchRetried, logger
from streamshards.options import RetryOptions
from streamshards.shard.cutter import Cut
from streamshards.shard.data import Columns
from streamshards.shard.payload import encode
from streamshards.storage.store import Store

STOP_S: Final = 2.0
"""An upload that is under way when everything is called off gets this long to end; then nobody waits for it."""
_REMOVE_THREADS: Final = 8


@dataclass(frozen=True)
class StoredShard:
    """What the index says about a shard that is in the store."""

    name: str
    num_rows: int
    raw_bytes: int
    stored_bytes: int
    digest: str
    tail: tuple[int, int]


@dataclass
class _Job:
    number: int
    name: str
    num_bytes: int
    cut: Cut | None

    def columns(self) -> Columns:
        """Return the rows, and let go of them."""
        cut, self.cut = self.cut, None
        assert cut is not None, "asked twice"
        return cut.join()


class Packer:
    """Compresses and stores shards in the background.

    Args:
        store: Where they go.
        level: Of zstd; None: chosen for each column.
        num_threads: That compress and store, a shard each.
        max_pending_bytes: ``submit`` blocks while more would be under way; one shard always may be.
        retry: How long to try.
        clock: Time.
        on_retry: Receives each retry, on the thread where it happened.
        on_stored: Called after each shard, one call at a time, on a background thread; what it raises is a failure.
    """

    def __init__(
        self,
        store: Store,
        *,
        level: int | None,
        num_threads: int,
        max_pending_bytes: int,
        retry: RetryOptions,
        clock: Clock,
        on_retry: Callable[[FetchRetried], None],
        on_stored: Callable[[StoredShard], None],
    ) -> None:
        self._store = store
        self._level = level
        self._max_pending_bytes = max_pending_bytes
        self._retry = retry
        self._clock = clock
        self._on_retry = on_retry
        self._on_stored = on_stored
        self._circuit = circuit_of(store, clock)
        self._changed = threading.Condition()
        self._telling = threading.Lock()
        self._cancelled = threading.Event()
        self._jobs: deque[_Job] = deque()
        self._num_submitted = 0
        self._pending_bytes = 0
        self._stored: dict[int, StoredShard] = {}
        self._begun: list[str] = []
        self._failure: StreamShardsError | None = None
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"streamshards-pack-{number}", daemon=True)
            for number in range(num_threads)
        ]

    def __repr__(self) -> str:
        return f"<Packer: {len(self._stored):,} of {self._num_submitted:,} shards stored, {self.pending_bytes:,} bytes>"

    @property
    def pending_bytes(self) -> int:
        """Bytes of the shards under way: uncompressed until they are compressed."""
        return self._pending_bytes

    def start(self) -> None:
        """Start the threads; whoever does calls ``stop`` in the end."""
        for thread in self._threads:
            thread.start()

    def submit(self, name: str, cut: Cut) -> None:
        """Take one more shard; block while too many bytes are under way.

        Raises:
            StreamShardsError: An earlier shard failed; its name is in the text, the reason is the cause.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._has_room(cut.num_bytes))
            self._raise_failure()
            self._jobs.append(_Job(self._num_submitted, name, cut.num_bytes, cut))
            self._num_submitted += 1
            self._pending_bytes += cut.num_bytes
            self._changed.notify_all()

    def finish(self) -> list[StoredShard]:
        """Return all shards in the order in which they were submitted, once every one is stored.

        Raises:
            StreamShardsError: A shard failed; its name is in the text, the reason is the cause.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or len(self._stored) == self._num_submitted)
            self._raise_failure()
            return [self._stored[number] for number in range(self._num_submitted)]

    def stop(self) -> list[str]:
        """Call off what is not done, end the threads, and return the names that may be in the store."""
        self._cancelled.set()
        with self._changed:
            self._is_closed = True
            self._jobs.clear()
            self._changed.notify_all()
        deadline_s = self._clock.now() + STOP_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - self._clock.now()))
        return list(self._begun)

    def _has_room(self, num_bytes: int) -> bool:
        return self._pending_bytes == 0 or self._pending_bytes + num_bytes <= self._max_pending_bytes

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            self._pack_or_fail(job)

    def _next_job(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            return None if self._is_closed else self._jobs.popleft()

    def _pack_or_fail(self, job: _Job) -> None:
        try:
            self._pack(job)
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the owner must hear of it
            self._fail(job, error)

    def _pack(self, job: _Job) -> None:
        name = job.name
        shard = encode(job.columns(), level=self._level)
        left = min(job.num_bytes, len(shard.data))
        with self._changed:
            self._pending_bytes -= job.num_bytes - left
            self._begun.append(name)
            self._changed.notify_all()
        with_retries(
            lambda timeout_s: self._store.put(name, shard.data, timeout_s=timeout_s),
            what=f"{self._store.url}/{name}",
            options=self._retry,
            deadline_s=self._retry.deadline_s,
            clock=self._clock,
            cancelled=self._cancelled,
            on_retry=self._on_retry,
            circuit=self._circuit,
        )
        stored = StoredShard(name, shard.num_rows, shard.raw_bytes, len(shard.data), shard.digest, shard.tail)
        with self._telling:
            self._on_stored(stored)
        with self._changed:
            self._stored[job.number] = stored
            self._pending_bytes -= left
            self._changed.notify_all()

    def _fail(self, job: _Job, error: BaseException) -> None:
        self._cancelled.set()
        with self._changed:
            self._is_closed = True
            if self._failure is None:
                kind = type(error) if isinstance(error, StreamShardsError) else StreamShardsError
                text = str(error) if isinstance(error, StreamShardsError) else f"{type(error).__name__}: {error}"
                self._failure = kind(f"shard {job.name} was not stored: {text}")
                self._failure.__cause__ = error
            self._changed.notify_all()


def remove(store: Store, names: Iterable[str], *, clock: Clock, within_s: float) -> int:
    """Delete objects, best effort; return how many are left, after logging why.

    Args:
        store: Where they are.
        names: Their keys; one that is not there is fine.
        clock: Time.
        within_s: Begin no deletion after this long.
    """
    waiting = deque(names)
    deadline_s = clock.now() + within_s
    failed: list[tuple[str, StreamShardsError | None]] = []

    def work() -> None:
        while clock.now() < deadline_s:
            try:
                name = waiting.popleft()
            except IndexError:
                return
            try:
                store.delete(name)
            except StreamShardsError as error:
                failed.append((name, error))

    threads = [
        threading.Thread(target=work, name=f"streamshards-remove-{number}", daemon=True)
        for number in range(min(_REMOVE_THREADS, len(waiting)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline_s - clock.now()))
    failed += [(name, None) for name in waiting]
    if failed:
        name, cause = failed[0]
        why = cause or f"no time left after {within_s:.0f} s"
        logger.warning(
            '%s: %d shards are no longer needed, but were not deleted, such as %s: %s; "streamshards verify --orphans" '
            "lists them",
            store.url, len(failed), name, why,
        )  # fmt: skip
    return len(failed)
