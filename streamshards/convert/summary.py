"""What a dataset is, as plain values: from its index alone, no shard is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from streamshards.convert.place import Place
from streamshards.options import RetryOptions
from streamshards.plan.index import Index
from streamshards.plan.order import Int64Array
from streamshards.shard.schema import Field, Schema


def summarize(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    retry: RetryOptions | None = None,
) -> dict[str, Any]:
    """Return what the index of the dataset at *url* says; see ``summary_of``.

    Raises:
        IndexInvalid: There is no dataset, or its index does not hold.
        StoreError: The store did not give it.
    """
    place = Place.at(url, storage_options, retry)
    return {"url": place.url, **summary_of(place.load_index())}


def summary_of(index: Index) -> dict[str, Any]:
    """Return JSON values: counts, sizes in bytes, how it was made, the schema's fields, and how large the shards are.

    ``ratio`` is bytes decoded by bytes stored. ``shard_sizes`` counts shards by their stored bytes, in powers of two:
    ``{"from_bytes": 1048576, "below_bytes": 2097152, "shards": 7}``, from the first bin that holds one to the last.
    """
    stored, raw = int(index.sizes.sum()), int(index.raw_sizes.sum())
    return {
        "num_samples": index.num_samples,
        "num_shards": index.num_shards,
        "stored_bytes": stored,
        "raw_bytes": raw,
        "ratio": round(raw / stored, 3) if stored else None,
        "layout": index.layout,
        "codec": index.codec,
        "created": index.created,
        "writer": index.writer,
        "fingerprint": index.fingerprint,
        "schema": [_describe(field) for field in Schema.from_json(index.schema).fields],
        "shard_rows": _spread(index.rows),
        "shard_bytes": _spread(index.sizes),
        "shard_sizes": _histogram(index.sizes),
    }


def _describe(field: Field) -> dict[str, Any]:
    return {"name": field.name, "type": field.describe(), **field.to_json()}


def _spread(values: Int64Array) -> dict[str, int] | None:
    if not len(values):
        return None
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _histogram(sizes: Int64Array) -> list[dict[str, int]]:
    if not len(sizes):
        return []
    # bit_length, exactly: a float's logarithm rounds up just below a power of two.
    powers = np.array([int(size).bit_length() for size in sizes])
    bins = np.bincount(powers)
    return [
        {"from_bytes": 1 << power >> 1, "below_bytes": 1 << power, "shards": int(bins[power])}
        for power in range(int(powers.min()), len(bins))
    ]
