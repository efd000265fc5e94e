"""The order: position in an epoch → lane → block → row of a shard. Pure, O(1) to seek, never materialised.

Theory
------
1. **Tape.** Shards in a seeded permutation (as stored if not shuffling); their rows in that order are a tape of N rows.
2. **Lanes.** Lane ℓ of K owns the tape interval ``[⌊ℓN/K⌋, ⌊(ℓ+1)N/K⌋)``. Lanes differ by at most one row, so any
   number of shards works with any number of readers; a shard on a border is read by two lanes.
3. **Blocks.** A lane is cut at ``0, T/8, T/8 + T/4, T/8 + T/4 + T/2``, then every T rows (T = ``shuffle_block``), each
   cut moved up to the next shard border. The first blocks are small so that the first batch comes early. The rows of a
   block are permuted by a key (seed, epoch, lane, block).
4. **Interleave.** For the R = ⌊⌊N/K⌋ / b⌋ full rounds, position p lies in chunk ``p // b``, and chunk c in lane
   ``c mod K``. The remaining rows follow lane by lane: with D = N − K·R·b, lane ℓ owns the tail interval
   ``[⌊ℓD/K⌋, ⌊(ℓ+1)D/K⌋)``, because ``⌊ℓN/K⌋ − ℓRb = ⌊ℓD/K⌋``.

Every step is closed form or one binary search, so finding position p costs O(log shards) and no state.

Where the block that holds a row begins: cuts move *up* to a border, so cut c has moved to or below row x exactly when
``c ≤ the last border at or below x``. The block's number is therefore that of the last nominal cut at or below the
row's own shard border; cuts that land on one border make empty blocks, and the last of them names the rows.

Frozen for ever by golden files: the permutation of n items under a key is
``sort((Philox words & ~mask) | arange(n)) & mask`` with mask = the low ⌈log₂ n⌉ bits and Philox keyed by
``SeedSequence(key)``. Keys are unique, so every sorting algorithm agrees, and numpy promises the raw streams of its
bit generators for ever (NEP 19) but not ``Generator.permutation``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from streamshards.errors import OptionInvalid
from streamshards.options import MiB, OrderOptions, require_int
from streamshards.plan.topology import Topology

Int64Array: TypeAlias = npt.NDArray[np.int64]

DEFAULT_BLOCK_BYTES = 64 * MiB
"""Two shards of the default size: rows mix across shards, and a reader that runs one block ahead stays near 128 MiB."""

_RAMP_SHIFTS = (3, 2, 1)
"""The first blocks are T/8, T/4 and T/2 rows: the first batch waits for an eighth of a block, not for a whole one."""


class Draw(IntEnum):
    """What a key draws; keeps the streams of different purposes apart."""

    SHARDS = 0
    BLOCK = 1
    REFILL = 2
    MIXTURE = 3
    SPLIT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderSettings:
    """All that shapes the order besides the dataset and the epoch; saved in every checkpoint."""

    shuffle: bool
    seed: int
    lanes: int
    chunk: int
    shuffle_block: int

    def __post_init__(self) -> None:
        require_int(self.seed, name="seed", minimum=0)
        for name in ("lanes", "chunk", "shuffle_block"):
            require_int(getattr(self, name), name=name, minimum=1)


def resolve_order(
    options: OrderOptions,
    *,
    shuffle: bool,
    seed: int,
    num_samples: int,
    raw_bytes: int,
    global_batch: int,
    topology: Topology,
) -> OrderSettings:
    """Return the settings of a first start; what *options* leaves open follows from the cluster and the data.

    Args:
        options: What the user asked for.
        shuffle: Whether to permute shards and rows.
        seed: From 0.
        num_samples: Samples of the dataset.
        raw_bytes: Their size once decoded.
        global_batch: Samples of one step over all ranks.
        topology: The cluster of the first start.
    """
    lanes = min(options.lanes or topology.num_readers, max(num_samples, 1))
    per_rank = global_batch // topology.world_size
    chunk = options.chunk or (max(1, global_batch // lanes) if options.lanes else per_rank)
    row_bytes = max(1, raw_bytes // max(num_samples, 1))
    block = options.shuffle_block or max(1, DEFAULT_BLOCK_BYTES // row_bytes)
    return OrderSettings(shuffle=shuffle, seed=seed, lanes=lanes, chunk=chunk, shuffle_block=block)


def philox_words(n: int, *, seed: int, epoch: int, draw: Draw, lane: int = 0, block: int = 0) -> npt.NDArray[np.uint64]:
    """Return the first *n* uint64 words of the stream that this key names."""
    key = np.array([seed, epoch, int(draw), lane, block], dtype="<u8").view("<u4")
    words = np.random.Philox(np.random.SeedSequence(key.tolist())).random_raw(n)
    return np.asarray(words, dtype=np.uint64)


def keyed_permutation(n: int, *, seed: int, epoch: int, draw: Draw, lane: int = 0, block: int = 0) -> Int64Array:
    """Return a permutation of ``arange(n)``, int64 ``(n,)``; see the module docstring for the algorithm."""
    mask = np.uint64((1 << max(n - 1, 0).bit_length()) - 1)
    words = philox_words(n, seed=seed, epoch=epoch, draw=draw, lane=lane, block=block)
    words &= ~mask
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= mask
    return words.view(np.int64)


def distinct(values: Int64Array) -> Int64Array:
    """Return each of *values* once, ascending.

    As ``np.unique``, which imports ``numpy.ma`` when it is first called (14 to 35 ms at start-up).
    """
    ordered = np.sort(values)
    is_first = np.ones(len(ordered), dtype=np.bool_)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``[lo, hi)`` of shard number *shard*."""

    shard: int
    lo: int
    hi: int

    @property
    def num_rows(self) -> int:
        return self.hi - self.lo


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one lane that are shuffled together: lane offsets ``[start, stop)``, stored as *pieces* in tape order."""

    lane: int
    number: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> tuple[int, int]:
        """Names the block within its epoch."""
        return (self.lane, self.number)


class Places(NamedTuple):
    """Where positions lead: three int64 arrays of one shape."""

    tracks: Int64Array
    """Names the lane as its reader follows it: it has one block of a track at a time, and only moves forward."""
    lanes: Int64Array
    """Names the lane for ``lane()``; differs from the track where a track goes from one epoch into the next."""
    offsets: Int64Array
    """Of the row in its lane."""


class Lane(NamedTuple):
    """One lane of one epoch of one dataset."""

    source: int
    """Which dataset of a mixture; 0 where there is only one."""
    order: EpochOrder
    number: int


class EpochOrder:
    """The order of one epoch.

    Args:
        rows: Rows of each shard, int64 ``(num_shards,)``, in the order of the index.
        settings: What shapes the order.
        epoch: From 0.
        shards: The numbers of the shards in the index, int64 ``(num_shards,)``; None: 0, 1, 2, …

    Raises:
        OptionInvalid: More lanes than samples.
    """

    def __init__(
        self, rows: Int64Array, settings: OrderSettings, epoch: int, *, shards: Int64Array | None = None
    ) -> None:
        self.settings = settings
        self.epoch = epoch
        num_shards = len(rows)
        self._tape: Int64Array = (
            keyed_permutation(num_shards, seed=settings.seed, epoch=epoch, draw=Draw.SHARDS)
            if settings.shuffle
            else np.arange(num_shards, dtype=np.int64)
        )
        self._tape_shards = self._tape if shards is None else shards[self._tape]
        self._borders = np.zeros(num_shards + 1, dtype=np.int64)
        np.cumsum(rows[self._tape], out=self._borders[1:])
        self.num_samples = int(self._borders[-1])
        lanes, chunk = settings.lanes, settings.chunk
        if lanes > max(self.num_samples, 1):
            raise OptionInvalid(
                f"lanes={lanes:,} is more than the dataset's {self.num_samples:,} samples; use fewer lanes"
            )
        self._rounds = self.num_samples // lanes // chunk
        self._interleaved = self._rounds * lanes * chunk
        self._tail = self.num_samples - self._interleaved
        ramp = [max(1, settings.shuffle_block >> shift) for shift in _RAMP_SHIFTS]
        self._ramp_cuts: Int64Array = np.cumsum([0, *ramp], dtype=np.int64)

    # -- position ↔ lane offset ------------------------------------------------------------------------------------

    def locate(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the lane and the offset in the lane of each position, both int64 of the same shape.

        Positions are in ``[0, num_samples)``; others give nonsense.
        """
        lanes, chunk = self.settings.lanes, self.settings.chunk
        chunks, within = np.divmod(positions, chunk)
        lane = chunks % lanes
        offset = chunks // lanes * chunk + within
        in_tail = positions >= self._interleaved
        if in_tail.any():
            tail = positions[in_tail] - self._interleaved
            lane[in_tail] = -((tail + 1) * lanes // -self._tail) - 1  # the last ℓ with ⌊ℓD/K⌋ ≤ tail
            tail_start = lane[in_tail] * self._tail // lanes
            offset[in_tail] = self._rounds * chunk + tail - tail_start
        return lane, offset

    def places(self, positions: Int64Array) -> Places:
        """Return where each position leads; each lane is a track."""
        lanes, offsets = self.locate(positions)
        return Places(lanes, lanes, offsets)

    def lane(self, track: int, number: int) -> Lane:  # noqa: ARG002 -- a mixture needs the track
        """Return the lane that ``places`` named."""
        return Lane(0, self, number)

    def lane_interval(self, lane: int) -> tuple[int, int]:
        """Return the tape rows ``[start, stop)`` of *lane*."""
        lanes = self.settings.lanes
        return lane * self.num_samples // lanes, (lane + 1) * self.num_samples // lanes

    # -- lane offset → block → row ---------------------------------------------------------------------------------

    def block_at(self, lane: int, offset: int) -> Block:
        """Return the block that holds row *offset* of *lane*."""
        start, stop = self.lane_interval(lane)
        tape_row = start + offset
        shard_border = int(self._borders[self._borders.searchsorted(tape_row, "right") - 1])
        number = self._last_cut(max(shard_border, start) - start)
        block_start = start if number == 0 else self._border_above(start + self._cut(number))
        block_stop = min(self._border_above(start + self._cut(number + 1)), stop)
        return Block(lane, number, block_start - start, block_stop - start, self._pieces(block_start, block_stop))

    def blocks(self, lane: int) -> Iterator[Block]:
        """Yield the blocks of *lane* in order; together they hold each of its rows once."""
        start, stop = self.lane_interval(lane)
        offset = 0
        while offset < stop - start:
            block = self.block_at(lane, offset)
            yield block
            offset = block.stop

    def blocks_after(self, block: Block) -> Iterator[Block]:
        """Yield all other blocks of the epoch: from the next one of its lane on, lane by lane, and round to itself."""
        lanes = self.settings.lanes
        yield from (other for other in self.blocks(block.lane) if other.number > block.number)
        for step in range(1, lanes):
            yield from self.blocks((block.lane + step) % lanes)
        yield from (other for other in self.blocks(block.lane) if other.number < block.number)

    def permutation(self, block: Block) -> Int64Array:
        """Return, for each lane offset of *block* in order, which of its stored rows comes there: int64 ``(rows,)``."""
        if not self.settings.shuffle:
            return np.arange(block.num_rows, dtype=np.int64)
        return keyed_permutation(
            block.num_rows,
            seed=self.settings.seed,
            epoch=self.epoch,
            draw=Draw.BLOCK,
            lane=block.lane,
            block=block.number,
        )

    def max_block_bytes(self, lane: int, raw_bytes: Int64Array) -> int:
        """Return an upper bound of the raw size of any block of *lane*; shards partly in the lane count whole.

        Args:
            lane: Which lane.
            raw_bytes: Bytes of each shard, int64 ``(num_shards,)``, in the order of ``rows``.
        """
        start, stop = self.lane_interval(lane)
        first = int(self._borders.searchsorted(start, "right")) - 1
        last = int(self._borders.searchsorted(stop, "left"))
        borders = self._borders[first : last + 1]
        offsets = distinct(borders.clip(start, stop)) - start
        past_ramp = offsets - self._ramp_cuts[-1]
        cuts = np.where(
            past_ramp < 0,
            self._ramp_cuts.searchsorted(offsets, "right") - 1,
            len(self._ramp_cuts) - 1 + past_ramp // self.settings.shuffle_block,
        )
        begins = np.diff(cuts, prepend=-1) > 0  # a block begins at a border where another cut has become due
        edges = distinct(np.append(start + offsets[begins], stop))
        sizes = np.concatenate([[0], np.cumsum(raw_bytes[self._tape[first:last]])])
        tops = sizes[borders.searchsorted(edges[1:], "left")]
        return int((tops - sizes[borders.searchsorted(edges[:-1], "right") - 1]).max(initial=0))

    # -- for tests, inspection and provenance ----------------------------------------------------------------------

    def rows_at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the shard and the row within it of each position: two int64 arrays. O(rows of the blocks touched)."""
        shards = np.empty_like(positions)
        rows = np.empty_like(positions)
        known: dict[tuple[int, int], tuple[Block, Int64Array, Int64Array]] = {}
        for i, (lane, offset) in enumerate(zip(*(a.tolist() for a in self.locate(positions)), strict=True)):
            block = self.block_at(lane, offset)
            if block.key not in known:
                shard_of = np.concatenate([np.full(p.num_rows, p.shard, dtype=np.int64) for p in block.pieces])
                row_of = np.concatenate([np.arange(p.lo, p.hi, dtype=np.int64) for p in block.pieces])
                permutation = self.permutation(block)
                known[block.key] = (block, shard_of[permutation], row_of[permutation])
            _, shard_at, row_at = known[block.key]
            shards[i] = shard_at[offset - block.start]
            rows[i] = row_at[offset - block.start]
        return shards, rows

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"EpochOrder(epoch={self.epoch}, samples={self.num_samples:,}, shuffle={s.shuffle}, seed={s.seed}, "
            f"lanes={s.lanes}, chunk={s.chunk}, shuffle_block={s.shuffle_block:,})"
        )

    # -- cuts and borders ------------------------------------------------------------------------------------------

    def _cut(self, number: int) -> int:
        """Return where block *number* nominally begins, as an offset in its lane."""
        full = number - (len(self._ramp_cuts) - 1)
        if full <= 0:
            return int(self._ramp_cuts[number])
        return int(self._ramp_cuts[-1]) + full * self.settings.shuffle_block

    def _last_cut(self, offset: int) -> int:
        """Return the number of the last nominal cut at or below *offset*."""
        past_ramp = offset - int(self._ramp_cuts[-1])
        if past_ramp < 0:
            return int(self._ramp_cuts.searchsorted(offset, "right")) - 1
        return len(self._ramp_cuts) - 1 + past_ramp // self.settings.shuffle_block

    def _border_above(self, tape_row: int) -> int:
        """Return the first shard border at or above *tape_row*, or the end of the tape."""
        index = min(int(self._borders.searchsorted(tape_row, "left")), len(self._borders) - 1)
        return int(self._borders[index])

    def _pieces(self, start: int, stop: int) -> tuple[Piece, ...]:
        first = int(self._borders.searchsorted(start, "right")) - 1
        last = int(self._borders.searchsorted(stop, "left"))
        edges = self._borders[first : last + 1].tolist()
        return tuple(
            Piece(shard, max(start, lo) - lo, min(stop, hi) - lo)
            for shard, lo, hi in zip(self._tape_shards[first:last].tolist(), edges[:-1], edges[1:], strict=True)
            if hi > lo
        )
