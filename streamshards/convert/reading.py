"""Samples of a dataset in the order of its index, to look at; no thread, no shuffle, no more memory than a shard's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from streamshards.convert.place import Place
from streamshards.errors import OptionInvalid
from streamshards.options import MiB, RetryOptions, require_int
from streamshards.plan.index import Index
from streamshards.shard.columns import to_samples
from streamshards.shard.schema import Schema

_STEP_BYTES: Final = 16 * MiB
"""Samples are decoded about so many bytes at a time."""


def read_samples(
    url: str | os.PathLike[str],
    *,
    start: int = 0,
    limit: int | None = None,
    columns: Sequence[str] | None = None,
    trust_pickle: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    retry: RetryOptions | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return an iterator over ``(number, sample)``; the index is read and the arguments are checked before it starts.

    Args:
        url: Where the dataset is.
        start: The first sample's number; negative ones count from the end.
        limit: How many at most. None: all.
        columns: Names of the fields, as for ``StreamingDataset``. None: all.
        trust_pickle: Let foreign files run code when they are loaded.
        storage_options: For fsspec.
        retry: How long the store may fail.

    Raises:
        IndexInvalid: There is no dataset, or its index does not hold.
        OptionInvalid: There is no such sample or column.
        ShardCorrupt, ShardMissing: While iterating: a shard is bad.
        StoreError: The store failed or refused.
    """
    if limit is not None:
        require_int(limit, name="limit", minimum=0)
    place = Place.at(url, storage_options, retry)
    index = place.load_index()
    schema = Schema.from_json(index.schema)
    schema = schema if columns is None else schema.select(columns)
    lo = start + index.num_samples if start < 0 else start
    if not 0 <= lo <= max(0, index.num_samples - 1):
        raise OptionInvalid(f"start={start:,}: {place.url} has {index.num_samples:,} samples")
    hi = index.num_samples if limit is None else min(index.num_samples, lo + limit)
    return _read(place, index, schema, lo, hi, trust_pickle)


def _read(
    place: Place, index: Index, schema: Schema, lo: int, hi: int, trust_pickle: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    fetcher = place.fetcher(index, trust_pickle=trust_pickle)
    ends = np.cumsum(index.rows)
    while lo < hi:
        shard = int(ends.searchsorted(lo, "right"))
        reader = fetcher.fetch(shard)
        first = int(ends[shard]) - reader.num_rows
        step = max(1, _STEP_BYTES * reader.num_rows // max(1, reader.raw_bytes))
        for at in range(lo - first, min(hi - first, reader.num_rows), step):
            rows = reader.columns(schema, at, min(at + step, hi - first, reader.num_rows))
            yield from enumerate(to_samples(rows), start=first + at)
        lo = first + reader.num_rows
