"""Which index is current: finding it, and putting another in its place.

Theory. ``index.json`` is the one key that decides: a dataset exists from the moment it is there, and changes in the
moment it is replaced. Nothing else is ever consulted first, so there are no two keys to disagree.

* An index of up to ``PLAIN_BYTES`` *is* ``index.json``: one request to open a dataset.
* A larger one lies beside it as ``index-FINGERPRINT.json.zst``, and ``index.json`` is a pointer of a few lines that
  names it. The part is put first, under a name of its own, so that no reader of the old pointer ever sees it.

What a crash leaves, step by step:

====================================  =============================  ===============================================
after                                 a reader sees                  left over
====================================  =============================  ===============================================
the shards are put                    the old dataset, or none       orphaned shards
``index-NEW.json.zst`` (large only)   the old dataset, or none       the same, and that part
``index.json`` is put                 the new dataset                the old ``index-OLD.json.zst``, if there was one
the old part is deleted               the new dataset                nothing
====================================  =============================  ===============================================

An index that does not hold (its fingerprint covers all that decides what is read) is fetched anew, for a bit may have
flipped on the wire; the same bytes twice are what the store has.

A reader that holds the old pointer when the old part goes looks again. An ``index.json.zst`` that somebody made by hand
(``zstd --rm index.json``) is read where there is no ``index.json``, and goes when a writer commits.

Not elegant yet: stores have no compare-and-set on content, so replacing an index is look, compare, put; two writers
that commit within that one request both believe they did, and the later one stands. Creating the first index
(``if_absent``) is exclusive wherever the store honours it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from streamshards.clock import Clock
from streamshards.engine.retry import Cancelled, circuit_of, with_retries
from streamshards.errors import (
    IndexInvalid,
    ObjectExists,
    ObjectMissing,
    ShardCorrupt,
    StoreError,
    StoreUnavailable,
    StreamShardsError,
)
from streamshards.events import FetchRetried, logger
from streamshards.options import MiB, RetryOptions
from streamshards.plan.index import FORMAT, MAX_INDEX_BYTES, VERSION, Index
from streamshards.shard.frames import deflate, inflate
from streamshards.shard.payload import digest_of
from streamshards.storage.store import Patience, Store

INDEX_KEY: Final = "index.json"
HAND_MADE_KEY: Final = "index.json.zst"
PLAIN_BYTES: Final = 4 * MiB
"""Up to about 40,000 shards stay one plain readable file; beyond, JSON of hex digests shrinks to under a half."""
_POINTER_BYTES: Final = 4096
_MAX_RATIO: Final = 64
"""An index shrinks to a quarter: half of it is digests. One that inflates to more is a bomb, but for a small one."""
_FREE_BYTES: Final = 16 * MiB
_PART: Final = re.compile(r"index-([0-9a-f]{32})\.json\.zst")
_OWN_SHARD: Final = re.compile(r"[0-9a-f]{12}-\d{6,}\.pt\.zst")
_PT_FILE: Final = re.compile(r"\.(pt|pth)(\.zst|\.gz)?$")
_MAX_LOOKS: Final = 5
"""A dataset is not replaced more often than this between two requests of one reader."""

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """The current index, and where it lies if not in ``index.json`` itself."""

    index: Index
    part: str | None


@dataclass(frozen=True)
class Catalog:
    """One dataset's index in its store.

    Args:
        store: Where the dataset is.
        retry: How long to try.
        deadline_s: Give up on one object after this long.
        clock: Time.
        cancelled: Set by the owner to stop every wait at once.
        on_retry: Receives each retry.
    """

    store: Store
    retry: RetryOptions
    deadline_s: float
    clock: Clock
    cancelled: threading.Event
    on_retry: Callable[[FetchRetried], None]

    def find(self) -> Found | None:
        """Return the current index, or None where there is none. One request when it is small, else two.

        Raises:
            IndexInvalid: It is damaged, hostile, from a newer version, or its part is gone: in ``corrupt_attempts``
                fetches, or twice with the same bytes.
            StoreError: The store did not give it.
        """
        seen_before: dict[str, str | None] = {}
        attempt = 1
        while True:
            seen: dict[str, str | None] = {}
            try:
                return self._find_once(seen)
            except IndexInvalid as error:
                if attempt >= self.retry.corrupt_attempts or seen == seen_before:
                    raise
                cause = str(error)
            wait_s = self.clock.jitter(self.retry.base_s)
            self.on_retry(FetchRetried(self._url(INDEX_KEY), attempt, wait_s, cause))
            if self.clock.wait(self.cancelled, wait_s):
                raise Cancelled(self._url(INDEX_KEY))
            seen_before = seen
            attempt += 1

    def _find_once(self, seen: dict[str, str | None]) -> Found | None:
        """Return the current index; put the digest of each object that was looked at into *seen*."""
        missing = None
        for _ in range(_MAX_LOOKS):
            data = self._get(INDEX_KEY, seen)
            if data is None:
                hand_made = self._get(HAND_MADE_KEY, seen)
                if hand_made is not None:
                    return Found(self._unpack(HAND_MADE_KEY, hand_made), HAND_MADE_KEY)
                if missing == INDEX_KEY:
                    return None
                missing = INDEX_KEY  # a commit may have come between those two requests: look once more
                continue
            part = self._part_named_by(data)
            if part is None:
                return Found(Index.parse(data, url=self._url(INDEX_KEY)), None)
            packed = self._get(part, seen)
            if packed is not None:
                return Found(self._unpack(part, packed), part)
            if missing == part:
                raise IndexInvalid(f"{self._url(INDEX_KEY)} names {part}, which is missing; rebuild the index")
            missing = part  # replaced and cleaned up since: look again
        raise IndexInvalid(f"{self._url(INDEX_KEY)} was replaced {_MAX_LOOKS} times while it was read; try again")

    def replace(self, index: Index, *, base: Index | None, checked: bool = True) -> None:
        """Make *index* the current one.

        Args:
            index: What readers see from now on.
            base: What must be current until then; None: nothing may be.
            checked: False: whatever is current is replaced, damaged or not.

        Raises:
            ObjectExists: Another index is current than *base*; nothing was changed.
            StoreUnavailable: No answer; whether *index* is current is unknown, so what it names must stay.
            StoreError: Refused; *index* is not current.
        """
        old = self._current(checked=checked)
        if checked:
            self._require_base(old, base)
        data, part = index.dump(), None
        if len(data) > PLAIN_BYTES:
            part = f"index-{index.fingerprint}.json.zst"
            self._put(part, deflate(data), if_absent=False)
            data = _pointer(index, part)
        try:
            self._commit(data, index, if_absent=checked and base is None and old is None)
        except StreamShardsError as error:
            if part is not None and not error.transient and (old is None or part != old.part):
                self._delete(part)
            raise
        if old is not None and old.part is not None and old.part != part:
            self._delete(old.part)

    def describe_place(self) -> str:
        """Return what is at the url instead of an index, and the command that makes a dataset."""
        url = self.store.url
        folder, _, last = url.rpartition("/")
        if last in (INDEX_KEY, HAND_MADE_KEY) or _PART.fullmatch(last):
            return f"{url}: this is the index of a dataset; pass the folder that it lies in: {folder}"
        if _PT_FILE.search(last):
            return f"{url}: this is a single file of a dataset; pass the folder that its index lies in: {folder}"
        sizes = self._call(lambda timeout_s: self.store.list(timeout_s=timeout_s), "list")
        names = [name for name, _ in sizes]
        if not names:
            return f"{url}: no dataset: empty, or it does not exist; make one with: streamshards pack SRC {url}"
        inner = [name for name in names if name.endswith("/" + INDEX_KEY)]
        if inner:
            folders = _some([f"{url}/{name.removesuffix('/' + INDEX_KEY)}" for name in inner])
            return f"{url}: no dataset, but further down: {folders}"
        own = [name for name in names if _OWN_SHARD.fullmatch(name)]
        if own:
            return (
                f"{url}: no index, but {_counted(own, 'shard')} of a writer that is still at work or was killed; "
                f"wait for it, or pack again: streamshards pack SRC {url}"
            )
        files = [name for name in names if _PT_FILE.search(name)]
        if files:
            return (
                f"{url}: no dataset, but {_counted(files, '.pt file')}; use them in place: streamshards index {url} - "
                f"or rewrite them into shards: streamshards pack {url} DST"
            )
        found = _counted(names, "file")
        return f"{url}: no dataset, but {found}, none of them .pt; make one with: streamshards pack SRC {url}"

    def _current(self, *, checked: bool) -> Found | None:
        try:
            return self.find()
        except IndexInvalid:
            if checked:
                raise
            return None

    def _require_base(self, old: Found | None, base: Index | None) -> None:
        now = None if old is None else old.index
        if now is None and base is not None:
            raise ObjectExists(f"{self.store.url}: the index that was to be replaced is gone: {base!r}")
        if now is not None and (base is None or base.fingerprint != now.fingerprint):
            raise ObjectExists(
                f"{self.store.url}: another writer committed in the meantime: {now.num_samples:,} samples stand there "
                f"now, unchanged; ours were not added; write them again"
            )

    def _commit(self, data: bytes, index: Index, *, if_absent: bool) -> None:
        attempts = 0

        def put(timeout_s: float) -> None:
            nonlocal attempts
            attempts += 1
            self.store.put(INDEX_KEY, data, timeout_s=timeout_s, if_absent=if_absent)

        try:
            self._call(put, INDEX_KEY)
        except StreamShardsError as error:
            # An attempt whose answer was lost may have arrived, or may yet arrive.
            if self._is_current(index):
                return
            if isinstance(error, ObjectExists):
                self._require_base(self.find(), None)
            if attempts > 1 or error.transient:
                raise StoreUnavailable(
                    f"{self._url(INDEX_KEY)}: whether the new index was stored is unknown; look with "
                    f'"streamshards inspect {self.store.url}": {error}'
                ) from error
            raise

    def _is_current(self, index: Index) -> bool:
        try:
            now = self.find()
        except StreamShardsError:
            return False
        return now is not None and now.index.fingerprint == index.fingerprint

    def _part_named_by(self, data: bytes) -> str | None:
        """Return the key that a pointer names, or None if *data* is something else."""
        if len(data) > _POINTER_BYTES:
            return None
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or content.get("format") != FORMAT or "index" not in content:
            return None
        if content.get("version") != VERSION:
            return None  # Index.parse says what is wrong with it
        part = content["index"]
        if not isinstance(part, str) or not _PART.fullmatch(part):
            raise IndexInvalid(f"{self._url(INDEX_KEY)} points at {str(part)[:80]!r}, which is no part of an index")
        return part

    def _unpack(self, key: str, data: bytes) -> Index:
        try:
            most = min(MAX_INDEX_BYTES, _MAX_RATIO * len(data) + _FREE_BYTES)
            plain = bytes(inflate(data, name=self._url(key), max_raw_bytes=most))
        except ShardCorrupt as error:
            raise IndexInvalid(f"{error}; rebuild the index") from error
        index = Index.parse(plain, url=self._url(key))
        promised = _PART.fullmatch(key)
        if promised is not None and promised[1] != index.fingerprint:
            raise IndexInvalid(f"{self._url(key)}: its name promises another fingerprint than {index.fingerprint}")
        return index

    def _get(self, key: str, seen: dict[str, str | None]) -> bytes | None:
        seen[key] = None
        try:
            data = bytes(self._call(lambda s: self.store.get(key, timeout_s=s, max_bytes=MAX_INDEX_BYTES), key))
        except ObjectMissing:
            return None
        seen[key] = digest_of(data)
        return data

    def _put(self, key: str, data: bytes, *, if_absent: bool) -> None:
        self._call(lambda s: self.store.put(key, data, timeout_s=s, if_absent=if_absent), key)

    def _delete(self, key: str) -> None:
        try:
            # What it cleans up after is done: that need not wait for as long as a shard.
            self._call(
                lambda s: self.store.delete(key, timeout_s=s), key, min(self.deadline_s, self.retry.first_contact_s)
            )
        except StoreError as error:
            logger.warning("%s: no longer needed, but not deleted: %s", self._url(key), error)

    def _call(self, action: Callable[[Patience], T], key: str, deadline_s: float | None = None) -> T:
        return with_retries(
            action,
            what=self._url(key),
            options=self.retry,
            deadline_s=self.deadline_s if deadline_s is None else deadline_s,
            clock=self.clock,
            cancelled=self.cancelled,
            on_retry=self.on_retry,
            circuit=circuit_of(self.store, self.clock),
        )

    def _url(self, key: str) -> str:
        return f"{self.store.url}/{key}"


def load_index(
    store: Store,
    *,
    retry: RetryOptions,
    clock: Clock,
    cancelled: threading.Event,
    on_retry: Callable[[FetchRetried], None],
) -> Index:
    """Return the index of the dataset in *store*, within ``retry.first_contact_s`` for each request.

    Raises:
        IndexInvalid: There is none (the text says what is there instead, and the command that makes one), or it is
            damaged, hostile or from a newer version.
        StoreError: The store did not give it.
    """
    catalog = Catalog(store, retry, retry.first_contact_s, clock, cancelled, on_retry)
    found = catalog.find()
    if found is None:
        raise IndexInvalid(catalog.describe_place())
    return found.index


def save_index(
    store: Store,
    index: Index,
    *,
    base: Index | None,
    checked: bool = True,
    retry: RetryOptions,
    clock: Clock,
    cancelled: threading.Event,
    on_retry: Callable[[FetchRetried], None],
) -> None:
    """Make *index* the current one of the dataset in *store*; see ``Catalog.replace``."""
    Catalog(store, retry, retry.deadline_s, clock, cancelled, on_retry).replace(index, base=base, checked=checked)


def _pointer(index: Index, part: str) -> bytes:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": index.num_samples,
        "fingerprint": index.fingerprint,
        "index": part,
    }
    return (json.dumps(content) + "\n").encode()


def _counted(names: list[str], what: str) -> str:
    return f"{len(names):,} {what}{'' if len(names) == 1 else 's'} such as {_some(names)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
