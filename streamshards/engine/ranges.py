"""Reading shards in part: only the frames that some rows of some fields need, where that is worth more requests.

A shard is asked for its tail first, which is checked against the index, then for ranges of frames, whose checksums the
tail has. Whether that pays is reckoned before: from the rows, and from what the same fields took of the shard before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from streamshards.errors import AccessDenied, ShardCorrupt, StoreError, StoreUnavailable
from streamshards.options import MiB
from streamshards.plan.index import Index
from streamshards.shard.frames import FrameReader
from streamshards.shard.partial import PartialShard
from streamshards.shard.payload import describe_tail
from streamshards.shard.schema import Schema
from streamshards.storage.store import Blob

SMALL_BYTES: Final = MiB
"""A shard that is smaller is read whole: the requests would take longer than its bytes."""
WORTH: Final = 0.5
"""A part is read if it is at most this much of the shard: it takes two requests or more, one after the other."""


class Wanted(NamedTuple):
    """What will be read of a shard: rows lo..hi of the fields of *schema*."""

    schema: Schema
    lo: int
    hi: int


class PartFetcher:
    """Fetches parts of shards of one dataset, on any number of threads.

    Args:
        index: What the shards must be.
        schema: All fields of the dataset.
        url_of: Names a shard, for messages.
        get: Returns stored bytes of a shard, from and to.
        whole: Returns a whole shard, after a part turned out to be damaged: its number, and what was wrong.
    """

    def __init__(
        self,
        index: Index,
        schema: Schema,
        *,
        url_of: Callable[[int], str],
        get: Callable[[int, int, int], Blob],
        whole: Callable[[int, ShardCorrupt], FrameReader],
    ) -> None:
        self._index = index
        self._num_fields = len(schema.fields)
        self._url_of = url_of
        self._get = get
        self._whole = whole
        self._share: dict[tuple[object, ...], float] = {}

    def fetch(self, shard: int, wanted: Wanted) -> PartialShard | None:
        """Return the shard with what is *wanted* loaded; None if it had better be read whole.

        Raises:
            ShardCorrupt: What came is not right; the whole may be.
            StoreError: As for a whole shard; also where a store cannot serve ranges.
        """
        if not self._is_promising(shard, wanted):
            return None
        reader = self._open(shard)
        stored = int(self._index.sizes[shard])
        self._share[_fields_of(wanted)] = reader.cost(wanted.schema, 0, reader.num_rows) / stored
        if reader.cost(*wanted) > WORTH * stored:
            return None
        reader.load(*wanted)
        return reader

    def _is_promising(self, shard: int, wanted: Wanted) -> bool:
        stored, rows = int(self._index.sizes[shard]), int(self._index.rows[shard])
        if self._index.layout != "shard" or not self._index.tails[shard, 0] or stored < SMALL_BYTES:
            return False
        is_all = len(wanted.schema.fields) >= self._num_fields
        share = 1.0 if is_all else self._share.get(_fields_of(wanted), 0.0)
        return share * (wanted.hi - wanted.lo) <= WORTH * rows

    def _open(self, shard: int) -> PartialShard:
        url, stored = self._url_of(shard), int(self._index.sizes[shard])
        size, check = self._index.tails[shard].tolist()
        tail = self._get(shard, stored - size, stored)
        if describe_tail(tail) != (size, check):
            raise ShardCorrupt(f"{url}: its last {size:,} bytes are not those that the index promises")
        raw_bytes = int(self._index.raw_sizes[shard])
        frames = FrameReader(tail, name=url, max_raw_bytes=raw_bytes, stored_bytes=stored)
        reader = PartialShard(
            frames,
            get=lambda start, stop: self._get(shard, start, stop),
            on_damage=lambda cause: self._whole(shard, cause),
        )
        if reader.num_rows != self._index.rows[shard]:
            raise ShardCorrupt(
                f"{url}: {self._index.rows[shard]:,} rows promised by the index, {reader.num_rows:,} found"
            )
        return reader


def is_hopeless(error: ShardCorrupt | StoreError) -> bool:
    """Return whether a part that failed so had better not be asked for as a whole."""
    return isinstance(error, (AccessDenied, StoreUnavailable))


def _fields_of(wanted: Wanted) -> tuple[object, ...]:
    return tuple(field.path for field in wanted.schema.fields)
