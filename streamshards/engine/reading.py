"""One reader: how much it may hold and how far it runs ahead, and the parts it consists of, wired together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from streamshards.clock import Clock
from streamshards.engine.gather import fixed_row_bytes
from streamshards.engine.labels import Labels
from streamshards.engine.loading import BlockLoader
from streamshards.engine.prefetch import BatchStream
from streamshards.engine.source import Source
from streamshards.errors import OptionInvalid
from streamshards.events import Counters, Event
from streamshards.options import MiB, PrefetchOptions
from streamshards.plan.assignment import Assignment
from streamshards.plan.schedule import SampleOrder, schedule, tracks_read
from streamshards.shard.columns import Columns
from streamshards.shard.schema import Schema

_SAMPLES_PER_STEP: Final = 1024
"""Samples gathered at once when there is no batch size; the fixed cost of a step is then under 0.1 µs a sample."""
_STEP_BYTES: Final = 4 * MiB
"""Fewer of them when they are large."""
_READY_SHARE: Final = 4
"""Ready batches may take a quarter of ``memory_bytes``; blocks get the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one reader of one epoch reads, and with what.

    Raises nothing itself; :meth:`open` starts threads.
    """

    order: SampleOrder
    assignment: Assignment
    period: int
    """Positions after which the order comes back to the same lane."""
    sources: Sequence[Source]
    schema: Schema
    """The fields of a batch: those of all sources."""
    labels: Labels
    skip: int
    """Batches of this reader to leave out at the start."""
    in_samples: bool
    """Whether single samples are handed out: many are then gathered at once."""
    prefetch: PrefetchOptions
    cores: int
    """How many this reader may use."""
    url: str
    cancelled: threading.Event
    clock: Clock
    counters: Counters
    emit: Callable[[Event], None]

    def open(self, convert: Callable[[Columns], Any]) -> BatchStream[Any]:
        """Return the stream of this reader's batches; its threads are running.

        Args:
            convert: Turns gathered columns into what the stream yields.

        Raises:
            OptionInvalid: One block of each lane that this reader interleaves does not fit into memory.
        """
        per_step = max(1, min(_SAMPLES_PER_STEP, _STEP_BYTES // self._row_bytes)) if self.in_samples else 1
        step_bytes = self._row_bytes * self.assignment.batch_size * per_step
        sources = [replace(source, label_bytes=self.labels.block_row_bytes) for source in self.sources]
        memory_bytes = int(self.prefetch.memory_bytes)
        # Besides those that are ready, one is being assembled; where sources alternate, it is copied into its order.
        unready = 1 if len(sources) == 1 else 2
        beside_blocks = memory_bytes - self._least_block_bytes(sources, (1 + unready) * step_bytes)
        most = min(memory_bytes // _READY_SHARE // step_bytes, beside_blocks // step_bytes - unready)
        ready = max(1, min(self.prefetch.ready_batches, most))
        loader = BlockLoader(
            sources,
            labels=self.labels,
            threads=self.prefetch.threads or min(8, max(2, 2 * self.cores)),
            cores=self.cores,
            budget_bytes=memory_bytes - (ready + unready) * step_bytes,
            cancelled=self.cancelled,
            clock=self.clock,
        )
        return BatchStream(
            schedule(self.order, self.assignment, skip=self.skip, per_step=per_step),
            loader,
            Schema((*self.schema.fields, *self.labels.block_fields), self.schema.empty),
            labels=self.labels,
            num_samples=self.assignment.num_samples,
            convert=convert,
            ready_batches=ready,
            ready_bytes=ready * step_bytes,
            slow_s=self.prefetch.slow_s,
            url=self.url,
            clock=self.clock,
            counters=self.counters,
            emit=self.emit,
        )

    @property
    def _row_bytes(self) -> int:
        """A row's mean size in a batch at most, with its labels. Fixed-size fields take their room also where they are
        absent; of the others, the source counts that has most of them."""
        ragged = max(self._ragged_row_bytes(source) for source in self.sources)
        return max(1, fixed_row_bytes(self.schema) + ragged) + self.labels.batch_row_bytes

    def _ragged_row_bytes(self, source: Source) -> int:
        """Return the most that rows of *source* take, in the mean, in fields whose size varies.

        The index has sums over all fields. Of fixed-size ones, only those that are never absent are sure to be in them:
        a shard in which an optional one is None throughout stores nothing of it.
        """
        offsets = 8 * sum("offsets" in field.parts for field in self.schema.fields)
        if not any("offsets" in field.parts for field in source.schema.fields):
            return offsets
        stored = [field for field in source.schema.fields if field.kind == "tensor" and not field.optional]
        mean = -(-int(source.index.raw_sizes.sum()) // max(1, source.index.num_samples))
        return offsets + max(0, mean - fixed_row_bytes(Schema(tuple(stored))))

    def _least_block_bytes(self, sources: Sequence[Source], least_ready_bytes: int) -> int:
        """Return the bytes of one block of each lane that this reader interleaves.

        Raises:
            OptionInvalid: They do not fit beside *least_ready_bytes*.
        """
        memory_bytes = int(self.prefetch.memory_bytes)
        if least_ready_bytes > memory_bytes:  # before so many positions are planned
            raise OptionInvalid(
                f"{self.url}: the batches that are held at once need {least_ready_bytes / MiB:,.0f} MiB; "
                f"PrefetchOptions.memory_bytes is {memory_bytes / MiB:,.0f} MiB. Use a smaller batch_size, or set more"
            )
        tracks = tracks_read(self.order, self.assignment, period=self.period)
        block_bytes = 0
        for track, number in tracks:
            lane = self.order.lane(track, number)
            block_bytes += lane.order.max_block_bytes(lane.number, sources[lane.source].part_bytes)
        needed = block_bytes + least_ready_bytes
        if needed > memory_bytes:
            raise OptionInvalid(
                f"{self.url}: this order interleaves {len(tracks)} lanes here, and a block of each needs "
                f"{needed / MiB:,.0f} MiB at once; PrefetchOptions.memory_bytes is {memory_bytes / MiB:,.0f} MiB. "
                f'Set memory_bytes="{-(-needed // MiB)}MiB", or use fewer lanes, a smaller shuffle_block or batch_size'
            )
        return block_bytes
