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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from streamshards.clock import Clock
from streamshards.engine.blocks import (
    BlockBuffers,
    LoadedBlock,
    OpenPiece,
    finish,
    loaded_sizes,
    open_piece,
    refill_from,
)
from streamshards.engine.fetch import Fetcher
from streamshards.engine.retry import Cancelled
from streamshards.errors import ShardCorrupt, ShardMissing, TooManyCorrupt
from streamshards.events import Counters, Event, ShardSkipped
from streamshards.plan.index import Index
from streamshards.plan.order import Block, EpochOrder, Piece
from streamshards.plan.schedule import Visit
from streamshards.shard.schema import Schema


@dataclass(frozen=True, kw_only=True, slots=True)
class LossPolicy:
    """What a corrupt or missing shard leads to."""

    skip: bool
    """Refill its rows' places and go on; else raise its error."""
    max_rows: int
    """Rows this reader may lose in one epoch before it gives up."""


@dataclass(eq=False, slots=True)
class _Load:
    """One visited block on its way into memory."""

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
        order: The epoch's order.
        index: The dataset.
        schema: The fields to read.
        fetcher: Fetches and verifies shards.
        policy: What to do about lost shards.
        threads: Threads that fetch and decode.
        cores: How many of them may decode at once.
        budget_bytes: Stored and raw bytes of all admitted blocks together.
        cancelled: Set to stop; shared with the fetcher.
        clock: Time.
        counters: Where bytes and times are counted.
        emit: Receives each event.
    """

    def __init__(
        self,
        order: EpochOrder,
        index: Index,
        schema: Schema,
        fetcher: Fetcher,
        *,
        policy: LossPolicy,
        threads: int,
        cores: int,
        budget_bytes: int,
        cancelled: threading.Event,
        clock: Clock,
        counters: Counters,
        emit: Callable[[Event], None],
    ) -> None:
        self._order = order
        self._index = index
        self._loaded_sizes = loaded_sizes(index, schema)
        self._schema = schema
        self._fetcher = fetcher
        self._policy = policy
        self._cores = cores
        self._budget_bytes = budget_bytes
        self._cancelled = cancelled
        self._clock = clock
        self._counters = counters
        self._emit = emit
        self._changed = threading.Condition()
        self._loads: dict[Visit, _Load] = {}
        self._fetches: list[_Task] = []
        self._fills: list[_Task] = []
        self._filling = 0
        self._used_bytes = 0
        self._peak_bytes = 0
        self._lost: dict[int, set[Piece]] = {}
        self._lost_rows = 0
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
            return not self._used_bytes or self._used_bytes + sum(self._sizes(visit.block)) <= self._budget_bytes

    def admit(self, visit: Visit) -> None:
        """Start to load the block of *visit*."""
        block = visit.block
        raw_bytes, stored_bytes = self._sizes(block)
        load = _Load(block, raw_bytes, stored_bytes, [None] * len(block.pieces), len(block.pieces))
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
            if load is None:
                return f"memory to load {where}"
            if load.is_done:
                return f"{where} to be gathered"
            missing = [p.shard for p, opened in zip(block.pieces, load.opened, strict=True) if opened is None]
        if missing:
            return f"{self._index.names[missing[0]]} ({len(missing)} of {len(block.pieces)} shards of {where})"
        return f"{where} to be decoded"

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
        opened = self._open_piece(load.block.pieces[number])
        with self._changed:
            load.opened[number] = opened
            load.unfinished -= 1
            if load.unfinished:
                return
        buffers = BlockBuffers(self._schema, [piece for piece in load.opened if piece is not None])
        with self._changed:
            load.buffers = buffers
            load.unfinished = len(buffers.pieces)
            for piece in range(len(buffers.pieces)):
                task = _Task(need, next(self._numbers), load, partial(self._fill, load, buffers, piece))
                self._push(self._fills, task)
            self._changed.notify_all()

    def _fill(self, load: _Load, buffers: BlockBuffers, number: int) -> None:
        self._fill_piece(buffers, number)
        with self._changed:
            load.unfinished -= 1
            if load.unfinished:
                return
        result = finish(self._order, load.block, buffers)
        self._report_losses(buffers)
        if result is None:
            result = self._refill_from_another(load.block)
        with self._changed:
            load.result = result
            load.buffers = None
            load.opened.clear()
            self._use(-load.stored_bytes)

    def _open_piece(self, piece: Piece) -> OpenPiece:
        try:
            return open_piece(piece, self._fetcher.fetch(piece.shard), self._schema)
        except (ShardCorrupt, ShardMissing) as error:
            return self._lose(OpenPiece(piece, None), error)

    def _fill_piece(self, buffers: BlockBuffers, number: int) -> None:
        started = self._clock.now()
        opened = buffers.pieces[number]
        reader = opened.reader
        if reader is None:
            return
        try:
            buffers.fill(number)
        except ShardCorrupt as error:
            self._lose(opened, error)
        decoded = reader.raw_bytes * opened.piece.num_rows // reader.num_rows
        self._counters.add(decode_ns=int((self._clock.now() - started) * 1e9), bytes_decoded=decoded)

    def _lose(self, opened: OpenPiece, error: ShardCorrupt | ShardMissing) -> OpenPiece:
        if not self._policy.skip:
            raise error
        opened.lose(error)
        return opened

    def _report_losses(self, buffers: BlockBuffers) -> None:
        for opened in buffers.pieces:
            if opened.cause is not None:
                self._report_loss(opened.piece, opened.cause)

    def _report_loss(self, piece: Piece, cause: ShardCorrupt | ShardMissing) -> None:
        """Log a lost shard once and count each of its rows once, in however many lanes and visits it is met."""
        with self._changed:
            pieces = self._lost.setdefault(piece.shard, set())
            if piece in pieces:
                return
            is_known = bool(pieces)
            pieces.add(piece)
            self._lost_rows += piece.num_rows
            lost = self._lost_rows
        url = self._fetcher.url_of(piece.shard)
        if is_known:
            self._counters.add(rows_skipped=piece.num_rows)
        else:
            self._emit(ShardSkipped(url, piece.shard, piece.num_rows, str(cause)))
        if lost > self._policy.max_rows:
            raise TooManyCorrupt(
                f"{url}: {lost:,} rows lost to bad shards in this epoch, max_corrupt allows "
                f"{self._policy.max_rows:,} of {self._index.num_samples:,}; the last: {cause}. "
                'Repair the dataset ("streamshards verify" lists bad shards) or raise max_corrupt'
            ) from cause

    def _refill_from_another(self, block: Block) -> LoadedBlock:
        """Return *block* refilled from the next block with surviving rows; no other thread has a part in it."""
        for donor in self._order.blocks_after(block):
            loaded = self._load_now(donor)
            if loaded is not None:
                return refill_from(self._order, block, loaded)
        raise TooManyCorrupt(
            f"{self._fetcher.url_of(block.pieces[0].shard)}: this shard and all others are corrupt or missing; "
            'run "streamshards verify" on the dataset'
        )

    def _load_now(self, block: Block) -> LoadedBlock | None:
        buffers = BlockBuffers(self._schema, [self._open_piece(piece) for piece in block.pieces])
        for number in range(len(buffers.pieces)):
            self._fill_piece(buffers, number)
        return finish(self._order, block, buffers)

    # -- bytes -----------------------------------------------------------------------------------------------------

    def _sizes(self, block: Block) -> tuple[int, int]:
        """Return the bytes of *block*'s rows in memory, and the stored bytes of its shards."""
        raw = stored = 0
        for piece in block.pieces:
            rows = int(self._index.rows[piece.shard])
            raw += -(-int(self._loaded_sizes[piece.shard]) * piece.num_rows // rows)
            stored += int(self._index.sizes[piece.shard])
        return raw, stored

    def _use(self, amount: int) -> None:
        self._used_bytes += amount
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)
