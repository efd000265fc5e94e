"""A source: one dataset as the engine reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from streamshards.engine.blocks import loaded_sizes
from streamshards.engine.fetch import Fetcher
from streamshards.events import Counters, Event
from streamshards.plan.index import Index
from streamshards.plan.order import Block, Int64Array
from streamshards.plan.subset import Subset
from streamshards.shard.schema import Schema


@dataclass(frozen=True, kw_only=True, slots=True)
class LossPolicy:
    """What a corrupt or missing shard leads to."""

    skip: bool
    """Refill its rows' places and go on; else raise its error."""
    max_rows: int
    """Rows this reader may lose in one epoch before it gives up."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is read of one dataset, and how."""

    index: Index
    subset: Subset
    """Which of its rows."""
    schema: Schema
    """The fields to read; each at or above the dataset's own."""
    fetcher: Fetcher
    policy: LossPolicy
    counters: Counters
    """Where its bytes, times and losses are counted."""
    emit: Callable[[Event], None]
    """Receives each event of it."""
    label_bytes: int = 0
    """What the labels of a row take in a block."""

    @cached_property
    def part_bytes(self) -> Int64Array:
        """What each shard of the subset takes while it is loaded, decoded and stored, int64 ``(parts,)``."""
        return self._loaded + self._stored

    def block_bytes(self, block: Block) -> tuple[int, int]:
        """Return the bytes of *block*'s rows in memory, and the stored bytes of its shards."""
        raw = stored = 0
        for piece in block.pieces:
            part = int(self.subset.shards.searchsorted(piece.shard))
            raw += -(-int(self._loaded[part]) * piece.num_rows // int(self.subset.rows[part]))
            stored += int(self._stored[part])
        return raw, stored

    @cached_property
    def _loaded(self) -> Int64Array:
        """What the rows of each part take in blocks: those of whole spans, where single rows are drawn."""
        sizes = (loaded_sizes(self.index, self.schema) + self.index.rows * self.label_bytes)[self.subset.shards]
        if not self.subset.cuts:
            return sizes
        rows = self.index.rows[self.subset.shards]
        decoded = np.minimum(rows, self.subset.decoded_rows)
        return np.asarray(np.ceil(sizes * (decoded / np.maximum(rows, 1))), dtype=np.int64)

    @cached_property
    def _stored(self) -> Int64Array:
        return self.index.sizes[self.subset.shards]
