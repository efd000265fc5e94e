"""One shard: from the store to verified, readable bytes, or a typed failure. The policy of docs/guarantees.md.

====================================  ===========  ==================================================================
what happened                         class        what we do
====================================  ===========  ==================================================================
timeout, reset, 429, 5xx, DNS         transient    the whole object again, until ``deadline_s``; never skipped
wrong length, digest or structure     corrupt      fetched anew, ``corrupt_attempts`` times in all; then ShardCorrupt
no such object                        missing      looked for once more after a second; then ShardMissing
401, 403, expired token               denied       AccessDenied at once (expired: credentials are read anew once)
bad, and no longer in the index       replaced     DatasetReplaced at once; never skipped
missing, and so is the index          gone         StoreError at once; never skipped
====================================  ===========  ==================================================================

Of a shard of which only some rows or fields are wanted, a part is fetched where that pays (``engine/ranges.py``);
what is wrong with a part is settled by the whole.
With ``hedge_s``: a shard that takes longer is asked for a second time, within the budget of ``engine/retry.py``.
With a node cache: a shard that is there, and is right, is not fetched; one that is fetched is put there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from streamshards.clock import Clock
from streamshards.engine.cache import NodeCache
from streamshards.engine.cachefolder import Identity
from streamshards.engine.catalog import INDEX_KEY, Catalog
from streamshards.engine.eviction import Pass
from streamshards.engine.ranges import PartFetcher, Wanted, is_hopeless
from streamshards.engine.retry import Cancelled, circuit_of, with_retries
from streamshards.errors import (
    DatasetReplaced,
    IndexInvalid,
    ObjectMissing,
    ObjectTooLarge,
    SampleInvalid,
    ShardCorrupt,
    ShardMissing,
    StoreError,
    StreamShardsError,
)
from streamshards.events import Counters, Event, FetchHedged, FetchRetried
from streamshards.options import RetryOptions
from streamshards.plan.index import Index
from streamshards.shard.frames import FrameReader
from streamshards.shard.layouts import columns_of, load_foreign
from streamshards.shard.payload import FramedShard, PayloadShard, describe_tail, digest_of
from streamshards.shard.raw import BackedPayload, RawFile
from streamshards.shard.reader import LoadedShard, ShardReader
from streamshards.shard.schema import Schema
from streamshards.storage.store import Blob, Hedge, Patience, Store

_MISSING_RECHECK_S: Final = 1.0
"""A store that lists before it serves catches up within this; a shard that is really gone costs one second."""
_MAX_REFUSALS: Final = 4
"""A store that refused so many ranges does not serve them: no more are asked for."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How the fetch of a shard goes, as ``ReadSlow`` tells it."""

    attempt: int = 0
    """The last request that was made, from 1; 0: none yet."""
    doing: str = ""
    """What is happening now."""
    cause: str = ""
    """Why the last failed attempt failed; empty if none did."""


@dataclass(slots=True)
class _Fetch:
    """A fetch under way. One thread writes it; who reads it may see a mixture of two moments, which is good enough."""

    attempt: int = 0
    asked_at_s: float | None = None
    """Since when an answer is waited for."""
    not_before_s: float = 0.0
    """Until when the next attempt waits."""
    has_arrived: bool = False
    is_hedged: bool = False
    """Whether it has had its one second request."""
    cause: str = ""

    def describe(self, now_s: float) -> str:
        if self.asked_at_s is not None:
            return f"asked {now_s - self.asked_at_s:.0f} s ago"
        if self.has_arrived:
            return "being verified"
        if self.not_before_s > now_s:
            return f"next in {self.not_before_s - now_s:.0f} s"
        return "waiting for the store to answer others"


class Fetcher:
    """Fetches shards of one dataset, on any number of threads.

    Args:
        store: Where the shards are.
        index: What they must be.
        schema: The dataset's schema; foreign files are read into it.
        retry: How long to try.
        clock: Time.
        cancelled: Set by the owner to stop every wait at once.
        counters: Where bytes and times are counted.
        emit: Receives each event.
        trust_pickle: Allow foreign ``.pt`` files to run code.
        cache: Shards on this machine's disk.
        reader: Who fetches; says what may go from the cache for a new shard.
    """

    def __init__(
        self,
        store: Store,
        index: Index,
        schema: Schema,
        *,
        retry: RetryOptions,
        clock: Clock,
        cancelled: threading.Event,
        counters: Counters,
        emit: Callable[[Event], None],
        trust_pickle: bool = False,
        cache: NodeCache | None = None,
        reader: Pass | None = None,
    ) -> None:
        self._store = store
        self._index = index
        self._schema = schema
        self._retry = retry
        self._clock = clock
        self._cancelled = cancelled
        self._counters = counters
        self._emit = emit
        self._trust_pickle = trust_pickle
        self._circuit = circuit_of(store, clock)
        self._cache = cache
        self._reader = Pass() if reader is None else reader
        self._under_way: dict[int, _Fetch] = {}
        self._parts = self._part_fetcher() if cache is None else None
        self._refusals = 0
        # Not the errors themselves: their tracebacks would keep the shards' bytes.
        self._bad: dict[int, tuple[type[ShardCorrupt | ShardMissing], str]] = {}

    def url_of(self, shard: int) -> str:
        """Return the url of shard number *shard*, for messages."""
        return f"{self._store.url}/{self._index.names[shard]}"

    def fetch(self, shard: int, wanted: Wanted | None = None) -> ShardReader:
        """Return shard number *shard*, its bytes verified against the index.

        Args:
            shard: Its number.
            wanted: What will be read of it, or ``load`` be called for; None: anything.

        Raises:
            ShardCorrupt: Its bytes are not what the index promises, after ``corrupt_attempts`` fetches.
            ShardMissing: The store does not have it.
            StoreUnavailable: The store failed for ``deadline_s``.
            AccessDenied: The store refused us.
            DatasetReplaced: It is corrupt or missing because another dataset has taken the place of this one.
            StoreError: It is missing, and so is the index: the dataset was deleted.
            Cancelled: The owner gave up.
        """
        return self._settled(shard, lambda: self._fetch_anyhow(shard, wanted))

    def fetch_more(self, reader: ShardReader, shard: int, wanted: Wanted) -> ShardReader:
        """Return *reader*, which is shard number *shard*, with what is *wanted* loaded, too; the whole if that fails.

        Raises: As ``fetch``.
        """
        more = self._in_part(shard, lambda: _loaded(reader, wanted))
        return self.fetch(shard) if more is None else more

    def require_tail(self, shard: int, reader: ShardReader) -> None:
        """Check what the index says about the tail of a whole shard: nobody who reads all of it needs that.

        Raises:
            ShardCorrupt: It is something else.
        """
        promised = tuple(self._index.tails[shard].tolist())
        if isinstance(reader, FramedShard) and promised[0] and describe_tail(reader.frames.tail()) != promised:
            raise ShardCorrupt(
                f"{self.url_of(shard)}: sound, but the index is wrong about its last bytes, and every read of a part "
                f'fails first; run "streamshards index --mode replace {self._store.url}"'
            )

    def _settled(self, shard: int, fetch: Callable[[], ShardReader]) -> ShardReader:
        """Return what *fetch* returns; if it loses the shard, note that, and raise what is behind it."""
        known = self._bad.get(shard)
        if known is not None:
            kind, text = known
            raise kind(text)
        try:
            return fetch()
        except (ShardCorrupt, ShardMissing) as error:
            lost = error
        # After the handler: an error inside it would have this one, and so the shard's bytes, as its context.
        try:
            changed = self._change_behind(shard, is_missing=isinstance(lost, ShardMissing))
            if changed is not None:
                raise type(changed)(f"{changed} ({lost})") from lost
            self._bad[shard] = (type(lost), str(lost))
            raise lost
        finally:
            del lost

    def progress(self, shard: int) -> Progress | None:
        """Return how the fetch of shard number *shard* from the store goes; None if there is none."""
        fetch = self._under_way.get(shard)
        return None if fetch is None else Progress(fetch.attempt, fetch.describe(self._clock.now()), fetch.cause)

    def _change_behind(self, shard: int, *, is_missing: bool) -> StreamShardsError | None:
        """Return what to raise if the index in the store no longer has this shard, or is no longer there at all.

        Then others are gone, too. Looks at the first loss and each time their number has doubled: a large index is not
        read for each of many. Is not given the loss itself: a frame that outlives the look would keep its bytes.
        """
        losses = len(self._bad) + 1
        if losses & (losses - 1):
            return None
        options = self._retry
        catalog = Catalog(self._store, options, options.first_contact_s, self._clock, self._cancelled, self._emit)
        try:
            found = catalog.find()
        except (IndexInvalid, StoreError):
            return None  # then nothing is known but that the shard is bad
        url = self.url_of(shard)
        if found is None:
            if not is_missing:
                return None
            return StoreError(
                f"{url}: the dataset is gone: {INDEX_KEY} is no longer there, nor is this shard; somebody deleted "
                f"{self._store.url} while it was read; put it back, and resume"
            )
        if found.index.fingerprint == self._index.fingerprint:
            return None
        name, now = self._index.names[shard], found.index
        if name in now.names and now.digests[now.names.index(name)] == self._index.digests[shard]:
            return None  # appended to
        return DatasetReplaced(
            f"{url}: the dataset was replaced while it was read: opened with fingerprint "
            f"{self._index.fingerprint}, now {now.fingerprint} with {now.num_samples:,} samples; open it anew, at the "
            "beginning of an epoch"
        )

    def _part_fetcher(self) -> PartFetcher | None:
        if getattr(self._store, "get_range", None) is None:
            return None
        return PartFetcher(
            self._index, self._schema, url_of=self.url_of, get=self._get_range, whole=self._whole_instead
        )

    def _fetch_anyhow(self, shard: int, wanted: Wanted | None) -> ShardReader:
        if self._cache is not None:
            return self._fetch_through(self._cache, shard)
        part = None if wanted is None else self._fetch_part(shard, wanted)
        return self._fetch(shard) if part is None else part

    def _fetch_part(self, shard: int, wanted: Wanted) -> ShardReader | None:
        """Return the shard with what is *wanted* loaded; None if it must be read whole."""
        parts = self._parts
        if parts is None:
            return None
        reader = self._in_part(shard, lambda: parts.fetch(shard, wanted))
        self._counters.add(shards_read=int(reader is not None))
        return reader

    def _in_part(self, shard: int, fetch: Callable[[], ShardReader | None]) -> ShardReader | None:
        """Return what *fetch* returns; None if the shard had better be asked for whole, which is told."""
        self._under_way[shard] = _Fetch()
        try:
            return fetch()
        except (ShardCorrupt, StoreError) as error:
            if is_hopeless(error):
                raise
            self._tell_whole(shard, error)
            if isinstance(error, StoreError) and not isinstance(error, ObjectMissing):
                self._refusals += 1
                if self._refusals >= _MAX_REFUSALS:
                    self._parts = None
            return None
        finally:
            self._under_way.pop(shard, None)

    def _whole_instead(self, shard: int, cause: ShardCorrupt) -> FrameReader:
        self._tell_whole(shard, cause)
        return self._from_store(shard)

    def _tell_whole(self, shard: int, cause: Exception) -> None:
        self._emit(FetchRetried(self.url_of(shard), 1, 0.0, f"{cause}; now the whole shard is asked for"))

    def _from_store(self, shard: int) -> FrameReader:
        """Return the whole shard, after what we had of it failed while it was read."""
        reader = self._settled(shard, lambda: self._fetch(shard))
        assert isinstance(reader, FramedShard)  # for mypy: that is its layout
        return reader.frames

    def _get_range(self, shard: int, start: int, stop: int) -> Blob:
        started = self._clock.now()
        try:
            data = self._with_retries(shard, lambda patience: self._ask(shard, patience, (start, stop)))
        finally:
            self._counters.add(fetch_ns=int((self._clock.now() - started) * 1e9))
        self._counters.add(bytes_read=len(data))
        return data

    def _fetch_through(self, cache: NodeCache, shard: int) -> ShardReader:
        found = self._find(cache, shard)
        self._counters.add(cache_hits=int(found is not None), cache_misses=int(found is None))
        return self._fetch(shard, cache) if found is None else found

    def _find(self, cache: NodeCache, shard: int) -> ShardReader | None:
        """Return the shard as the cache has it, verified; None if it has not, or not what the index promises."""
        url, digest = self.url_of(shard), self._index.digests[shard]
        try:
            if cache.kind_of(self._index) == "raw":
                raw_bytes = int(self._index.raw_sizes[shard])
                raw = cache.find_raw(digest, url=url, max_raw_bytes=raw_bytes, emit=self._emit)
                return None if raw is None else self._open_raw(cache, shard, *raw)
            data = cache.find_object(digest, url=url, nbytes=int(self._index.sizes[shard]), emit=self._emit)
            return None if data is None else self._read(shard, data)
        except ShardCorrupt:  # the bytes are what the digest says: then so are the store's, and its error is the one
            return None

    def _keep(self, cache: NodeCache, shard: int, data: Blob, reader: ShardReader) -> ShardReader:
        """Put a shard that came from the store into the cache, if that is possible; return it, open."""
        digest = self._index.digests[shard]
        if cache.kind_of(self._index) == "object":
            cache.keep_object(digest, data, reader=self._reader, counters=self._counters, emit=self._emit)
            return reader
        assert isinstance(reader, FramedShard)  # for mypy: that is its layout
        started = self._clock.now()
        raw = cache.keep_raw(digest, reader.frames, reader=self._reader, counters=self._counters, emit=self._emit)
        if raw is None:
            return reader
        self._counters.add(decode_ns=int((self._clock.now() - started) * 1e9), bytes_decoded=reader.raw_bytes)
        return self._open_raw(cache, shard, *raw)

    def _open_raw(self, cache: NodeCache, shard: int, file: RawFile, identity: Identity) -> ShardReader:
        url, digest = self.url_of(shard), self._index.digests[shard]

        def from_store(cause: ShardCorrupt) -> FrameReader:
            cache.drop_raw(digest, identity, url=url, cause=cause, emit=self._emit)
            return self._from_store(shard)

        reader = PayloadShard(BackedPayload(file, from_store), name=url, is_decoded=True)
        self._require_rows(shard, reader)
        return reader

    def _fetch(self, shard: int, cache: NodeCache | None = None) -> ShardReader:
        self._under_way[shard] = _Fetch()
        try:
            return self._fetch_until_right(shard, cache)
        finally:
            self._under_way.pop(shard, None)

    def _fetch_until_right(self, shard: int, cache: NodeCache | None) -> ShardReader:
        attempt = 1
        while True:
            try:
                return self._fetch_once(shard, cache)
            except ShardCorrupt as error:
                if attempt >= self._retry.corrupt_attempts:
                    raise
                cause = str(error)
            # After the handler, when neither the error nor its traceback keeps the wrong bytes any more.
            wait_s = self._clock.jitter(self._retry.base_s)
            self._tell_retry(shard, FetchRetried(self.url_of(shard), attempt, wait_s, cause))
            if self._clock.wait(self._cancelled, wait_s):
                raise Cancelled
            attempt += 1

    def _fetch_once(self, shard: int, cache: NodeCache | None) -> ShardReader:
        data = self._get(shard)
        reader = self._open(shard, data)
        return reader if cache is None else self._keep(cache, shard, data, reader)

    def _get(self, shard: int) -> Blob:
        started = self._clock.now()
        try:
            data = self._get_once_more_if_missing(shard)
        finally:
            self._counters.add(fetch_ns=int((self._clock.now() - started) * 1e9))
        self._counters.add(shards_read=1, bytes_read=len(data))
        return data

    def _get_once_more_if_missing(self, shard: int) -> Blob:
        try:
            return self._get_with_retries(shard)
        except ObjectMissing as error:
            self._tell_retry(shard, FetchRetried(self.url_of(shard), 1, _MISSING_RECHECK_S, str(error)))
        if self._clock.wait(self._cancelled, _MISSING_RECHECK_S):
            raise Cancelled
        try:
            return self._get_with_retries(shard)
        except ObjectMissing as error:
            raise ShardMissing(
                f"{self.url_of(shard)}: the index names this shard, the store does not have it; "
                f'run "streamshards verify {self._store.url}" to list all such shards'
            ) from error

    def _get_with_retries(self, shard: int) -> Blob:
        promised = int(self._index.sizes[shard])
        try:
            return self._with_retries(shard, lambda patience: self._ask(shard, patience))
        except ObjectTooLarge as error:
            raise ShardCorrupt(f"{self.url_of(shard)}: {promised:,} bytes promised by the index; {error}") from error

    def _with_retries(self, shard: int, ask: Callable[[Patience], Blob]) -> Blob:
        self._circuit.read()
        return with_retries(
            ask,
            what=self.url_of(shard),
            options=self._retry,
            deadline_s=self._retry.deadline_s,
            clock=self._clock,
            cancelled=self._cancelled,
            on_retry=lambda event: self._tell_retry(shard, event),
            circuit=self._circuit,
        )

    def _ask(self, shard: int, patience: Patience, span: tuple[int, int] | None = None) -> Blob:
        """Make one attempt, which may be two requests, for a whole shard or the bytes of *span*."""
        fetch = self._fetch_of(shard)
        fetch.attempt += 1
        fetch.asked_at_s = self._clock.now()
        after_s = self._retry.hedge_s
        hedge = None if after_s is None or fetch.is_hedged else Hedge(after_s, self._circuit.may_hedge)
        name, promised = self._index.names[shard], int(self._index.sizes[shard])
        try:
            if span is None:
                data = self._store.get(name, timeout_s=patience.hedged(hedge), max_bytes=promised)
            else:
                data = self._store.get_range(name, *span, timeout_s=patience.hedged(hedge))
            fetch.has_arrived = True
            return data
        finally:
            fetch.asked_at_s = None
            if hedge is not None and hedge.is_asked:
                fetch.is_hedged = True
                self._emit(FetchHedged(self.url_of(shard), hedge.after_s, hedge.is_won))

    def _tell_retry(self, shard: int, event: FetchRetried) -> None:
        fetch = self._fetch_of(shard)
        fetch.has_arrived = False
        fetch.not_before_s = self._clock.now() + event.wait_s
        fetch.cause = event.cause.removeprefix(f"{event.url}: ")
        self._emit(event)

    def _fetch_of(self, shard: int) -> _Fetch:
        """Return what is noted of the fetch of *shard*; two threads that fetch one shard at once share it."""
        return self._under_way.setdefault(shard, _Fetch())

    def _open(self, shard: int, data: Blob) -> ShardReader:
        url, promised = self.url_of(shard), int(self._index.sizes[shard])
        if len(data) != promised:
            raise ShardCorrupt(f"{url}: {promised:,} bytes promised by the index, {len(data):,} received")
        digest = digest_of(data)
        if digest != self._index.digests[shard]:
            raise ShardCorrupt(f"{url}: digest {digest}, the index promises {self._index.digests[shard]}")
        return self._read(shard, data)

    def _read(self, shard: int, data: Blob) -> ShardReader:
        url = self.url_of(shard)
        raw_bytes = int(self._index.raw_sizes[shard])
        reader: ShardReader
        if self._index.layout == "shard":
            reader = FramedShard(data, name=url, max_raw_bytes=raw_bytes)
        else:
            reader = self._open_foreign(url, data, raw_bytes)
        self._require_rows(shard, reader)
        return reader

    def _require_rows(self, shard: int, reader: ShardReader) -> None:
        rows = int(self._index.rows[shard])
        if reader.num_rows != rows:
            url = self.url_of(shard)
            raise ShardCorrupt(f"{url}: {rows:,} rows promised by the index, {reader.num_rows:,} found")

    def _open_foreign(self, url: str, data: Blob, raw_bytes: int) -> ShardReader:
        payload = load_foreign(data, name=url, max_raw_bytes=raw_bytes, trust_pickle=self._trust_pickle)
        try:
            _, columns = columns_of(payload, layout=self._index.layout, schema=self._schema)
        except SampleInvalid as error:
            raise ShardCorrupt(f"{url}: not what the index was made from: {error}") from error
        return LoadedShard(columns, url)


def _loaded(reader: ShardReader, wanted: Wanted) -> ShardReader:
    reader.load(*wanted)
    return reader
