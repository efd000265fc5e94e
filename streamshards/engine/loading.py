"""Loads blocks on a few threads, within a budget of bytes.

Invariants:

- Blocks are admitted in the order of need, ahead of it only while their bytes fit beside those admitted before.
- At most ``cores`` threads decode at once; the others fetch. A piece to decode goes before a piece to fetch, and an
  earlier block before a later one.
- A failure reaches whoever waits for that block, with its traceback; nothing is swallowed.
- After ``close`` no thread starts anything new; each ends as soon as what it is in returns.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from streamshards.clock import Clock
from streamshards.engine.blocks import (
    BlockBuffers,
    LoadedBlock,
    OpenPiece,
    finish,
    open_piece,
    refill_from,
    span_of,
)
from streamshards.engine.fetch import Progress
from streamshards.engine.labels import NO_LABELS, Labels
from streamshards.engine.ranges import Wanted
from streamshards.engine.retry import Cancelled
from streamshards.engine.source import Source
from streamshards.errors import ShardCorrupt, ShardMissing, TooManyCorrupt
from streamshards.events import ShardSkipped
from streamshards.plan.order import Block, EpochOrder, Piece
from streamshards.plan.schedule import Visit

_KEPT_LOSSES: Final = 4096
"""Epochs whose losses are remembered: lanes are in different epochs of a small source at once."""


@dataclass(eq=False, slots=True)
class _Load:
    """One visited block on its way into memory."""

    source: int
    order: EpochOrder
    block: Block
    raw_bytes: int
    stored_bytes: int
    opened: list[OpenPiece | None]
    unfinished: int
    """Pieces still to open, then still to fill."""
    buffers: BlockBuffers | None = None
    result: LoadedBlock | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.result is not None or self.error is not None


@dataclass(slots=True)
class _Losses:
    """What one epoch of one source has lost."""

    rows: int = 0
    pieces: dict[int, set[Piece]] = field(default_factory=dict)


@dataclass(order=True, slots=True)
class _Task:
    need: int
    """Its block's place in the order of need; the heap's key, with *number*."""
    number: int
    load: _Load = field(compare=False)
    run: Callable[[], None] = field(compare=False)


class BlockLoader:
    """Loads the blocks of one epoch for one reader.

    Args:
        sources: The datasets; a visit's ``source`` is a number in this list.
        labels: What blocks say about their rows.
        threads: Threads that fetch and decode.
        cores: How many of them may decode at once.
        budget_bytes: Stored and raw bytes of all admitted blocks together.
        cancelled: Set to stop; shared with the fetcher.
        clock: Time.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        labels: Labels = NO_LABELS,
        threads: int,
        cores: int,
        budget_bytes: int,
        cancelled: threading.Event,
        clock: Clock,
    ) -> None:
        self._sources = sources
        self._labels = labels
        self._cores = cores
        self._budget_bytes = budget_bytes
        self._cancelled = cancelled
        self._clock = clock
        self._changed = threading.Condition()
        self._loads: dict[Visit, _Load] = {}
        self._fetches: list[_Task] = []
        self._fills: list[_Task] = []
        self._filling = 0
        self._used_bytes = 0
        self._peak_bytes = 0
        self._losses: dict[tuple[int, int], _Losses] = {}
        self._need = itertools.count()
        self._numbers = itertools.count()
        self.threads = [
            threading.Thread(target=self._work, name=f"streamshards-read-{i}", daemon=True) for i in range(threads)
        ]
        try:
            for thread in self.threads:
                thread.start()
        except BaseException:  # the process may have no more threads
            self.close()
            raise

    # -- the face, for the one thread that assembles batches -------------------------------------------------------

    def fits(self, visit: Visit) -> bool:
        """Return whether the block of *visit* fits the budget beside those admitted; into an empty one, all fit."""
        with self._changed:
            return not self._used_bytes or self._used_bytes + sum(self._sizes(visit)) <= self._budget_bytes

    def admit(self, visit: Visit) -> None:
        """Start to load the block of *visit*."""
        block = visit.block
        raw_bytes, stored_bytes = self._sizes(visit)
        opened: list[OpenPiece | None] = [None] * len(block.pieces)
        load = _Load(visit.source, visit.order, block, raw_bytes, stored_bytes, opened, len(opened))
        with self._changed:
            self._use(raw_bytes + stored_bytes)
            self._loads[visit] = load
            need = next(self._need)
            for number in range(len(block.pieces)):
                task = _Task(need, next(self._numbers), load, partial(self._open, load, need, number))
                self._push(self._fetches, task)
            self._changed.notify_all()

    def wait(self, visit: Visit) -> LoadedBlock:
        """Return the block of an admitted *visit* once it is loaded.

        Raises:
            StreamShardsError: What the engine could not do.
            Cancelled: The owner gave up.
        """
        with self._changed:
            load = self._loads[visit]
            while not load.is_done:
                if self._cancelled.is_set():
                    raise Cancelled
                self._changed.wait()
        if load.error is not None:
            raise load.error
        assert load.result is not None  # for mypy: is_done
        return load.result

    def release(self, visit: Visit) -> None:
        """Forget the block of *visit*, and give its bytes back to the budget."""
        with self._changed:
            self._use(-self._loads.pop(visit).raw_bytes)

    def close(self) -> None:
        """Stop all threads as soon as they can."""
        self._cancelled.set()
        with self._changed:
            self._fetches.clear()
            self._fills.clear()
            self._changed.notify_all()

    def describe(self, visit: Visit) -> str:
        """Return what *visit* still waits for, for people."""
        with self._changed:
            load = self._loads.get(visit)
            block = visit.block
            where = f"lane {block.lane}, block {block.number}"
            names = self._sources[visit.source].index.names
            if load is None:
                return f"memory to load {where}"
            if load.is_done:
                return f"{where} to be gathered"
            missing = [p.shard for p, opened in zip(block.pieces, load.opened, strict=True) if opened is None]
        if missing:
            return f"{names[missing[0]]} ({len(missing)} of {len(block.pieces)} shards of {where})"
        return f"{where} to be decoded"

    def progress(self, visit: Visit) -> Progress | None:
        """Return how the fetch goes that *visit* waits for first; None if it waits for something else."""
        with self._changed:
            load = self._loads.get(visit)
            if load is None or load.is_done:
                return None
            missing = [p.shard for p, opened in zip(visit.block.pieces, load.opened, strict=True) if opened is None]
        if not missing:
            return None
        found = self._sources[visit.source].fetcher.progress(missing[0])
        return found or Progress(doing="no request yet")

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were admitted at once."""
        return self._peak_bytes

    # -- on the threads --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Do what is to be done next; return whether to go on.

        A frame of its own: a thread that waits for work must not hold the block that it worked on last.
        """
        task = self._next_task()
        if task is None:
            return False
        is_fill = task.load.buffers is not None
        try:
            task.run()
        except Cancelled:
            return False
        except BaseException as error:  # noqa: BLE001 -- carried over to whoever waits for the block
            with self._changed:
                task.load.error = error
        finally:
            with self._changed:
                self._filling -= is_fill
                self._changed.notify_all()
        return True

    def _next_task(self) -> _Task | None:
        with self._changed:
            while not self._cancelled.is_set():
                if self._fills and self._filling < self._cores:
                    self._filling += 1
                    return heapq.heappop(self._fills)
                if self._fetches:
                    return heapq.heappop(self._fetches)
                self._changed.wait()
        return None

    def _push(self, tasks: list[_Task], task: _Task) -> None:
        """Add *task*, unless nobody will do it any more: it refers to us, and only ``close`` would break that cycle."""
        if not self._cancelled.is_set():
            heapq.heappush(tasks, task)

    def _open(self, load: _Load, need: int, number: int) -> None:
        source = self._sources[load.source]
        opened = self._open_piece(source, load.block.pieces[number])
        with self._changed:
            load.opened[number] = opened
            load.unfinished -= 1
            if load.unfinished:
                return
        buffers = BlockBuffers(source.schema, [piece for piece in load.opened if piece is not None])
        with self._changed:
            load.buffers = buffers
            load.unfinished = len(buffers.pieces)
            for piece in range(len(buffers.pieces)):
                task = _Task(need, next(self._numbers), load, partial(self._fill, load, buffers, piece))
                self._push(self._fills, task)
            self._changed.notify_all()

    def _fill(self, load: _Load, buffers: BlockBuffers, number: int) -> None:
        self._fill_piece(self._sources[load.source], buffers, number)
        with self._changed:
            load.unfinished -= 1
            if load.unfinished:
                return
        result = self._finish(load.source, load.order, load.block, buffers)
        self._report_losses(load, buffers)
        if result is None:
            result = self._refill_from_another(load)
        with self._changed:
            load.result = result
            load.buffers = None
            load.opened.clear()
            self._use(-load.stored_bytes)

    def _finish(self, source: int, order: EpochOrder, block: Block, buffers: BlockBuffers) -> LoadedBlock | None:
        return finish(order, block, buffers, self._labels, source=source)

    def _open_piece(self, source: Source, piece: Piece) -> OpenPiece:
        span = span_of(piece, source.subset)
        try:
            reader = source.fetcher.fetch(piece.shard, Wanted(source.schema, span.first, span.stop))
            return open_piece(piece, span, reader, source.schema)
        except (ShardCorrupt, ShardMissing) as error:
            return self._lose(source, OpenPiece(piece, span, None), error)

    def _fill_piece(self, source: Source, buffers: BlockBuffers, number: int) -> None:
        started = self._clock.now()
        opened = buffers.pieces[number]
        reader = opened.reader
        if reader is None:
            return
        try:
            buffers.fill(number)
        except (ShardCorrupt, ShardMissing) as error:
            self._lose(source, opened, error)
        decoded = 0 if reader.is_decoded else reader.raw_bytes * opened.span.num_rows // reader.num_rows
        source.counters.add(decode_ns=int((self._clock.now() - started) * 1e9), bytes_decoded=decoded)

    def _lose(self, source: Source, opened: OpenPiece, error: ShardCorrupt | ShardMissing) -> OpenPiece:
        if not source.policy.skip:
            raise error
        opened.lose(error)
        return opened

    def _report_losses(self, load: _Load, buffers: BlockBuffers) -> None:
        for opened in buffers.pieces:
            if opened.cause is not None:
                self._report_loss(load, opened.piece, opened.cause)

    def _report_loss(self, load: _Load, piece: Piece, cause: ShardCorrupt | ShardMissing) -> None:
        """Log a lost shard once and count each of its rows once, in however many lanes and visits it is met."""
        source = self._sources[load.source]
        with self._changed:
            losses = self._losses_of(load.source, load.order.epoch)
            pieces = losses.pieces.setdefault(piece.shard, set())
            if piece in pieces:
                return
            is_known = bool(pieces)
            pieces.add(piece)
            losses.rows += piece.num_rows
            lost = losses.rows
        url = source.fetcher.url_of(piece.shard)
        if is_known:
            source.counters.add(rows_skipped=piece.num_rows)
        else:
            source.emit(ShardSkipped(url, piece.shard, piece.num_rows, str(cause)))
        if lost > source.policy.max_rows:
            raise TooManyCorrupt(
                f"{url}: {lost:,} rows lost to bad shards in this epoch, max_corrupt allows "
                f"{source.policy.max_rows:,} of {source.subset.num_samples:,}; the last: {cause}. "
                'Repair the dataset ("streamshards verify" lists bad shards) or raise max_corrupt'
            ) from cause

    def _losses_of(self, source: int, epoch: int) -> _Losses:
        """Return what has been lost in one epoch of one source; the latest to lose anything are kept."""
        losses = self._losses.pop((source, epoch), None) or _Losses()
        if len(self._losses) >= _KEPT_LOSSES:
            del self._losses[next(iter(self._losses))]
        self._losses[source, epoch] = losses
        return losses

    def _refill_from_another(self, load: _Load) -> LoadedBlock:
        """Return *load*'s block refilled from the next one with surviving rows; no other thread has a part in it."""
        source = self._sources[load.source]
        for donor in load.order.blocks_after(load.block):
            loaded = self._load_now(load, donor)
            if loaded is not None:
                return refill_from(load.order, load.block, loaded)
        raise TooManyCorrupt(
            f"{source.fetcher.url_of(load.block.pieces[0].shard)}: this shard and all others are corrupt or missing; "
            'run "streamshards verify" on the dataset'
        )

    def _load_now(self, load: _Load, block: Block) -> LoadedBlock | None:
        source = self._sources[load.source]
        buffers = BlockBuffers(source.schema, [self._open_piece(source, piece) for piece in block.pieces])
        for number in range(len(buffers.pieces)):
            self._fill_piece(source, buffers, number)
        return self._finish(load.source, load.order, block, buffers)

    # -- bytes -----------------------------------------------------------------------------------------------------

    def _sizes(self, visit: Visit) -> tuple[int, int]:
        """Return the bytes of a block's rows in memory, and the stored bytes of its shards."""
        return self._sources[visit.source].block_bytes(visit.block)

    def _use(self, amount: int) -> None:
        self._used_bytes += amount
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)
