"""The node cache, as one process uses it: shards on this machine's disk, shared with all its other processes.

The policy: a cache may save time and must cost nothing else. What is damaged is removed and fetched from the store,
what cannot be stored is not stored, and a folder that cannot be used is left alone. Each is an event, no error.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from streamshards.clock import Clock
from streamshards.engine.cachefolder import Busy, CacheFolder, Full, Identity, Refused, identity_of
from streamshards.engine.eviction import Kind, Pass, Shards
from streamshards.errors import ShardCorrupt
from streamshards.events import CacheDamaged, CacheOff, Counters, Event
from streamshards.memory import LARGE_BYTES, map_memory
from streamshards.options import CacheMode
from streamshards.plan.index import Index
from streamshards.plan.order import Int64Array
from streamshards.shard.frames import FrameReader
from streamshards.shard.payload import digest_of
from streamshards.shard.raw import RawFile, raw_size, write_all, write_raw
from streamshards.storage.store import Blob

T = TypeVar("T")

PAUSE_S: Final = 600.0
"""After the disk was full, nothing is stored for so long: others may make room. A full cache is not looked through
again for so long, or until the next pass: what is needed now will still be."""
_MAX_OPEN: Final = 256
"""Entries held open by one process at once, a quarter of the usual limit; further ones are opened for each read."""

_open_files: Final = weakref.WeakSet[RawFile]()
"""Those that are held open. No lock, which a fork could inherit: a few more do no harm."""

_NO_LIMIT: Final = 1 << 62


class NodeCache:
    """The entries of one folder. For one process: a forked child makes its own, for a lock may have been held.

    Args:
        folder: Where they are.
        mode: In which form shards of our own are kept.
        clock: Time.
    """

    def __init__(self, folder: CacheFolder, *, mode: CacheMode, clock: Clock) -> None:
        self.mode = mode
        self._folder = folder
        self._clock = clock
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._is_safe: bool | None = None
        self._paused_until = float("-inf")
        self._has_told = False
        self._verified: dict[str, Identity] = {}
        self._full: tuple[Pass, float] | None = None
        """The pass that found it full, and when it may look again."""

    def __repr__(self) -> str:
        return f"NodeCache({self._folder!r}, mode={self.mode!r})"

    @property
    def is_ours(self) -> bool:
        """Whether this process made it."""
        return self._pid == os.getpid()

    def kind_of(self, index: Index) -> Kind:
        """Return in which form the shards of *index* are kept."""
        return "raw" if self.mode == "raw" and index.layout == "shard" else "object"

    def shards_of(self, index: Index, numbers: Int64Array) -> Shards:
        """Return shards *numbers* of *index*, as they are kept here."""
        return Shards(index.digests, numbers, self.kind_of(index))

    # -- reading ---------------------------------------------------------------------------------------------------

    def find_object(self, digest: str, *, url: str, nbytes: int, emit: Callable[[Event], None]) -> Blob | None:
        """Return the shard as it lies in the store, its digest verified; None if it is not here.

        Args:
            digest: Of the shard, 32 hex digits.
            url: Of the shard, for messages.
            nbytes: Its size.
            emit: Receives each event.
        """
        name = f"{digest}.object"
        descriptor = self._descriptor(name, url, emit)
        if descriptor is None:
            return None
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            try:
                if status.st_size != nbytes:
                    raise ShardCorrupt(f"{status.st_size:,} bytes, {nbytes:,} expected")
                data = memoryview(bytearray(nbytes)) if nbytes < LARGE_BYTES else map_memory(nbytes)
                filled = 0
                while filled < nbytes and (count := file.readinto(data[filled:])):
                    filled += count
                if (found := digest_of(data[:filled])) != digest:
                    raise ShardCorrupt(f"digest {found}, {digest} expected")
            except (ShardCorrupt, OSError) as error:
                self._drop(name, identity_of(status), url=url, cause=error, emit=emit)
                return None
        return data

    def find_raw(
        self, digest: str, *, url: str, max_raw_bytes: int, emit: Callable[[Event], None]
    ) -> tuple[RawFile, Identity] | None:
        """Return the shard, decoded, and which file it is in; None if it is not here.

        It is verified the first time this process sees that file. Arguments as for ``find_object``.
        """
        name = f"{digest}.raw"
        descriptor = self._descriptor(name, url, emit)
        if descriptor is None:
            return None
        identity = identity_of(os.fstat(descriptor))
        try:
            file = self._raw_file(descriptor, name, identity, digest=digest, max_raw_bytes=max_raw_bytes)
            if self._verified.get(name) != identity:
                file.verify()
                self._verified[name] = identity
        except ShardCorrupt as error:
            self._drop(name, identity, url=url, cause=error, emit=emit)
            return None
        return file, identity

    def drop_raw(
        self, digest: str, bad: Identity, *, url: str, cause: BaseException, emit: Callable[[Event], None]
    ) -> None:
        """Remove a decoded shard that failed while it was read. Arguments as for ``find_object``."""
        if not isinstance(cause.__cause__, FileNotFoundError):  # that is no damage: it was evicted
            self._drop(f"{digest}.raw", bad, url=url, cause=cause, emit=emit)

    def _drop(
        self, name: str, bad: Identity | None, *, url: str, cause: BaseException, emit: Callable[[Event], None]
    ) -> None:
        """Remove a damaged entry, unless another has taken its place, and say so."""
        self._verified.pop(name, None)
        self._folder.discard(name, bad)
        emit(CacheDamaged(str(self._folder.path(name)), url, str(cause)))

    def _descriptor(self, name: str, url: str, emit: Callable[[Event], None]) -> int | None:
        if not self._is_usable(emit):
            return None
        try:
            return self._folder.open(name)
        except OSError as error:
            if self._folder.is_no_file(name):
                self._drop(name, None, url=url, cause=error, emit=emit)
            else:
                self._tell(str(error), emit)
            return None

    def _raw_file(self, descriptor: int, name: str, identity: Identity, *, digest: str, max_raw_bytes: int) -> RawFile:
        open_again = partial(self._folder.open_again, name, identity) if len(_open_files) >= _MAX_OPEN else None
        path = str(self._folder.path(name))
        file = RawFile(descriptor, name=path, digest=digest, max_raw_bytes=max_raw_bytes, open_again=open_again)
        if file.is_open:
            _open_files.add(file)
        return file

    # -- writing ---------------------------------------------------------------------------------------------------

    def keep_object(
        self, digest: str, data: Blob, *, reader: Pass, counters: Counters, emit: Callable[[Event], None]
    ) -> None:
        """Store the shard as it lies in the store, if that is possible.

        Args:
            digest: Of *data*, verified.
            data: The shard.
            reader: Who has read it.
            counters: Where bytes and evictions are counted.
            emit: Receives each event.
        """

        def write(descriptor: int) -> None:
            write_all(descriptor, data)

        self._store(f"{digest}.object", len(data), write, reader, counters, emit)

    def keep_raw(
        self, digest: str, frames: FrameReader, *, reader: Pass, counters: Counters, emit: Callable[[Event], None]
    ) -> tuple[RawFile, Identity] | None:
        """Store the shard, decoded, and return what was stored, and which file it is in; None if that is not possible.

        Args:
            digest: Of the shard, verified.
            frames: The shard.
            reader: Who has read it.
            counters: Where bytes and evictions are counted.
            emit: Receives each event.
        """
        name = f"{digest}.raw"

        def write(descriptor: int) -> tuple[RawFile, Identity]:
            write_raw(descriptor, frames, digest=digest)
            identity = identity_of(os.fstat(descriptor))
            copy = os.dup(descriptor)
            return self._raw_file(copy, name, identity, digest=digest, max_raw_bytes=frames.raw_bytes), identity

        return self._store(name, raw_size(frames), write, reader, counters, emit)

    def _store(
        self,
        name: str,
        nbytes: int,
        write: Callable[[int], T],
        reader: Pass,
        counters: Counters,
        emit: Callable[[Event], None],
    ) -> T | None:
        """Return what *write* returns, once what it wrote is an entry; None if that is not possible."""
        if not self._is_usable(emit) or self._clock.now() < self._paused_until:
            return None
        try:
            if self._was_full(reader) and not self._folder.has_changed(nbytes):
                raise Full
            with self._folder.writing(name, nbytes, reader) as (descriptor, num_evicted):
                counters.add(cache_evicted=num_evicted)
                result = write(descriptor)
        except (Busy, Full) as error:
            is_full = isinstance(error, Full)
            counters.add(cache_evicted=error.num_evicted, cache_full=int(is_full))
            if is_full and not self._was_full(reader):
                self._full = (reader, self._clock.now() + PAUSE_S)
            return None
        except (FileNotFoundError, ShardCorrupt):  # FileNotFoundError: somebody clears the cache
            return None
        except (Refused, OSError) as error:
            counters.add(cache_evicted=error.num_evicted if isinstance(error, Refused) else 0)
            self._paused_until = self._clock.now() + PAUSE_S
            self._tell(str(error), emit)
            return None
        counters.add(bytes_cached=nbytes)
        return result

    def _was_full(self, reader: Pass) -> bool:
        """Return whether *reader* has lately found that nothing may go."""
        full = self._full
        return full is not None and full[0] is reader and self._clock.now() < full[1]

    # -- the folder ------------------------------------------------------------------------------------------------

    def _is_usable(self, emit: Callable[[Event], None]) -> bool:
        if self._is_safe is None:
            try:
                self._folder.require_safe()
                self._is_safe = True
            except (Refused, OSError) as error:
                self._is_safe = False
                self._tell(str(error), emit)
        return self._is_safe

    def _tell(self, cause: str, emit: Callable[[Event], None]) -> None:
        """Say once why something cannot be used."""
        with self._lock:
            is_new, self._has_told = not self._has_told, True
        if is_new:
            emit(CacheOff(self._folder.directory, cause))


@dataclass(frozen=True, slots=True)
class EntryCheck:
    """What came out for one entry."""

    path: Path
    nbytes: int
    error: str | None
    """What is wrong with it; None if nothing is."""


def check_entries(folder: CacheFolder) -> Iterator[EntryCheck]:
    """Yield one check for each entry, every byte of it read; what is damaged is removed.

    Raises:
        Refused: The folder is not safe.
        OSError: It cannot be read.
    """
    if not folder.require_safe():
        return
    for entry in sorted(folder.entries()):
        name = entry.path.name
        try:
            descriptor = folder.open(name)
        except OSError as error:
            folder.discard(name, None)
            yield EntryCheck(entry.path, entry.nbytes, str(error))
            continue
        if descriptor is None:  # evicted meanwhile, or not ours
            continue
        identity = identity_of(os.fstat(descriptor))
        try:
            _check_entry(descriptor, name)
        except ShardCorrupt as error:
            folder.discard(name, identity)
            yield EntryCheck(entry.path, entry.nbytes, str(error))
        else:
            yield EntryCheck(entry.path, entry.nbytes, None)


def _check_entry(descriptor: int, name: str) -> None:
    digest, _, kind = name.partition(".")
    if kind == "raw":
        RawFile(descriptor, name=name, digest=digest, max_raw_bytes=_NO_LIMIT).verify()
        return
    with open(descriptor, "rb") as file:
        found = digest_of(file.read())
    if found != digest:
        raise ShardCorrupt(f"{name}: digest {found}")
