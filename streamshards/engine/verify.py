"""Checks every shard of a dataset, on a few threads: fetched, hashed, decoded to the last field."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from streamshards.engine.fetch import Fetcher
from streamshards.engine.retry import Cancelled
from streamshards.errors import ShardCorrupt, ShardMissing
from streamshards.shard.reader import ShardReader
from streamshards.shard.samples import rows_of
from streamshards.shard.schema import Schema

STOP_S: Final = 2.0
"""A request that is under way when the check is called off gets this long to end; then nobody waits for it."""


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """What came out for one shard."""

    shard: int
    error: ShardCorrupt | ShardMissing | None
    """What is wrong with it; None if nothing is."""


def check_shards(
    fetcher: Fetcher, num_shards: int, schema: Schema, *, threads: int, cancelled: threading.Event
) -> Generator[ShardCheck, None, None]:
    """Yield one check for each of *num_shards* shards, in the order in which they are done.

    Args:
        fetcher: Compares each shard's length and digest with the index.
        num_shards: Of the dataset.
        schema: Every field of it is decoded from every shard, one field in memory at a time per thread.
        threads: How many shards are checked at once; each holds one shard's stored bytes and one decoded field.
        cancelled: The fetcher's; set when the generator ends, for whatever reason, and never cleared.

    Raises:
        StoreUnavailable: The store failed for the fetcher's deadline.
        AccessDenied: The store refused us.

    Guarantees: closing the generator ends the threads.
    """
    numbers = itertools.count()  # next() on it is atomic
    results: queue.SimpleQueue[ShardCheck | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            while not cancelled.is_set() and (shard := next(numbers)) < num_shards:
                results.put(_check(fetcher, shard, schema))
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer must hear of it
            results.put(error)

    workers = [
        threading.Thread(target=work, name=f"streamshards-verify-{number}", daemon=True)
        for number in range(min(threads, num_shards))
    ]
    for worker in workers:
        worker.start()
    try:
        for _ in range(num_shards):
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        cancelled.set()
        for worker in workers:
            worker.join(STOP_S)


def _check(fetcher: Fetcher, shard: int, schema: Schema) -> ShardCheck:
    try:
        reader = fetcher.fetch(shard)
        fetcher.require_tail(shard, reader)
        _decode(reader, schema)
    except (ShardCorrupt, ShardMissing) as error:
        return ShardCheck(shard, error)
    return ShardCheck(shard, None)


def _decode(reader: ShardReader, schema: Schema) -> None:
    """Decode every row of every field.

    Raises:
        ShardCorrupt: Something does not decode, or does not fit the dataset's schema.
    """
    for field in schema.fields:
        columns = reader.columns(Schema((field,)))
        if field.kind in ("str", "json"):
            try:
                rows_of(field, columns.data[field.path], columns.num_rows)
            except ShardCorrupt as error:
                raise ShardCorrupt(f"{reader.name}: {error}") from error
