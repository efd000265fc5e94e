"""Every shard re-hashed and decoded; and what lies at the url that the index does not name."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from streamshards.convert.place import Place, Progress
from streamshards.engine.verify import check_shards
from streamshards.errors import ShardMissing, StreamShardsError
from streamshards.options import RetryOptions, require_int
from streamshards.plan.index import Index
from streamshards.runtime import usable_cores
from streamshards.shard.schema import Schema


class BadShard(NamedTuple):
    """One shard that is not what the index promises."""

    name: str
    num_samples: int
    is_missing: bool
    cause: str


class Orphan(NamedTuple):
    """One object that the index does not name."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class Verified:
    """What ``verify`` found."""

    url: str
    index: Index
    bad: list[BadShard]
    """In the order of the index."""
    orphans: list[Orphan] | None
    """None if nobody asked."""


def verify(
    url: str | os.PathLike[str],
    *,
    threads: int | None = None,
    orphans: bool = False,
    trust_pickle: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    retry: RetryOptions | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Fetch, hash and decode every shard of the dataset at *url*; return what is wrong.

    Args:
        url: Where the dataset is.
        threads: Shards checked at once, 1 to 256; each needs memory for one. None: twice the cores, from 2 to 8.
        orphans: Also list the objects that the index does not name.
        trust_pickle: Let foreign files run code when they are loaded.
        storage_options: For fsspec.
        retry: How long the store may fail, and how often bad bytes are fetched again.
        progress: Told after each shard.

    Raises:
        IndexInvalid: There is no dataset, or its index does not hold.
        OptionInvalid: An argument cannot be what it is.
        StoreError: The store failed or refused; bad shards never raise.
    """
    threads = min(8, max(2, 2 * usable_cores(1))) if threads is None else threads
    require_int(threads, name="threads", minimum=1, maximum=256)
    place = Place.at(url, storage_options, retry)
    index = place.load_index()
    bad = _bad_shards(place, index, threads=threads, trust_pickle=trust_pickle, progress=progress)
    return Verified(place.url, index, bad, find_orphans(place, index) if orphans else None)


def _bad_shards(
    place: Place, index: Index, *, threads: int, trust_pickle: bool, progress: Progress | None
) -> list[BadShard]:
    place = replace(place, cancelled=threading.Event())  # the check sets it in the end
    fetcher = place.fetcher(index, trust_pickle=trust_pickle)
    schema = Schema.from_json(index.schema)
    found: list[tuple[int, StreamShardsError]] = []
    checks = check_shards(fetcher, index.num_shards, schema, threads=threads, cancelled=place.cancelled)
    with closing(checks):
        for done, check in enumerate(checks, start=1):
            if check.error is not None:
                found.append((check.shard, check.error))
            if progress is not None:
                progress(done, index.num_shards, index.names[check.shard])
    return [_bad(place, index, shard, error) for shard, error in sorted(found, key=lambda item: item[0])]


def _bad(place: Place, index: Index, shard: int, error: StreamShardsError) -> BadShard:
    name, is_missing = index.names[shard], isinstance(error, ShardMissing)
    cause = "the store does not have it" if is_missing else str(error).removeprefix(f"{place.url}/{name}: ")
    return BadShard(name, int(index.rows[shard]), is_missing, cause)


def find_orphans(place: Place, index: Index) -> list[Orphan]:
    """Return the objects below a dataset's url that are neither its index nor its shards, sorted by name.

    A writer that is at work right now has put shards that its index will name: they are among them.
    """
    named = {*index.names, *place.index_keys()}
    return [Orphan(name, size) for name, size in place.list() if name not in named]
