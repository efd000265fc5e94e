"""Cutting a stream of samples into shards.

A shard ends with the first sample that brings its samples to ``shard_bytes``. What one sample counts is a function of
that sample alone (``row_sizes``), so samples written one by one and the same samples written in batches of any size
make the same shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from streamshards.shard.buffer import RowBuffer
from streamshards.shard.data import ColumnData, Columns
from streamshards.shard.reader import BaseReader, LoadedShard, concat
from streamshards.shard.schema import Field, Schema
from streamshards.shard.values import leaves_of

PARK_ROWS: Final = 16_384
"""Single samples are packed into columns after so many: a small tensor takes some 400 bytes besides its data."""


@dataclass(frozen=True)
class Cut:
    """The samples of one shard, in order."""

    pieces: tuple[Columns, ...]
    num_rows: int
    num_bytes: int
    """What the samples count, see ``row_sizes``."""

    def join(self) -> Columns:
        """Return all rows as columns of the lowest schema that holds them."""
        if len(self.pieces) == 1:
            return self.pieces[0]
        schema = self.pieces[0].schema
        for piece in self.pieces[1:]:
            schema = schema.merge(piece.schema)
        readers: list[BaseReader] = [LoadedShard(piece, "rows in memory") for piece in self.pieces]
        return Columns(schema, self.num_rows, {field.path: concat(field, readers) for field in schema.fields})


class ShardCutter:
    """Takes samples, gives out shards' worth of them. Not for several threads at once."""

    def __init__(self, shard_bytes: int, schema: Schema | None = None) -> None:
        """Start empty; a given *schema* binds the types of the fields from the first sample on."""
        self.num_rows = 0
        """Samples taken so far."""
        self._shard_bytes = shard_bytes
        self._buffer = RowBuffer(schema)
        self._parked: list[Columns] = []
        self._parked_bytes = 0

    @property
    def schema(self) -> Schema:
        """What all samples so far have in common, and the schema given at the start."""
        return self._buffer.schema

    def append(self, sample: Mapping[str, Any]) -> Cut | None:
        """Take one sample; return the shard it completes, if it does.

        Raises:
            SampleInvalid: It does not fit; nothing has changed.
        """
        self._buffer.append(sample)
        self.num_rows += 1
        if self._parked_bytes + self._buffer.nbytes >= self._shard_bytes:
            return self.rest()
        if self._buffer.num_rows >= PARK_ROWS:
            self._park()
        return None

    def extend(self, batch: Mapping[str, Any]) -> Iterator[Cut]:
        """Take N samples given as columns, in parts of about a shard; yield the shards they complete.

        Raises:
            SampleInvalid: They do not fit; the parts before the one that does not (``num_rows`` tells) are taken.
        """
        for part in _parts(batch, self._shard_bytes):
            self._park()
            self._buffer.extend(part)
            self.num_rows += self._buffer.num_rows
            yield from self._cut(self._buffer.finish())

    def rest(self) -> Cut | None:
        """Return the samples that are left as a last shard, or None if there are none."""
        self._park()
        if not self._parked:
            return None
        cut = Cut(tuple(self._parked), sum(piece.num_rows for piece in self._parked), self._parked_bytes)
        self._parked, self._parked_bytes = [], 0
        return cut

    def _park(self) -> None:
        if self._buffer.num_rows:
            self._parked_bytes += self._buffer.nbytes
            self._parked.append(self._buffer.finish())

    def _cut(self, columns: Columns) -> Iterator[Cut]:
        ends = row_sizes(columns).cumsum(0)
        lo, before = 0, 0
        while lo < columns.num_rows:
            last = int(torch.searchsorted(ends, self._shard_bytes - self._parked_bytes + before))
            hi = min(last + 1, columns.num_rows)
            end = int(ends[hi - 1])
            self._parked.append(columns if hi - lo == columns.num_rows else _rows(columns, lo, hi))
            self._parked_bytes += end - before
            lo, before = hi, end
            if self._parked_bytes >= self._shard_bytes and (cut := self.rest()) is not None:
                yield cut


def row_sizes(columns: Columns) -> torch.Tensor:
    """Return what each row counts, int64 ``(N,)``: about its bytes in a shard, and the same wherever it stands.

    A value counts its bytes; str, bytes and lists 8 more; a Python number 8 (complex: 16); None 8. That is what
    ``RowBuffer.nbytes`` adds up for samples that are appended.
    """
    sizes = torch.zeros(columns.num_rows, dtype=torch.int64)
    for field in columns.schema.fields:
        sizes += _sizes_of(field, columns.data[field.path], columns.num_rows)
    return sizes


def _sizes_of(field: Field, data: ColumnData, num_rows: int) -> torch.Tensor:
    if field.kind == "null":
        return torch.full((num_rows,), 8)
    if field.kind == "tensor":
        size = math.prod(field.item_shape) * field.torch_dtype.itemsize
        sizes = torch.full((num_rows,), size if field.python is None else max(8, size))
    else:
        sizes = data.part("offsets").diff() * (math.prod(field.item_shape) * field.torch_dtype.itemsize)
        if field.kind != "ragged":
            sizes += 8
    return torch.where(data.part("present"), sizes, 8) if field.optional else sizes


def _rows(columns: Columns, lo: int, hi: int) -> Columns:
    return LoadedShard(columns, "rows in memory").columns(lo=lo, hi=hi)


def _parts(batch: Mapping[str, Any], part_bytes: int) -> Iterator[Mapping[str, Any]]:
    """Yield *batch* in runs of rows of about *part_bytes*, so that a large one is not copied as a whole."""
    leaves = list(leaves_of(batch)[0].values())
    lengths = {_length(leaf) for leaf in leaves}
    num_rows = lengths.pop() if len(lengths) == 1 else -1
    if num_rows <= 0:
        yield batch  # nothing, or nothing that fits: the buffer says what is wrong
        return
    row_bytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, (torch.Tensor, np.ndarray))) // num_rows
    has_lists = any(not isinstance(leaf, (torch.Tensor, np.ndarray)) for leaf in leaves)
    step = max(1, part_bytes // max(1, row_bytes))
    if has_lists:
        step = min(step, PARK_ROWS)
    for lo in range(0, num_rows, step):
        yield batch if step >= num_rows else _slice(batch, lo, lo + step)


def _length(leaf: object) -> int:
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return len(leaf) if leaf.ndim else -1
    return len(leaf) if isinstance(leaf, Sequence) else -1


def _slice(node: Mapping[str, Any], lo: int, hi: int) -> dict[str, Any]:
    return {key: _slice(value, lo, hi) if isinstance(value, Mapping) else value[lo:hi] for key, value in node.items()}
