"""Random access: single samples, a shard at a time."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import numpy as np

from streamshards.engine.fetch import Fetcher
from streamshards.engine.ranges import Wanted
from streamshards.plan.subset import Subset
from streamshards.shard.reader import ShardReader
from streamshards.shard.schema import Schema

_KEPT_READERS: Final = 2
"""Shards kept open for ``ds[i]``: walking over neighbouring samples fetches each byte once."""


class RandomAccess:
    """Finds single samples, keeping the shards it used last open."""

    def __init__(self, fetcher: Fetcher, schema: Schema, subset: Subset) -> None:
        self._fetcher = fetcher
        self._schema = schema
        self._subset = subset
        self._borders = np.concatenate([[0], np.cumsum(subset.rows)])
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def find(self, number: int) -> tuple[ShardReader, int]:
        """Return the shard that holds sample *number* of the subset, and the row there."""
        part = int(self._borders.searchsorted(number, "right")) - 1
        shard = int(self._subset.shards[part])
        row = int(self._subset.rows_of(shard)[number - int(self._borders[part])])
        wanted = Wanted(self._schema, row, row + 1)
        kept = self._readers.pop(shard, None)
        fetcher = self._fetcher
        reader = fetcher.fetch(shard, wanted) if kept is None else fetcher.fetch_more(kept, shard, wanted)
        self._readers[shard] = reader
        if len(self._readers) > _KEPT_READERS:
            self._readers.popitem(last=False)
        return reader, row
