"""Blocks: the pieces of some shards, decoded side by side into one set of columns, with their shuffled row order.

A piece is decoded from its first row to its last; where a subset draws single rows of a shard, the block's index
leaves out those between them.

Loading has two phases, because the size of ragged columns is only known from the shards themselves: *open* each piece
(fetch, verify, read offsets), then allocate the block's columns once and *fill* each piece in place.

Lost rows. A piece whose shard is corrupt or missing leaves its rows' places empty. They are refilled by rows drawn,
with a key, from the surviving rows of the same block; if none survived, from the next block that has survivors: of the
same lane, then of the lanes after it, cyclically. The draw depends on the order, and on which shards are bad, and on
nothing else: so every reader on every topology puts the same rows in the same places, and the number of batches never
changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import torch

from streamshards.engine.labels import NO_LABELS, Labels
from streamshards.errors import ShardCorrupt, ShardMissing
from streamshards.plan.index import Index
from streamshards.plan.order import Block, Draw, EpochOrder, Int64Array, Piece, philox_words
from streamshards.plan.subset import Subset
from streamshards.shard.data import ColumnData, Columns, part_dtype, part_shape
from streamshards.shard.reader import ShardReader, empty
from streamshards.shard.schema import Field, Path, Schema

_ORDER_BYTES: Final = 16
"""Of a row's place in the shuffled order: an int64, and another one while it is drawn."""


def loaded_sizes(index: Index, schema: Schema) -> Int64Array:
    """Return the bytes that each shard of *index* takes at most once its rows are in a block: int64 ``(shards,)``.

    That is more than its own raw bytes where the shard may store a field more tightly than the dataset's *schema* has
    it: nothing at all of one that is None throughout, no offsets of one whose size does not vary there. Which shards
    do, the index does not say, so all are reckoned as if they did.
    """
    row_bytes = _ORDER_BYTES + sum(_unstored_row_bytes(column) for column in schema.fields)
    return index.raw_sizes + index.rows * row_bytes


def _unstored_row_bytes(column: Field) -> int:
    """Return the bytes a row of *column* takes in a block although its shard may store none of them."""
    unstored = set(column.parts) - {"values"} if column.kind == "ragged" else set()
    if column.optional:
        unstored = set(column.parts) - (set() if column.kind == "tensor" else {"values"})
    return sum(math.prod(part_shape(column, part, 1, 0)[1:]) * part_dtype(column, part).itemsize for part in unstored)


@dataclass(frozen=True, slots=True)
class LoadedBlock:
    """What batches are gathered from."""

    columns: Columns
    index: torch.Tensor
    """int64 ``(rows of the block,)``: for each lane offset of the block in order, its row in *columns*."""


class Span(NamedTuple):
    """Which rows of its shard a piece stands for."""

    first: int
    stop: int
    picked: torch.Tensor | None = None
    """Which of ``[first, stop)`` belong to the piece, counted from *first*, int64 ascending; None: all."""

    @property
    def num_rows(self) -> int:
        """Rows to decode."""
        return self.stop - self.first


def span_of(piece: Piece, subset: Subset) -> Span:
    """Return where the rows of *piece*, which are numbered within *subset*, lie in their shard."""
    rows = subset.rows_of(piece.shard)[piece.lo : piece.hi]
    if isinstance(rows, range):
        return Span(rows.start, rows.stop)
    first = int(rows[0])
    return Span(first, int(rows[-1]) + 1, torch.from_numpy(rows - first))


@dataclass(slots=True)
class OpenPiece:
    """A piece of a block whose shard has been verified, or is lost."""

    piece: Piece
    span: Span
    reader: ShardReader | None
    """None: the shard is lost."""
    offsets: dict[Path, torch.Tensor] = field(default_factory=dict)
    """For each ragged field: where the piece's rows begin in its values, int64 (rows + 1,), from 0."""
    cause: ShardCorrupt | ShardMissing | None = None

    def lose(self, cause: ShardCorrupt | ShardMissing) -> None:
        """Give the piece up: its rows will not be delivered."""
        self.reader = None
        self.cause = cause


def open_piece(piece: Piece, span: Span, reader: ShardReader, schema: Schema) -> OpenPiece:
    """Return *piece* with what is needed to allocate its block.

    Raises:
        ShardCorrupt: The shard's offsets do not hold.
    """
    opened = OpenPiece(piece, span, reader)
    for column in schema.fields:
        if "offsets" in column.parts:
            opened.offsets[column.path] = reader.offsets(column, span.first, span.stop)
    return opened


class BlockBuffers:
    """The columns of one block, being filled.

    Args:
        schema: The fields to read.
        pieces: All pieces of the block, opened or lost, in tape order.
    """

    def __init__(self, schema: Schema, pieces: Sequence[OpenPiece]) -> None:
        self.pieces = list(pieces)
        self._first_rows = [0]
        for opened in self.pieces:
            self._first_rows.append(self._first_rows[-1] + opened.span.num_rows)
        num_rows = self._first_rows[-1]
        self._first_items: dict[Path, list[int]] = {}
        self.columns = Columns(schema, num_rows, {f.path: self._allocate(f, num_rows) for f in schema.fields})

    def fill(self, number: int) -> None:
        """Decode piece *number* into its place. Different pieces may be filled on different threads.

        Raises:
            ShardCorrupt: It does not decode; its rows then hold anything.
        """
        opened = self.pieces[number]
        if opened.reader is None:
            return
        span = opened.span
        first = self._first_rows[number]
        for column in self.columns.schema.fields:
            for part in column.parts:
                if part == "offsets":
                    continue
                whole = self.columns.data[column.path].part(part)
                if part == "values" and column.path in self._first_items:
                    lo, hi = self._first_items[column.path][number : number + 2]
                else:
                    lo, hi = first, first + span.num_rows
                opened.reader.read_into(column, part, span.first, span.stop, whole[lo:hi])

    def rows(self) -> torch.Tensor:
        """Return which row of the columns each row of the block is, in tape order, int64."""
        return torch.cat([self._rows_of(number) for number in range(len(self.pieces))])

    def surviving_rows(self) -> torch.Tensor:
        """Return the same for those rows that hold data: int64, ascending."""
        kept = [self._rows_of(number) for number, opened in enumerate(self.pieces) if opened.reader is not None]
        return torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64)

    @property
    def is_dense(self) -> bool:
        """Whether the block's rows are the columns' rows, one by one."""
        return all(opened.span.picked is None for opened in self.pieces)

    def label(self, labels: Labels, *, epoch: int, source: int) -> None:
        """Add the columns that say where each row comes from."""
        spans = [(opened.piece.shard, opened.span.first, opened.span.stop) for opened in self.pieces]
        self.columns = labels.of_block(self.columns, spans, epoch=epoch, source=source)

    def _rows_of(self, number: int) -> torch.Tensor:
        first, span = self._first_rows[number], self.pieces[number].span
        return torch.arange(first, first + span.num_rows) if span.picked is None else span.picked + first

    def _allocate(self, column: Field, num_rows: int) -> ColumnData:
        data = ColumnData(torch.empty(0, dtype=torch.uint8))
        total = 0
        if "offsets" in column.parts:
            data.offsets = self._join_offsets(column.path, num_rows)
            total = int(data.offsets[-1])
        for part in column.parts:
            if part != "offsets":
                shape, dtype = part_shape(column, part, num_rows, total), part_dtype(column, part)
                setattr(data, part, empty(shape, dtype))
        return data

    def _join_offsets(self, path: Path, num_rows: int) -> torch.Tensor:
        offsets = torch.zeros(num_rows + 1, dtype=torch.int64)
        items = [0]
        for opened, first in zip(self.pieces, self._first_rows, strict=False):
            until = first + opened.span.num_rows
            if opened.reader is None:
                offsets[first + 1 : until + 1] = items[-1]
            else:
                torch.add(opened.offsets[path][1:], items[-1], out=offsets[first + 1 : until + 1])
            items.append(int(offsets[until]))
        self._first_items[path] = items
        return offsets


def finish(
    order: EpochOrder, block: Block, buffers: BlockBuffers, labels: Labels = NO_LABELS, *, source: int = 0
) -> LoadedBlock | None:
    """Return the filled block in its shuffled order, lost rows refilled from its surviving ones; None if none did."""
    if labels:
        buffers.label(labels, epoch=order.epoch, source=source)
    index = torch.from_numpy(order.permutation(block))
    lost = [opened for opened in buffers.pieces if opened.reader is None]
    if not lost:
        return LoadedBlock(buffers.columns, index if buffers.is_dense else buffers.rows()[index])
    survivors = buffers.surviving_rows()
    if not len(survivors):
        return None
    is_lost = torch.cat([torch.full((o.piece.num_rows,), o.reader is None) for o in buffers.pieces])
    places = is_lost[index]
    index = buffers.rows()[index]
    index[places] = draw_refill(order, block, survivors, int(places.sum()))
    return LoadedBlock(buffers.columns, index)


def refill_from(order: EpochOrder, block: Block, donor: LoadedBlock) -> LoadedBlock:
    """Return *block*, all of whose rows are lost, refilled from the rows of another block of its lane."""
    survivors = torch.unique(donor.index)
    return LoadedBlock(donor.columns, draw_refill(order, block, survivors, block.num_rows))


def draw_refill(order: EpochOrder, block: Block, survivors: torch.Tensor, count: int) -> torch.Tensor:
    """Return *count* of *survivors*, drawn with replacement under the block's key: int64 ``(count,)``."""
    words = philox_words(
        count,
        seed=order.settings.seed,
        epoch=order.epoch,
        draw=Draw.REFILL,
        lane=block.lane,
        block=block.number,
    )
    return survivors[torch.from_numpy((words % np.uint64(len(survivors))).astype(np.int64))]
