"""Writing a dataset: samples in, shards out in the background, and one atomic commit at the end."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, Final, Literal, get_args

import numpy as np
import torch

from streamshards.clock import Clock, SystemClock, utc_timestamp
from streamshards.engine.catalog import Catalog
from streamshards.engine.packing import Packer, StoredShard, remove
from streamshards.errors import IndexInvalid, OptionInvalid, SampleInvalid, StreamShardsError
from streamshards.events import COUNTERS, Counters, FetchRetried, Observer, emit, logger
from streamshards.options import MiB, RetryOptions, parse_bytes, require_int
from streamshards.plan.index import Index
from streamshards.runtime import usable_cores
from streamshards.shard.cutter import Cut, ShardCutter
from streamshards.shard.schema import Schema
from streamshards.storage import Store, open_store

Mode = Literal["error", "append", "replace"]

_STORED_LEVEL: Final = -131_072
"""The lowest level zstd has: it looks for next to nothing and copies at 4 GB/s; what does not shrink is stored raw."""
_LAYOUT: Final = "shard"
_REMOVE_S: Final = 30.0
"""Removing what nobody needs any longer may take this long; what is left then is only logged."""


@dataclass(frozen=True, slots=True)
class WriteProgress:
    """What a writer has stored so far."""

    samples: int
    shards: int
    raw_bytes: int
    """Uncompressed."""
    stored_bytes: int
    """In the store."""


class ShardWriter:
    """Writes a dataset; a context manager.

    ::

        with ShardWriter("s3://bucket/train") as out:
            for image, label in images:
                out.write({"image": image, "label": label})

    A clean exit waits until every shard is stored and then commits the index in one atomic put: until that instant
    readers see the old dataset, or none. After an exception (Ctrl-C too) nothing is committed, and the shards stored so
    far are removed as far as possible; a killed process leaves orphaned shards that no index names.
    A clean exit without any sample makes an empty dataset (an append changes nothing).

    Args:
        url: A path, ``s3://bucket/prefix`` or any fsspec url.
        shard_bytes: A shard ends with the sample that brings it to this many *uncompressed* bytes. Uncompressed,
            because that bounds what a reader needs in memory, and makes the borders a function of the samples alone.
            32 MiB, because it compresses to the 8-32 MiB where S3 clients are fastest and where one request a shard
            costs next to nothing, while a reader can still hold dozens of shards at once to shuffle among.
        compression: ``"auto"`` chooses for each column, by a sample of its bytes in each shard: stored as it is if it
            would not shrink by a tenth, else zstd at level 1, or at 3 where that saves another eighth. ``"zstd:N"``: N
            from -7 (fast) to 22 (small) without 0 for all; what level 1 made is decoded fastest.
            ``"none"`` makes no effort: valid zstd frames that hold the bytes as they are (but for long runs of equal
            bytes), written and read at nearly the speed of a copy.
        mode: What to do if there is a dataset. ``"error"``: refuse, here and not after hours. ``"append"``: add to it;
            its fields and their types are binding, sizes may come to vary. ``"replace"``: take its place, then delete
            its shards; a reader that still has the old index open gets ``ShardMissing``. Foreign files that an index
            made in place names are never deleted.
        threads: That compress and store, a shard each. None: twice the cores, from 4 to 16.
        max_pending_bytes: ``write`` blocks while shards of more uncompressed bytes are under way (one always may be).
            A shard takes up to three times its size while a thread compresses it, and the one that is being filled
            comes on top.
        storage_options: As for ``StreamingDataset``.
        retry: How long the store may fail.
        progress: Called after each stored shard, one call at a time, on a background thread. What it raises stops the
            writer.
        observer: Receives ``FetchRetried`` events, on the thread where they happen.
        store: Instead of opening *url*; *url* is then only for messages.

    Raises:
        OptionInvalid: An argument cannot be what it is, or there is a dataset and the mode is ``"error"``.
        IndexInvalid: There is an index that cannot be read (``"replace"`` does not mind).
        StoreError: The store did not answer, or refuses us.

    Not for several threads at once. Several writers may write to one place: shards never clash, but of those that
    overlap only one commits, and the others raise ``ObjectExists``.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        shard_bytes: int | str = 32 * MiB,
        compression: str = "auto",
        mode: Mode = "error",
        threads: int | None = None,
        max_pending_bytes: int | str = 512 * MiB,
        storage_options: Mapping[str, Any] | None = None,
        retry: RetryOptions | None = None,
        progress: Callable[[WriteProgress], None] | None = None,
        observer: Observer | None = None,
        store: Store | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise OptionInvalid(f'mode={mode!r} must be "error", "append" or "replace"')
        self._mode = mode
        self._compression = compression
        self._progress = progress
        self._observer = observer
        self._counters = Counters(torch.zeros(len(COUNTERS), dtype=torch.int64))
        self._clock: Clock = SystemClock()
        self._retry = retry or RetryOptions()
        shard_bytes = parse_bytes(shard_bytes, name="shard_bytes")
        pending_bytes = parse_bytes(max_pending_bytes, name="max_pending_bytes")
        level = parse_compression(compression)
        num_threads = min(16, max(4, 2 * usable_cores(1))) if threads is None else threads
        require_int(num_threads, name="threads", minimum=1, maximum=256)
        self._store = open_store(url, storage_options) if store is None else store
        self._base = self._look(mode)
        schema = None if self._base is None or mode == "replace" else Schema.from_json(self._base.schema)
        self._cutter = ShardCutter(shard_bytes, schema)
        self._packer = Packer(
            self._store,
            level=level,
            num_threads=num_threads,
            max_pending_bytes=pending_bytes,
            retry=self._retry,
            clock=self._clock,
            on_retry=self._on_retry,
            on_stored=self._on_stored,
        )
        # Not from the clock's chance: jitter may repeat after a fork, a name must not.
        self._writer_id = secrets.token_hex(6)
        self._num_cut = 0
        self._done = WriteProgress(0, 0, 0, 0)
        self._state: Literal["new", "open", "failed", "committed", "abandoned"] = "new"
        self._is_commit_begun = False
        self._index: Index | None = None

    def __repr__(self) -> str:
        done = self._done
        return (
            f"<ShardWriter {self._store.url}: {self._state}, mode={self._mode!r}, {self._cutter.num_rows:,} samples "
            f"written, {done.samples:,} of them stored in {done.shards:,} shards, {done.stored_bytes:,} bytes>"
        )

    @property
    def url(self) -> str:
        """Where the dataset is, without credentials."""
        return self._store.url

    @property
    def index(self) -> Index:
        """The index that was committed.

        Raises:
            OptionInvalid: None was, or not yet.
        """
        if self._index is None:
            raise OptionInvalid(f"{self!r} has no index: it is committed when the with block ends without an exception")
        return self._index

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add one sample: a dict of tensors, arrays, numbers, str, bytes, lists and dicts of those; copied.

        Raises:
            SampleInvalid: It does not fit; the text says which sample of this writer, which field, what stands and what
                came. It was not added, and the writer may be used on.
            StreamShardsError: A shard could not be stored; nothing will be committed.
        """
        self._require_open()
        cut = self._cutter.append(sample)
        if cut is not None:
            self._submit(cut)

    def write_batch(self, columns: Mapping[str, Any]) -> None:
        """Add N samples at once; the shards are the same as from N calls of ``write``.

        Args:
            columns: Per field a tensor or array ``(N, …)`` or a list of N values; nested dicts as in a sample. What a
                ``StreamingDataset`` with a ``batch_size`` yields fits.

        Raises:
            SampleInvalid: They do not fit, or differ in length. A batch of at most a shard was not added, and the
                writer may be used on; a larger one is taken in parts, and when a later part fails nothing will be
                committed.
            StreamShardsError: A shard could not be stored; nothing will be committed.
        """
        self._require_open()
        before = self._cutter.num_rows
        try:
            for cut in self._cutter.extend(columns):
                self._submit(cut)
        except SampleInvalid:
            if self._cutter.num_rows != before:
                self._state = "failed"
            raise

    def __enter__(self) -> ShardWriter:
        if self._state != "new":
            raise OptionInvalid(f"{self!r} was entered before; make a new ShardWriter")
        self._state = "open"
        self._packer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        except BaseException as failure:
            self._abandon(failure)
            raise
        if error is not None:
            self._abandon(error)

    # -- committing ------------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        self._require_not_failed()
        rest = self._cutter.rest()
        if rest is not None:
            self._submit(rest)
        shards = self._packer.finish()
        self._packer.stop()
        old = self._find_replaced() if self._mode == "replace" else self._base
        index = self._index_of(shards)
        if old is None or self._mode == "replace" or shards:
            self._is_commit_begun = True
            self._catalog().replace(index, base=old, checked=self._mode != "replace")
        self._state, self._index = "committed", index
        if self._mode == "replace" and old is not None and old.layout == _LAYOUT:
            remove(self._store, sorted({*old.names} - {*index.names}), clock=self._clock, within_s=_REMOVE_S)

    def _index_of(self, shards: list[StoredShard]) -> Index:
        schema = self._cutter.schema.to_json()
        new = Index(
            schema=schema,
            names=[shard.name for shard in shards],
            rows=np.array([shard.num_rows for shard in shards], dtype=np.int64),
            sizes=np.array([shard.stored_bytes for shard in shards], dtype=np.int64),
            raw_sizes=np.array([shard.raw_bytes for shard in shards], dtype=np.int64),
            digests=[shard.digest for shard in shards],
            tails=np.array([shard.tail for shard in shards], dtype=np.int64).reshape(-1, 2),
            layout=_LAYOUT,
            codec=self._compression,
            created=utc_timestamp(),
            writer=f"streamshards {_version()}",
        )
        if self._mode == "append" and self._base is not None:
            return self._base.extended(new, schema=schema) if shards else self._base
        return new

    def _abandon(self, error: BaseException) -> None:
        """End the threads and remove what was stored. Never raises, so that *error* reaches the caller."""
        self._state = "abandoned"
        names = self._packer.stop()
        is_refused = self._index is None and isinstance(error, StreamShardsError) and not error.transient
        if self._is_commit_begun and not is_refused:
            # The put may have arrived without our knowing: an index must never name shards that we deleted.
            logger.error("%s: stopped during the commit; %d new shards were left in place", self.url, len(names))
            return
        remove(self._store, names, clock=self._clock, within_s=_REMOVE_S)

    # -- looking at what is there ----------------------------------------------------------------------------------

    def _look(self, mode: Mode) -> Index | None:
        """Return what the mode builds on, or raise if the mode forbids what is there."""
        if mode == "replace":
            return self._find_replaced(self._retry.first_contact_s)
        found = self._catalog(self._retry.first_contact_s).find()
        if found is None:
            return None
        if mode == "error":
            raise OptionInvalid(
                f"{self._store.url}: a dataset of {found.index.num_samples:,} samples is here; "
                f'add to it with mode="append", or take its place with mode="replace"'
            )
        if found.index.layout != _LAYOUT:
            raise OptionInvalid(
                f"{self._store.url}: an index of {found.index.layout!r} files made in place; shards cannot be added to "
                f"it; rewrite the files first: streamshards pack {self._store.url} DST"
            )
        return found.index

    def _find_replaced(self, deadline_s: float | None = None) -> Index | None:
        try:
            found = self._catalog(deadline_s).find()
        except IndexInvalid as error:
            logger.warning("an index that cannot be read will be replaced; the shards it names stay: %s", error)
            return None
        return None if found is None else found.index

    def _catalog(self, deadline_s: float | None = None) -> Catalog:
        return Catalog(
            store=self._store,
            retry=self._retry,
            deadline_s=self._retry.deadline_s if deadline_s is None else deadline_s,
            clock=self._clock,
            cancelled=threading.Event(),
            on_retry=self._on_retry,
        )

    # -- shards ----------------------------------------------------------------------------------------------------

    def _submit(self, cut: Cut) -> None:
        name = f"{self._writer_id}-{self._num_cut:06d}.pt.zst"
        self._num_cut += 1
        try:
            self._packer.submit(name, cut)
        except BaseException:  # Ctrl-C too: a shard is missing from here on
            self._state = "failed"
            raise

    def _on_stored(self, shard: StoredShard) -> None:
        done = self._done
        self._done = WriteProgress(
            samples=done.samples + shard.num_rows,
            shards=done.shards + 1,
            raw_bytes=done.raw_bytes + shard.raw_bytes,
            stored_bytes=done.stored_bytes + shard.stored_bytes,
        )
        if self._progress is not None:
            self._progress(self._done)

    def _on_retry(self, event: FetchRetried) -> None:
        emit(event, observer=self._observer, counters=self._counters)

    def _require_open(self) -> None:
        self._require_not_failed()
        if self._state == "new":
            raise OptionInvalid(f"{self!r}: write inside a with block: with ShardWriter(…) as out: out.write(…)")
        if self._state != "open":
            raise OptionInvalid(f"{self!r}: the with block has ended; make a new ShardWriter")

    def _require_not_failed(self) -> None:
        if self._state == "failed":
            raise StreamShardsError(f"{self!r}: an earlier error lost samples; nothing will be committed")


def parse_compression(compression: str) -> int | None:
    """Return the zstd level that *compression* names; None for ``"auto"``.

    Raises:
        OptionInvalid: Not ``"auto"``, ``"none"`` or ``"zstd:N"``, or no such level.
    """
    if compression == "auto":
        return None
    if compression == "none":
        return _STORED_LEVEL
    match = re.fullmatch(r"zstd:(-?\d{1,3})", compression) if isinstance(compression, str) else None
    level = 0 if match is None else int(match[1])
    if not (-7 <= level <= 22 and level != 0):
        raise OptionInvalid(f'compression={compression!r} must be "auto", "none" or "zstd:N", N from -7 to 22 but 0')
    return level


def _version() -> str:
    try:
        return version("streamshards")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
