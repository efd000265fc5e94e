"""Blocks: pieces of shards decoded side by side, shuffled, and refilled where a shard is lost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.engine.blocks import (
    BlockBuffers,
    LoadedBlock,
    OpenPiece,
    Span,
    draw_refill,
    finish,
    open_piece,
    refill_from,
)
from streamshards.engine.gather import BatchBuilder
from streamshards.errors import ShardCorrupt, ShardMissing
from streamshards.plan.order import Block, Draw, EpochOrder, OrderSettings, Piece, philox_words
from streamshards.shard.columns import to_samples
from streamshards.shard.payload import FramedShard, encode
from streamshards.shard.reader import BaseReader, LoadedShard, ShardReader
from streamshards.shard.schema import Part, Schema
from tests.engine.rig import columns_of, sample
from tests.shard.shard_cases import mixed_samples, random_tensor, same

Row = dict[str, Any]
CAUSE = ShardCorrupt("spoiled by the test")


def reader_of(samples: Sequence[Row], *, is_framed: bool = True) -> BaseReader:
    columns = columns_of(samples)
    if not is_framed:
        return LoadedShard(columns, "loaded")
    encoded = encode(columns, level=1)
    return FramedShard(encoded.data, name="framed", max_raw_bytes=encoded.raw_bytes)


def merged(readers: Sequence[BaseReader]) -> Schema:
    schema = readers[0].schema
    for reader in readers[1:]:
        schema = schema.merge(reader.schema)
    return schema


def open_at(piece: Piece, reader: ShardReader, schema: Schema) -> OpenPiece:
    return open_piece(piece, Span(piece.lo, piece.hi), reader, schema)


def filled(schema: Schema, opened: Sequence[OpenPiece]) -> BlockBuffers:
    buffers = BlockBuffers(schema, opened)
    for number in reversed(range(len(opened))):
        buffers.fill(number)
    return buffers


# -- side by side ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_framed", [True, False], ids=["framed", "foreign"])
def test_pieces_lie_side_by_side(is_framed: bool) -> None:
    """Any part of a shard beside any part of another: the block's rows are theirs, of every field kind, in order."""
    one, two = mixed_samples(), list(reversed(mixed_samples()))
    readers = [reader_of(one, is_framed=is_framed), reader_of(two, is_framed=is_framed)]
    schema = merged(readers)
    spans = [(lo, hi) for lo in range(4) for hi in range(lo + 1, 5)]
    for lo, hi in spans:
        for first, last in spans:
            pieces = [Piece(0, lo, hi), Piece(1, first, last), Piece(0, 0, 4)]
            opened = [open_at(piece, readers[piece.shard], schema) for piece in pieces]
            got = to_samples(filled(schema, opened).columns)
            assert same(got, one[lo:hi] + two[first:last] + one)


def test_shards_below_the_datasets_schema() -> None:
    """Shards that store null, fixed, ragged or optional fields fill one block of the dataset's widest form."""
    groups: list[list[Row]] = [
        [{"x": random_tensor((2, 3), torch.float32, n), "s": "a", "m": {"k": 1}} for n in range(3)],
        [{"x": random_tensor((n, 3), torch.float32, n), "s": None, "m": {"k": None}} for n in range(3)],
        [{"x": random_tensor((n, n), torch.float32, n), "s": "é" * n, "m": {"k": n}} for n in range(3)],
        [{"x": None, "s": None, "m": {"k": None}} for _ in range(3)],
    ]
    readers = [reader_of(group) for group in groups]
    schema = merged(readers)
    assert [field.describe() for field in schema.fields] == ["optional float32 (*, *)", "optional str", "optional int"]
    pieces = [Piece(shard, 1, 3) for shard in (3, 0, 2, 1, 3)]
    opened = [open_at(piece, readers[piece.shard], schema) for piece in pieces]
    got = to_samples(filled(schema, opened).columns)
    assert same(got, [row for piece in pieces for row in groups[piece.shard][1:3]])


def test_only_the_selected_fields_are_read() -> None:
    """A schema of some columns allocates and decodes those alone."""
    reader = reader_of(mixed_samples())
    schema = reader.schema.select(["tokens", "meta.id"])
    buffers = filled(schema, [open_at(Piece(0, 1, 4), reader, schema)])
    assert set(buffers.columns.data) == {("tokens",), ("meta", "id")}
    assert [list(row) for row in to_samples(buffers.columns)] == [["tokens", "meta"]] * 3


def test_a_shard_without_a_field_is_corrupt() -> None:
    """A field that the dataset has and the shard has not, or has of another type, is an error of that shard."""
    reader = reader_of([{"a": 1}])
    for other in ({"b": 1}, {"a": "text"}):
        schema = columns_of([other]).schema
        with pytest.raises(ShardCorrupt):
            filled(schema, [open_at(Piece(0, 0, 1), reader, schema)])


# -- lost rows ---------------------------------------------------------------------------------------------------------


class Spoiled(BaseReader):
    """A shard that opens, and then does not decode."""

    def __init__(self, inner: BaseReader) -> None:
        self.name, self.num_rows, self.raw_bytes = inner.name, inner.num_rows, inner.raw_bytes
        self.schema = inner.schema
        self._inner = inner

    def _own_offsets(self, own: Any) -> torch.Tensor:
        return self._inner._own_offsets(own)

    def _copy(self, own: Any, part: Part, lo: int, hi: int, out: torch.Tensor) -> None:
        out.fill_(1)
        raise CAUSE


def order_of(rows: Sequence[int], **changes: Any) -> EpochOrder:
    shape: dict[str, Any] = {"shuffle": True, "seed": 3, "lanes": 1, "chunk": 4, "shuffle_block": sum(rows) * 8}
    return EpochOrder(np.array(rows, dtype=np.int64), OrderSettings(**shape | changes), epoch=2)


def rows_of(loaded: LoadedBlock) -> list[Row]:
    """Return what is at each place of a block, in order."""
    builder = BatchBuilder(loaded.columns.schema, len(loaded.index))
    builder.add(loaded.columns, loaded.index)
    return to_samples(builder.finish())


@cache
def readers_of(rows: tuple[int, ...]) -> list[BaseReader]:
    """Return a shard of each size, of samples 0, 1, 2, …"""
    numbers = itertools.count()
    return [reader_of([sample(next(numbers)) for _ in range(count)]) for count in rows]


class Assembled:
    """One block over *rows* per shard, with the shards in *unopened* and *unfilled* lost; samples bear their ids."""

    def __init__(self, rows: Sequence[int], *, unopened: set[int], unfilled: set[int], **changes: Any) -> None:
        first = np.concatenate([[0], np.cumsum(rows)]).tolist()
        readers = readers_of(tuple(rows))
        self.samples = [sample(n) for n in range(sum(rows))]
        self.order = order_of(rows, **changes)
        (self.block,) = self.order.blocks(0)
        self.lost = {row for shard in unopened | unfilled for row in range(first[shard], first[shard + 1])}
        schema = merged(readers)
        opened = []
        for piece in self.block.pieces:
            reader = Spoiled(readers[piece.shard]) if piece.shard in unfilled else readers[piece.shard]
            opened.append(open_at(piece, reader, schema))
            if piece.shard in unopened:
                opened[-1] = OpenPiece(piece, Span(piece.lo, piece.hi), None)
                opened[-1].lose(ShardMissing("gone"))
        self.buffers = BlockBuffers(schema, opened)
        for number, one in enumerate(opened):
            if isinstance(one.reader, Spoiled):
                with pytest.raises(ShardCorrupt):
                    self.buffers.fill(number)
                one.lose(CAUSE)
            else:
                self.buffers.fill(number)
        self.loaded = finish(self.order, self.block, self.buffers)

    def ids(self) -> list[int]:
        """Return the id at each place of the block, after checking that it is all of that sample."""
        assert self.loaded is not None
        assert len(self.loaded.index) == self.block.num_rows
        chosen = rows_of(self.loaded)
        assert same(chosen, [self.samples[row["id"]] for row in chosen])
        return [row["id"] for row in chosen]


def whole(rows: Sequence[int], **changes: Any) -> Assembled:
    return Assembled(rows, unopened=set(), unfilled=set(), **changes)


ROWS = [5, 3, 1, 7, 4]


def test_a_whole_block_is_its_rows_in_the_orders_own_permutation() -> None:
    """Without loss nothing is drawn: each row once, in just the order that the plan says."""
    block = whole(ROWS)
    positions = np.arange(sum(ROWS))
    shards, rows = block.order.rows_at(positions)
    first = np.concatenate([[0], np.cumsum(ROWS)])
    assert block.ids() == (first[shards] + rows).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_lost_rows_are_refilled_in_place(shuffle: bool, data: st.DataObject) -> None:
    """Whatever is lost, and when: surviving rows stay where they are, lost places hold survivors, none is added."""
    kinds = data.draw(st.lists(st.sampled_from(["ok", "open", "fill"]), min_size=5, max_size=5))
    unopened = {n for n, kind in enumerate(kinds) if kind == "open"}
    unfilled = {n for n, kind in enumerate(kinds) if kind == "fill"}
    block = Assembled(ROWS, unopened=unopened, unfilled=unfilled, shuffle=shuffle)
    reference = whole(ROWS, shuffle=shuffle).ids()
    survivors = set(reference) - block.lost
    if not survivors:
        assert block.loaded is None
        return
    for got, expected in zip(block.ids(), reference, strict=True):
        assert got == expected if expected in survivors else got in survivors


def test_the_refill_does_not_depend_on_when_a_shard_was_lost() -> None:
    """Not opened or not decoded: the same rows take the same places."""
    lost = {1, 3}
    assert (
        Assembled(ROWS, unopened=lost, unfilled=set()).ids()
        == Assembled(ROWS, unopened=set(), unfilled=lost).ids()
        == Assembled(ROWS, unopened={1}, unfilled={3}).ids()
    )


def test_the_refill_is_the_documented_draw() -> None:
    """The k-th lost place, in the order of the block, takes survivor ``words[k] % count``, survivors in tape order."""
    block = Assembled(ROWS, unopened={3}, unfilled={0})
    reference = whole(ROWS).ids()
    first = np.concatenate([[0], np.cumsum(ROWS)])
    tape = [int(first[piece.shard]) + row for piece in block.block.pieces for row in range(piece.lo, piece.hi)]
    survivors = [row for row in tape if row not in block.lost]
    words = philox_words(12, seed=3, epoch=2, draw=Draw.REFILL, lane=0, block=0).tolist()
    drawn = iter([survivors[word % len(survivors)] for word in words])
    assert block.ids() == [next(drawn) if row in block.lost else row for row in reference]
    assert next(drawn, None) is None


def test_the_draw_is_frozen() -> None:
    """This very draw, for ever: a resumed epoch must refill as it did before."""
    order = order_of([100], lanes=2, shuffle_block=10)
    block = Block(lane=1, number=5, start=0, stop=8, pieces=())
    drawn = draw_refill(order, block, torch.arange(0, 1000, 10), 8)
    assert drawn.dtype == torch.int64
    assert drawn.tolist() == [290, 370, 210, 940, 400, 570, 700, 510]


def test_each_block_draws_for_itself() -> None:
    """Lane, block, epoch and seed all change the draw."""
    survivors = torch.arange(1000)

    def drawn(lane: int = 0, number: int = 0, seed: int = 3) -> list[int]:
        block = Block(lane=lane, number=number, start=0, stop=8, pieces=())
        return draw_refill(order_of([100], lanes=4, seed=seed), block, survivors, 8).tolist()

    draws = [drawn(), drawn(lane=1), drawn(number=1), drawn(seed=4)]
    assert len({tuple(draw) for draw in draws}) == 4


def test_a_wholly_lost_block_is_refilled_from_a_donor() -> None:
    """All of its places hold rows of the donor that are not lost themselves, drawn under its own key, in its memory."""
    donor = Assembled(ROWS, unopened={0}, unfilled={3})
    assert donor.loaded is not None
    block = Block(lane=0, number=9, start=0, stop=50, pieces=(Piece(0, 0, 50),))
    refilled = refill_from(donor.order, block, donor.loaded)
    assert len(refilled.index) == 50
    assert refilled.columns is donor.loaded.columns
    survivors = set(range(sum(ROWS))) - donor.lost
    assert {row["id"] for row in rows_of(refilled)} == survivors, "50 draws from 8 rows miss none, with this seed"
    again = refill_from(donor.order, block, LoadedBlock(refilled.columns, donor.loaded.index.flip(0)))
    assert torch.equal(again.index, refilled.index), "the donor's own order does not matter"


def test_rows_that_did_not_decode_are_never_drawn() -> None:
    """What a failed decode left behind in the columns is not data."""
    block = Assembled([4, 4], unopened=set(), unfilled={1})
    assert set(block.ids()) <= {0, 1, 2, 3}
    assert block.buffers.surviving_rows().tolist() == (
        [0, 1, 2, 3] if block.block.pieces[0].shard == 0 else [4, 5, 6, 7]
    )
