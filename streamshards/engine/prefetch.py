"""Batches, in order, assembled ahead of the training loop.

One thread follows the schedule: it admits blocks as memory allows, waits for the one it needs, gathers each batch into
memory of its own, and puts it in a short queue. The training loop's thread only takes from that queue.

Invariants:

- Batches come in the schedule's order, each exactly once; then ``StopIteration``, for ever.
- An error comes once the batches before it have been taken, and again at every later ``next``: an epoch that failed
  never looks like one that ended. Nor does one whose ``next`` was interrupted, by Ctrl-C say: a batch may be lost then.
- ``close`` returns at once, from any thread; the threads end on their own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Generic, TypeVar

import torch

from streamshards.clock import Clock
from streamshards.engine.blocks import LoadedBlock
from streamshards.engine.fetch import Progress
from streamshards.engine.gather import BatchBuilder
from streamshards.engine.labels import NO_LABELS, Labels
from streamshards.engine.loading import BlockLoader
from streamshards.engine.retry import Cancelled
from streamshards.errors import StreamShardsError
from streamshards.events import Counters, Event, ReadSlow
from streamshards.plan.schedule import Step, Visit
from streamshards.shard.data import Columns
from streamshards.shard.schema import Schema

T = TypeVar("T")

_STEPS_PER_TURN: Final = 32
"""Steps planned ahead between two batches: the first batch does not wait for a long plan."""
_MAX_SEGMENTS_AHEAD: Final = 1 << 16
"""Bounds the plan's own memory (about 150 bytes a segment) when rows are tiny."""
_JOIN_S: Final = 0.1
"""How long ``close`` waits for the threads, all together: enough to finish a decode, short enough for a ``break``."""


@dataclass(frozen=True)
class _Ready(Generic[T]):
    """A batch that waits for the training loop."""

    batch: T
    num_rows: int
    nbytes: int
    """Of its columns."""


class BatchStream(Generic[T]):
    """An iterator over the batches of one reader, from one position of one epoch to its end.

    Args:
        steps: The schedule.
        loader: Loads the blocks; closed with the stream.
        schema: The fields of a batch, without those of a step's labels.
        labels: What batches say about their rows.
        num_samples: Of the epoch; what lies beyond is padding.
        convert: Turns gathered columns into what ``next`` returns, on the stream's own thread.
        ready_batches: Batches kept ready at most.
        ready_bytes: Their size at most, but for a single one.
        slow_s: Report every time ``next`` has waited this long.
        url: The dataset, for messages.
        clock: Time.
        counters: Where waits and batches are counted.
        emit: Receives each event.
    """

    def __init__(
        self,
        steps: Iterator[Step],
        loader: BlockLoader,
        schema: Schema,
        *,
        labels: Labels = NO_LABELS,
        num_samples: int,
        convert: Callable[[Columns], T],
        ready_batches: int,
        ready_bytes: int,
        slow_s: float,
        url: str,
        clock: Clock,
        counters: Counters,
        emit: Callable[[Event], None],
    ) -> None:
        self._steps = steps
        self._loader = loader
        self._schema = schema
        self._labels = labels
        self._num_samples = num_samples
        self._convert = convert
        self._max_ready = ready_batches
        self._max_ready_bytes = ready_bytes
        self._slow_s = slow_s
        self._url = url
        self._clock = clock
        self._counters = counters
        self._emit = emit
        self._pid = os.getpid()
        # Touched by the assembling thread alone:
        self._planned: deque[Step] = deque()
        self._unadmitted: deque[Visit] = deque()
        self._num_ahead = 0
        self._taken: dict[Visit, int] = {}
        # Shared with the consumer, under the condition:
        self._changed = threading.Condition()
        self._ready: deque[_Ready[T]] = deque()
        self._ready_bytes = 0
        self._waiting_for: Visit | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._frames: TracebackType | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._assemble_all, name="streamshards-assemble", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # the process may have no more threads
            loader.close()
            raise

    # -- the consumer's side ---------------------------------------------------------------------------------------

    def next(self) -> T:
        """Return the next batch.

        Raises:
            StopIteration: There are no more.
            StreamShardsError: What the engine could not do; the same again at every later call.
        """
        if self._pid != os.getpid():
            raise StreamShardsError(
                f"{self._url}: this iterator was made in process {self._pid} and its threads stayed there; "
                "call iter() on the dataset again in this process"
            )
        started = self._clock.now()
        while (taken := self._take()) is None:
            self._report_slow(self._clock.now() - started)
        wait_ns = int((self._clock.now() - started) * 1e9)
        self._counters.add(batches=1, samples=taken.num_rows, wait_ns=wait_ns)
        return taken.batch

    def close(self, because: BaseException | None = None) -> None:
        """Stop; drop what is ready. Safe to call from any thread, any number of times.

        Args:
            because: Raised by every later ``next``, unless there is an error already; None: they end the epoch.
        """
        if self._pid != os.getpid():
            return
        with self._changed:
            self._error = self._error or because
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._loader.close()
        until = self._clock.now() + _JOIN_S
        for thread in (self._thread, *self._loader.threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - self._clock.now()))

    def _take(self) -> _Ready[T] | None:
        """Return the next batch, or None if there was none within ``slow_s``; else as ``next``."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready or self._ended or self._closed, self._slow_s):
                return None
            if self._ready:
                self._changed.notify_all()
                taken = self._ready.popleft()
                self._ready_bytes -= taken.nbytes
                return taken
            if self._error is not None:
                raise self._error.with_traceback(self._frames)  # or each ``next`` would add its own frames
            raise StopIteration

    def _report_slow(self, waited_s: float) -> None:
        visit = self._waiting_for
        if visit is None:
            self._emit(ReadSlow(self._url, waited_s, "the batch to be assembled"))
            return
        now = self._loader.progress(visit) or Progress()
        self._emit(ReadSlow(self._url, waited_s, self._loader.describe(visit), now.attempt, now.doing, now.cause))

    # -- the assembling thread -------------------------------------------------------------------------------------

    def _assemble_all(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                batch = self._assemble(step)
                if not self._hand_over(batch):
                    return
        except Cancelled:
            return
        except BaseException as error:  # noqa: BLE001 -- carried over to the consumer
            with self._changed:
                self._error, self._frames = error, error.__traceback__
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._loader.close()

    def _next_step(self) -> Step | None:
        self._plan_ahead()
        if not self._planned:
            return None
        return self._planned.popleft()

    def _plan_ahead(self) -> None:
        """Follow the schedule a little further, and admit the blocks it opens while they fit."""
        for _ in range(_STEPS_PER_TURN):
            while self._unadmitted:
                if not self._loader.fits(self._unadmitted[0]):
                    return
                self._loader.admit(self._unadmitted.popleft())
            if self._num_ahead >= _MAX_SEGMENTS_AHEAD:
                return
            step = next(self._steps, None)
            if step is None:
                return
            self._planned.append(step)
            self._unadmitted.extend(step.opened)
            self._num_ahead += len(step.segments)
            for visit in step.closed:
                self._release_if_over(visit)

    def _assemble(self, step: Step) -> _Ready[T]:
        gather_s = 0.0
        builder = BatchBuilder(self._schema, sum(segment.num_rows for segment in step.segments))
        for visit, first, num_rows in step.segments:
            block = self._wait_for(visit)
            started = self._clock.now()
            builder.add(block.columns, block.index[first : first + num_rows])
            del block  # the last reference but the loader's: a block must not outlive its release
            gather_s += self._clock.now() - started
            self._taken[visit] = self._taken.get(visit, 0) + 1
            self._release_if_over(visit)
        self._num_ahead -= len(step.segments)
        started = self._clock.now()
        columns = builder.finish(None if step.reordering is None else torch.from_numpy(step.reordering))
        columns = self._labels.of_step(columns, step.positions, self._num_samples)
        batch = self._convert(columns)
        gather_s += self._clock.now() - started
        self._counters.add(gather_ns=int(gather_s * 1e9))
        return _Ready(batch, columns.num_rows, columns.nbytes)

    def _wait_for(self, visit: Visit) -> LoadedBlock:
        """Return the block of *visit*, the first that is needed now.

        If it did not fit when it was planned, it does now: at most one block of each other lane is still held, and the
        reader checked at the start that one of every lane fits. Where that check was an estimate, it goes over the
        budget rather than wait for ever.
        """
        self._waiting_for = visit
        while visit in self._unadmitted:
            self._loader.admit(self._unadmitted.popleft())
        block = self._loader.wait(visit)
        self._waiting_for = None
        return block

    def _release_if_over(self, visit: Visit) -> None:
        if visit.closed and self._taken.get(visit) == visit.planned:
            del self._taken[visit]
            self._loader.release(visit)

    def _hand_over(self, batch: _Ready[T]) -> bool:
        """Put *batch* into the queue once there is room; return whether anyone still wants it."""
        with self._changed:
            while not self._closed and self._ready and not self._has_room(batch.nbytes):
                self._changed.wait()
            if self._closed:
                return False
            self._ready.append(batch)
            self._ready_bytes += batch.nbytes
            self._changed.notify_all()
        return True

    def _has_room(self, nbytes: int) -> bool:
        return len(self._ready) < self._max_ready and self._ready_bytes + nbytes <= self._max_ready_bytes
