"""The node cache below the dataset: what goes first, the files, the folder, and the fetcher that uses them."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from streamshards.clock import unix_ns
from streamshards.engine.cache import PAUSE_S, NodeCache
from streamshards.engine.cachefolder import FORMAT, Busy, CacheFolder, Refused, identity_of
from streamshards.engine.cachemeter import disk_bytes
from streamshards.engine.eviction import Entry, Pass
from streamshards.engine.fetch import Fetcher
from streamshards.errors import DatasetReplaced, ShardCorrupt
from streamshards.events import CacheDamaged, CacheOff
from streamshards.options import KiB, MiB
from streamshards.plan.index import Index
from streamshards.shard.frames import FrameReader
from streamshards.shard.payload import FramedShard, PayloadShard, encode
from streamshards.shard.raw import BackedPayload, RawFile, raw_size, write_all, write_raw
from streamshards.shard.reader import ShardReader
from streamshards.testing import FakeClock, FaultyStore, MemoryStore
from tests.engine.rig import Rig, columns_of, dataset_of, ids_of, join_all, numbered, sample, until, watched

ROWS: Final = 30
NUM_SHARDS: Final = 6
MODES: Final = ("raw", "compressed")
ENDLESS: Final = 1 << 50


# -- the file of a decoded shard ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shard() -> tuple[bytes, str]:
    """One shard and its digest."""
    encoded = encode(columns_of(sample(number) for number in range(ROWS)))
    return encoded.data, encoded.digest


def frames_of(data: bytes) -> FrameReader:
    return FrameReader(data, name="shard", max_raw_bytes=ENDLESS)


def raw_bytes(tmp_path: Path, shard: tuple[bytes, str]) -> bytes:
    path = tmp_path / "raw"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    write_raw(descriptor, frames_of(shard[0]), digest=shard[1])
    os.close(descriptor)
    return path.read_bytes()


def opened(path: Path, digest: str, *, max_raw_bytes: int = ENDLESS, keep_open: bool = True) -> RawFile:
    again = None if keep_open else partial(os.open, path, os.O_RDONLY)
    descriptor = os.open(path, os.O_RDONLY)
    return RawFile(descriptor, name="entry", digest=digest, max_raw_bytes=max_raw_bytes, open_again=again)


def num_descriptors(folder: Path) -> int:
    """Return how many files below *folder* this process has open; others come and go with what other tests left."""
    gc.collect()
    fds = Path("/proc/self/fd")
    return sum(is_below(fd, folder) for fd in fds.iterdir()) if fds.exists() else 0


def is_below(descriptor: Path, folder: Path) -> bool:
    try:
        return os.readlink(descriptor).startswith(f"{folder}/")
    except FileNotFoundError:  # the one that lists them
        return False


def test_a_raw_file_reads_like_the_shard(tmp_path: Path, shard: tuple[bytes, str]) -> None:
    """Every field, every part, whole and in cuts, comes out of the file as it comes out of the frames."""
    data, digest = shard
    stored = raw_bytes(tmp_path, shard)
    assert len(stored) == raw_size(frames_of(data))
    file = opened(tmp_path / "raw", digest)
    file.verify()
    framed = FramedShard(data, name="shard", max_raw_bytes=ENDLESS)
    copied = PayloadShard(file, name="shard", is_decoded=True)
    assert copied.schema == framed.schema
    for lo, hi in [(0, ROWS), (0, 0), (7, 8), (3, 29)]:
        for path, column in framed.columns(lo=lo, hi=hi).data.items():
            other = copied.columns(lo=lo, hi=hi).data[path]
            for part in ("values", "offsets", "shapes", "present"):
                ours, theirs = getattr(other, part), getattr(column, part)
                assert (ours is None) == (theirs is None)
                assert ours is None or torch.equal(ours.contiguous().view(-1), theirs.contiguous().view(-1))


def test_reading_is_bounded(tmp_path: Path, shard: tuple[bytes, str]) -> None:
    """Bytes outside the payload are refused, and so is a payload that is larger than the index promises."""
    raw_bytes(tmp_path, shard)
    file = opened(tmp_path / "raw", shard[1])
    size = file.raw_bytes
    for lo, hi, room in [(-1, 1, 2), (0, size + 1, size + 1), (2, 1, 0), (0, 2, 1)]:
        with pytest.raises(ShardCorrupt, match="were asked for"):
            file.read_into(lo, hi, memoryview(bytearray(max(room, 0))))
    with pytest.raises(ShardCorrupt, match="more than"):
        opened(tmp_path / "raw", shard[1], max_raw_bytes=size - 1)


@pytest.mark.parametrize("keep_open", [True, False])
def test_every_damaged_byte_is_noticed(tmp_path: Path, shard: tuple[bytes, str], keep_open: bool) -> None:
    """A flip of any byte, a cut at any length, an appended byte: ShardCorrupt, and no descriptor is left open."""
    good = raw_bytes(tmp_path, shard)
    path = tmp_path / "damaged"
    rng = random.Random(5)
    before = num_descriptors(tmp_path)
    places = [*range(300), *(rng.randrange(len(good)) for _ in range(300)), len(good) - 1]
    damaged = [good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :] for at in places]
    damaged += [good[:length] for length in [*range(100), *(rng.randrange(len(good)) for _ in range(100))]]
    damaged += [good + b"\0", bytes(len(good)), b""]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ShardCorrupt):
            opened(path, shard[1], keep_open=keep_open).verify()
    path.write_bytes(good)
    with pytest.raises(ShardCorrupt, match="it holds shard"):
        opened(path, "0" * 32)
    assert num_descriptors(tmp_path) == before


def big_shard() -> tuple[bytes, str]:
    """Return a shard of several frames, whose file is held open."""
    rows = [{"id": number, "x": torch.arange(100_000) + number} for number in range(20)]
    encoded = encode(columns_of(rows), level=1)
    return encoded.data, encoded.digest


def test_a_large_file_is_read_in_place_and_closed_with_its_reader(tmp_path: Path) -> None:
    """Several frames; the descriptor lives as long as the reader; a removed file goes on being readable."""
    data, digest = big_shard()
    stored = raw_bytes(tmp_path, (data, digest))
    assert len(stored) > 10 * MiB
    before = num_descriptors(tmp_path)
    file = opened(tmp_path / "raw", digest)
    file.verify()
    assert num_descriptors(tmp_path) == before + 1
    (tmp_path / "raw").unlink()
    reader = PayloadShard(file, name="shard", is_decoded=True)
    expected = FramedShard(data, name="shard", max_raw_bytes=ENDLESS).columns()
    got = reader.columns()
    assert all(torch.equal(got.data[path].values, column.values) for path, column in expected.data.items())
    del reader, file
    assert num_descriptors(tmp_path) == before


def test_a_file_that_is_cut_under_its_reader_is_replaced_by_the_store(tmp_path: Path) -> None:
    """Where a mapping would kill the process: the reader goes on from its other source, which is asked once."""
    data, digest = big_shard()
    raw_bytes(tmp_path, (data, digest))
    asked: list[str] = []

    def from_store(cause: ShardCorrupt) -> FrameReader:
        asked.append(str(cause))
        return frames_of(data)

    backed = BackedPayload(opened(tmp_path / "raw", digest), from_store)
    reader = PayloadShard(backed, name="shard", is_decoded=True)
    os.truncate(tmp_path / "raw", 4096)
    expected = FramedShard(data, name="shard", max_raw_bytes=ENDLESS).columns()
    got = reader.columns()
    assert all(torch.equal(got.data[path].values, column.values) for path, column in expected.data.items())
    assert len(asked) == 1
    assert "it ends at byte" in asked[0]


# -- the folder --------------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, budget_bytes: int = ENDLESS, keep_free_bytes: int = 0) -> CacheFolder:
    return CacheFolder(str(tmp_path / "cache"), budget_bytes=budget_bytes, keep_free_bytes=keep_free_bytes)


def home(tmp_path: Path) -> Path:
    return tmp_path / "cache" / f"user-{os.geteuid()}"


def put(folder: CacheFolder, name: str, nbytes: int) -> int:
    with folder.writing(name, nbytes) as (descriptor, num_evicted):
        write_all(descriptor, os.urandom(nbytes))
    return num_evicted


def names(folder: CacheFolder) -> set[str]:
    return {entry.path.name for entry in folder.entries()}


def name_of(number: int) -> str:
    return f"{number:032x}.object"[-39:]


def test_an_entry_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """While it is written nothing is to be seen; after an exception nothing is left, not even a descriptor."""
    folder = folder_of(tmp_path)
    before = num_descriptors(tmp_path)
    with folder.writing("aa", 5) as (descriptor, _):
        write_all(descriptor, b"12")
        assert folder.open("aa") is None
        write_all(descriptor, b"345")
    assert folder.path("aa").read_bytes() == b"12345"
    with pytest.raises(ZeroDivisionError), folder.writing("bb", 5) as (descriptor, _):
        write_all(descriptor, b"12")
        raise ZeroDivisionError
    assert names(folder) == {"aa"}
    assert os.listdir(home(tmp_path) / FORMAT / "new") == []
    assert num_descriptors(tmp_path) == before


def test_only_the_user_may_enter(tmp_path: Path) -> None:
    """Folders are 0700 and files 0600, whatever the umask."""
    before = os.umask(0)
    try:
        put(folder_of(tmp_path), "aa", 10)
    finally:
        os.umask(before)
    modes = {path.is_dir(): stat.S_IMODE(path.lstat().st_mode) for path in [home(tmp_path), *home(tmp_path).rglob("*")]}
    assert modes == {True: 0o700, False: 0o600}


def a_link(place: Path) -> None:
    target = place.parent.parent / "target"
    target.mkdir(mode=0o700)
    place.symlink_to(target)


def a_plain_file(place: Path) -> None:
    place.write_bytes(b"")


def open_to_others(place: Path) -> None:
    place.mkdir()
    place.chmod(0o750)


@pytest.mark.parametrize(
    ("make", "why"), [(a_link, "is a link"), (a_plain_file, "is not a folder"), (open_to_others, "is open to others")]
)
def test_a_folder_that_others_could_have_filled_is_refused(
    tmp_path: Path, make: Callable[[Path], None], why: str
) -> None:
    """It is neither read, nor written, nor cleared."""
    home(tmp_path).parent.mkdir()
    make(home(tmp_path))
    folder = folder_of(tmp_path)
    actions: list[Callable[[], object]] = [folder.require_safe, folder.make, folder.clear]
    for action in actions:
        with pytest.raises(Refused, match=why):
            action()


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """Whoever owns the folder could put anything into it."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    home(tmp_path).mkdir(parents=True, mode=0o700)
    os.chown(home(tmp_path), 12345, -1)
    with pytest.raises(Refused, match="belongs to user 12345"):
        folder_of(tmp_path).require_safe()


def test_the_least_recently_used_entry_goes_first(tmp_path: Path) -> None:
    """Opening an entry is using it; the budget is in whole blocks of disk."""
    folder = folder_of(tmp_path, budget_bytes=40 * KiB)
    for name in ("aa", "bb", "cc", "dd"):
        put(folder, name, 9 * KiB)
    assert names(folder) == {"bb", "cc", "dd"}, "three of 12 KiB fit"
    for name in ("bb", "cc"):
        descriptor = folder.open(name)
        assert descriptor is not None
        os.close(descriptor)
    assert put(folder, "ee", 9 * KiB) == 1
    assert names(folder) == {"bb", "cc", "ee"}


def test_what_can_never_fit_is_refused(tmp_path: Path) -> None:
    """An entry larger than the budget, and any entry while the disk has less than is to be kept free."""
    with pytest.raises(Refused, match="budget_bytes"):
        put(folder_of(tmp_path, budget_bytes=8 * KiB), "aa", 9 * KiB)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(Refused, match="keep_free_bytes"):
        put(folder_of(tmp_path, keep_free_bytes=2 * free), "aa", 9 * KiB)
    assert names(folder_of(tmp_path)) == set()


def test_a_disk_that_fills_up_takes_the_caches_room(tmp_path: Path) -> None:
    """With less free than is to be kept, entries go."""
    folder = folder_of(tmp_path)
    for name in ("aa", "bb", "cc"):
        put(folder, name, 9 * KiB)
    full = folder_of(tmp_path, keep_free_bytes=2 * shutil.disk_usage(tmp_path).free)
    done = full.evict()
    assert done is not None
    assert (done.num_evicted, names(folder)) == (3, set())


def test_one_process_evicts_and_the_others_go_on(tmp_path: Path) -> None:
    """Who does not get the lock does not wait: it stores nothing. The lock goes with its holder, killed or not."""
    folder = folder_of(tmp_path)
    folder.make()
    read, write = os.pipe()
    holder = os.fork()
    if not holder:
        with folder._meter.lock() as is_ours:
            os.write(write, b"1" if is_ours else b"0")
            signal.pause()
    assert os.read(read, 1) == b"1"
    assert folder.evict() is None
    with pytest.raises(Busy):
        put(folder, "aa", 10)
    assert os.listdir(home(tmp_path) / FORMAT / "new") == []
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert put(folder, "aa", 10) == 0
    os.close(read)
    os.close(write)


def test_a_forked_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    """A child of a process that evicts can outlive it without holding anything up."""
    folder = folder_of(tmp_path)
    folder.make()
    with folder._meter.lock() as is_ours:
        assert is_ours
        child = os.fork()
        if not child:
            signal.pause()
    try:
        assert folder.evict() is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_files_of_the_dead_are_removed_and_those_of_the_living_count(tmp_path: Path) -> None:
    """An eviction removes unfinished files of processes that are gone, and of any after an hour."""
    folder = folder_of(tmp_path, budget_bytes=64 * KiB)
    put(folder, "aa", 10)
    new = home(tmp_path) / FORMAT / "new"
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    dead, living, old = (new / f"{pid}-{n}-32768.tmp" for n, pid in enumerate((child, os.getpid(), os.getpid())))
    for path in (dead, living, old, new / "anything"):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    done = folder.evict()
    assert done is not None
    assert os.listdir(new) == [living.name]
    assert done.cached_bytes == 4 * KiB + 32 * KiB
    with folder.writing("bb", 32 * KiB):
        pass
    assert names(folder) == {"bb"}, "with what the living will have written there is no room for both"


def _write_many(directory: str, budget: int, seed: int) -> None:
    folder = CacheFolder(directory, budget_bytes=budget, keep_free_bytes=0)
    rng = random.Random(seed)
    for _ in range(150):
        with contextlib.suppress(Busy):
            put(folder, name_of(rng.randrange(1 << 60)), rng.randrange(1, 60 * KiB))


def test_the_budget_holds_while_several_processes_write(tmp_path: Path) -> None:
    """Four processes that store much more than fits: at no instant that we look is there more than the budget."""
    budget = 1 * MiB
    context = multiprocessing.get_context("forkserver")
    folder = folder_of(tmp_path, budget_bytes=budget)
    folder.make()
    writers = [
        context.Process(target=_write_many, args=(folder.directory, budget, seed), daemon=True) for seed in range(4)
    ]
    for writer in writers:
        writer.start()
    most = looks = 0
    while any(writer.is_alive() for writer in writers):
        with folder._meter.lock() as is_ours:  # else what we count may not have been there at one time
            if is_ours:
                most = max(most, sum(entry.nbytes for entry in folder.entries()))
                looks += 1
        writers[looks % 4].join(0.002)  # who finds us looking stores nothing
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert looks > 10
    assert budget // 2 < most <= budget
    done = folder.evict()
    assert done is not None
    assert done.cached_bytes == sum(entry.nbytes for entry in folder.entries()) <= budget
    assert os.path.getsize(home(tmp_path) / FORMAT / "meter") * 4096 == done.cached_bytes


def test_a_meter_that_lies_is_put_right(tmp_path: Path) -> None:
    """Removed, or much too high: each process looks for itself before it first writes."""
    for number in range(5):
        put(folder_of(tmp_path), name_of(number), 8 * KiB)
    meter = home(tmp_path) / FORMAT / "meter"
    for wrong in (0, 1 << 20):
        os.truncate(meter, wrong)
        put(folder_of(tmp_path, budget_bytes=24 * KiB), name_of(9), 8 * KiB)
        assert sum(entry.nbytes for entry in folder_of(tmp_path).entries()) <= 24 * KiB
        assert os.path.getsize(meter) * 4096 <= 24 * KiB


def test_clear_leaves_nothing_and_writers_go_on(tmp_path: Path) -> None:
    """Also in the middle of a write; what other users and other programs have there stays."""
    folder = folder_of(tmp_path)
    assert folder.clear().num_evicted == 0
    put(folder, "aa", 9 * KiB)
    (tmp_path / "cache" / "other").write_bytes(b"x")
    with pytest.raises(FileNotFoundError), folder.writing("bb", 9 * KiB):
        cleared = folder.clear()
    assert (cleared.num_evicted, cleared.cached_bytes) == (1, 12 * KiB)
    assert sorted(os.listdir(tmp_path / "cache")) == ["other", home(tmp_path).name]
    assert os.listdir(home(tmp_path)) == []
    put(folder, "bb", 9 * KiB)
    assert names(folder) == {"bb"}


def test_a_bad_entry_is_removed_only_if_it_is_still_the_one(tmp_path: Path) -> None:
    """Another process may have put a good one into its place meanwhile."""
    folder = folder_of(tmp_path)
    put(folder, "aa", 100)
    bad = identity_of(folder.path("aa").stat())
    put(folder, "aa", 100)
    folder.discard("aa", bad)
    assert names(folder) == {"aa"}
    folder.discard("aa", identity_of(folder.path("aa").stat()))
    assert names(folder) == set()
    folder.discard("aa", bad)


# -- the fetcher with a cache ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good() -> tuple[MemoryStore, Index]:
    """Six shards of 30 rows."""
    return numbered([ROWS] * NUM_SHARDS)


class Cached:
    """A fetcher with a cache, and what it saw."""

    def __init__(self, good: tuple[MemoryStore, Index], folder: CacheFolder, mode: Any, script: Any = ()) -> None:
        store, index = good
        self.clock = FakeClock()
        self.rig = Rig(FaultyStore(MemoryStore(store.objects), script), index, clock=self.clock)
        self.folder = folder
        self.mode = mode
        self.new_process()

    def new_process(self) -> None:
        """From now on use a fetcher that has seen nothing of the cache yet."""
        self.cache = NodeCache(self.folder, mode=self.mode, clock=self.rig.clock)
        self._begin(Pass())

    def begin_pass(self) -> None:
        """From now on use a fetcher of a new pass, whose entries may not go."""
        own = self.cache.shards_of(self.rig.index, np.arange(self.rig.index.num_shards))
        self._begin(Pass((own,), unix_ns()))

    def _begin(self, reader: Pass) -> None:
        rig = self.rig
        self.fetcher = Fetcher(
            rig.store,
            rig.index,
            rig.dataset_schema,
            retry=rig.retry,
            clock=rig.clock,
            cancelled=rig.cancelled,
            counters=rig.counters,
            emit=rig.emit,
            cache=self.cache,
            reader=reader,
        )

    def is_right(self, shard: int = 1) -> bool:
        got = ids_of(self.fetcher.fetch(shard).columns())
        return got == list(range(shard * ROWS, (shard + 1) * ROWS))

    def entry(self, shard: int = 1) -> Path:
        suffix = {"raw": "raw", "compressed": "object"}[self.mode]
        return self.folder.path(f"{self.rig.index.digests[shard]}.{suffix}")

    @property
    def gets(self) -> int:
        assert isinstance(self.rig.store, FaultyStore)
        return len(self.rig.store.gets)

    @property
    def counts(self) -> tuple[float, ...]:
        stats = self.rig.stats
        return tuple(stats[f"cache_{name}"] for name in ("hits", "misses", "damaged", "evicted"))


@pytest.fixture(params=MODES)
def cached(request: pytest.FixtureRequest, tmp_path: Path, good: tuple[MemoryStore, Index]) -> Cached:
    return Cached(good, folder_of(tmp_path), request.param)


def test_a_shard_is_fetched_once(cached: Cached) -> None:
    """A miss and then hits, in this process and in others; the bytes that were stored are counted."""
    for expected in ((0, 1, 0, 0), (1, 1, 0, 0)):
        assert cached.is_right()
        assert cached.counts == expected
    cached.new_process()
    assert cached.is_right()
    assert (cached.gets, cached.counts, cached.rig.events) == (1, (2, 1, 0, 0), [])
    assert cached.rig.stats["bytes_cached"] == cached.entry().stat().st_size


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def empty_out(path: Path) -> None:
    path.write_bytes(b"")


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_bytes(b"x")


def become_a_link(path: Path) -> None:
    target = path.parent.parent / "target"
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target)


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: Final = (flip, cut, lengthen, empty_out, become_a_folder, become_a_link, become_a_pipe)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_noticed_and_mended(cached: Cached, damage: Callable[[Path], None]) -> None:
    """One event that names entry and shard, one more GET, the right rows, and a good entry in its place."""
    assert cached.is_right()
    damage(cached.entry())
    cached.new_process()
    assert watched(cached.is_right)
    (event,) = cached.rig.events
    assert isinstance(event, CacheDamaged)
    assert event.path == str(cached.entry())
    assert event.url == "fake://store/001.pt.zst"
    assert cached.counts == (0, 2, 1, 0)
    cached.new_process()
    assert cached.is_right()
    assert cached.gets == 2


def test_the_entry_of_another_shard_is_noticed(cached: Cached) -> None:
    """A whole, valid entry under the wrong name is not taken for the right one."""
    assert cached.is_right(1)
    assert cached.is_right(2)
    shutil.copy(cached.entry(2), cached.entry(1))
    cached.new_process()
    assert cached.is_right(1)
    assert cached.counts == (0, 3, 1, 0)


def test_an_entry_that_is_written_to_is_verified_again(cached: Cached) -> None:
    """Also by a process that has verified it before."""
    assert cached.is_right()
    assert cached.is_right()
    flip(cached.entry())
    assert cached.is_right()
    assert cached.counts == (1, 2, 1, 0)


def test_damage_under_a_reader_costs_a_fetch_and_no_row(tmp_path: Path, good: tuple[MemoryStore, Index]) -> None:
    """A file that is cut after it was opened and verified: its rows come from the store, and the entry is removed."""
    cached = Cached(good, folder_of(tmp_path), "raw")
    reader = cached.fetcher.fetch(1)
    os.truncate(cached.entry(), 100)
    assert ids_of(reader.columns()) == list(range(ROWS, 2 * ROWS))
    assert (cached.gets, cached.counts[2]) == (2, 1)
    assert not cached.entry().exists()


def rows_of(readers: Sequence[ShardReader]) -> list[int]:
    return [number for reader in readers for number in ids_of(reader.columns())]


def test_eviction_does_not_disturb_readers(tmp_path: Path, good: tuple[MemoryStore, Index]) -> None:
    """Readers opened before their entries were evicted give every row, without the store."""
    cached = Cached(good, folder_of(tmp_path), "raw")
    readers = [cached.fetcher.fetch(shard) for shard in range(NUM_SHARDS)]
    cached.folder.clear()
    assert rows_of(readers) == list(range(ROWS * NUM_SHARDS))
    assert (cached.gets, cached.rig.events) == (NUM_SHARDS, [])


def test_more_open_entries_than_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: tuple[MemoryStore, Index]
) -> None:
    """Beyond a number of them, entries are opened for each read; all descriptors are given back."""
    monkeypatch.setattr("streamshards.engine.cache._MAX_OPEN", 2)
    cached = Cached(good, folder_of(tmp_path), "raw")
    before = num_descriptors(tmp_path)
    readers = [cached.fetcher.fetch(shard) for shard in range(NUM_SHARDS)]
    assert num_descriptors(tmp_path) == before + 2
    assert rows_of(readers) == list(range(ROWS * NUM_SHARDS))
    del readers
    assert num_descriptors(tmp_path) == before


def test_an_entry_that_fails_after_its_dataset_was_replaced_is_told_as_such(
    tmp_path: Path, good: tuple[MemoryStore, Index]
) -> None:
    """The reader turns to the store, which has another dataset now: no loss of one shard, and never skipped."""
    cached = Cached(good, folder_of(tmp_path), "raw")
    store = cached.rig.store = MemoryStore(good[0].objects)
    cached.new_process()
    reader = cached.fetcher.fetch(1)
    os.truncate(cached.entry(), 200)
    store.objects.clear()
    store.objects.update(numbered([7])[0].objects)
    with pytest.raises(DatasetReplaced, match="replaced while it was read"):
        reader.columns()


def test_an_entry_that_is_opened_for_each_read_may_go_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: tuple[MemoryStore, Index]
) -> None:
    """Its rows then come from the store, and that is no damage; the same if another file has taken its place."""
    monkeypatch.setattr("streamshards.engine.cache._MAX_OPEN", 0)
    cached = Cached(good, folder_of(tmp_path), "raw")
    readers = [cached.fetcher.fetch(shard) for shard in range(NUM_SHARDS)]
    cached.folder.clear()
    assert cached.is_right(0), "it is stored again"
    assert rows_of(readers) == list(range(ROWS * NUM_SHARDS))
    assert (cached.gets, cached.rig.events) == (NUM_SHARDS + 1 + NUM_SHARDS, [])
    assert cached.entry(0).exists()


def test_open_entries_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones and more than there may be descriptors: what readers of decoded entries hold is less than the bytes
    that the shards take in the store, which is what ``memory_bytes`` counts for them."""
    monkeypatch.setattr("streamshards.engine.cache._MAX_OPEN", 8)
    rng = torch.Generator().manual_seed(1)
    noise = [torch.randn(8_000, generator=rng) for _ in range(24)]
    store, index = dataset_of([[{"id": number, "x": values}] for number, values in enumerate(noise)])
    cached = Cached((store, index), folder_of(tmp_path), "raw")
    for shard in range(24):
        cached.fetcher.fetch(shard)
    cached.new_process()
    tracemalloc.start()
    try:
        readers = [cached.fetcher.fetch(shard) for shard in range(24)]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cached.counts == (24, 24, 0, 0)
    assert held < int(index.sizes.sum()) // 2
    assert [ids_of(reader.columns()) for reader in readers] == [[number] for number in range(24)]


def half(good: tuple[MemoryStore, Index], mode: str) -> int:
    """Return the bytes of disk that half of the shards take."""
    store, index = good
    shards = [store.objects[name] for name in index.names]
    sizes = [len(data) if mode == "compressed" else raw_size(frames_of(data)) for data in shards]
    return sum(disk_bytes(size) for size in sizes) // 2


def test_a_full_cache_keeps_what_it_has_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: tuple[MemoryStore, Index]
) -> None:
    """Half of the shards fit. The others are counted and told to nobody, and only the first of them in a pass has the
    folder looked through; in the next pass, and after a while, that is done once more."""
    looks: list[int] = []
    entries = CacheFolder.entries

    def looked(folder: CacheFolder) -> list[Entry]:
        looks.append(1)
        return entries(folder)

    monkeypatch.setattr(CacheFolder, "entries", looked)
    cached = Cached(good, folder_of(tmp_path, budget_bytes=half(good, "raw")), "raw")
    kept = NUM_SHARDS // 2
    for passes in range(1, 4):
        cached.begin_pass()
        for _ in range(3):
            assert all(cached.is_right(shard) for shard in range(NUM_SHARDS))
        assert cached.rig.stats["cache_full"] == 3 * passes * (NUM_SHARDS - kept)
        assert len(looks) == passes + 1, "the first scan of a process, and one a pass"
    assert cached.counts == (kept * 8, kept * 10, 0, 0)
    assert cached.rig.events == []
    assert not cached.clock.wait(threading.Event(), PAUSE_S)
    assert all(cached.is_right(shard) for shard in range(NUM_SHARDS))
    assert len(looks) == 5


def test_threads_that_find_it_full_at_once_look_through_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: tuple[MemoryStore, Index]
) -> None:
    """Those that wait for the first to look believe it."""
    looks: list[int] = []
    entries = CacheFolder.entries
    new = home(tmp_path) / FORMAT / "new"
    kept = NUM_SHARDS // 2

    def looked(folder: CacheFolder) -> list[Entry]:
        looks.append(1)
        if len(looks) > 1:
            until(lambda: len(os.listdir(new)) == NUM_SHARDS - kept)
        return entries(folder)

    monkeypatch.setattr(CacheFolder, "entries", looked)
    cached = Cached(good, folder_of(tmp_path, budget_bytes=half(good, "raw")), "raw")
    cached.begin_pass()
    assert all(cached.is_right(shard) for shard in range(kept))
    rest = range(kept, NUM_SHARDS)
    threads = [threading.Thread(target=cached.is_right, args=(shard,), daemon=True) for shard in rest]
    for thread in threads:
        thread.start()
    join_all(threads)
    assert len(looks) == 2, "the first scan of a process, and one that finds it full"
    assert cached.rig.stats["cache_full"] == NUM_SHARDS - kept


def test_room_that_somebody_makes_is_taken_at_once(tmp_path: Path, good: tuple[MemoryStore, Index]) -> None:
    """Also in a pass that has found the cache full; and if others fill the disk, it shrinks in that pass."""
    cached = Cached(good, folder_of(tmp_path, budget_bytes=half(good, "raw")), "raw")
    cached.begin_pass()
    assert all(cached.is_right(shard) for shard in range(NUM_SHARDS))
    assert not cached.entry(5).exists()
    cached.folder.clear()
    assert cached.is_right(5)
    assert cached.entry(5).exists()
    assert all(cached.is_right(shard) for shard in range(NUM_SHARDS))
    assert cached.counts[3] == 0
    cached.folder._keep_free_bytes = 2 * shutil.disk_usage(tmp_path).free
    assert all(cached.is_right(shard) for shard in range(NUM_SHARDS))
    assert cached.counts[3] == NUM_SHARDS // 2


def test_threads_that_evict_each_others_entries(tmp_path: Path, good: tuple[MemoryStore, Index]) -> None:
    """Four threads over a cache of two shards, in both modes: every row is right, nothing is reported."""
    budget = 2 * disk_bytes(raw_size(frames_of(good[0].objects["001.pt.zst"])))
    for mode in MODES:
        cached = Cached(good, folder_of(tmp_path, budget_bytes=budget), mode)
        wrong: list[int] = []

        def work(seed: int, cached: Cached = cached, wrong: list[int] = wrong) -> None:
            rng = random.Random(seed)
            for _ in range(60):
                shard = rng.randrange(NUM_SHARDS)
                if not cached.is_right(shard):
                    wrong.append(shard)

        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
        for thread in threads:
            thread.start()
        join_all(threads)
        assert (wrong, cached.rig.events) == ([], [])
        assert cached.counts[0] + cached.counts[1] == 240
        assert cached.counts[3] > 0


# -- a folder that cannot be used --------------------------------------------------------------------------------------


def unsafe(tmp_path: Path) -> None:
    home(tmp_path).mkdir(parents=True)
    home(tmp_path).chmod(0o755)


def a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")


def a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(tmp_path / "nowhere" / "at all")


def a_file_inside(tmp_path: Path) -> None:
    home(tmp_path).mkdir(parents=True, mode=0o700)
    (home(tmp_path) / FORMAT).write_bytes(b"")


@pytest.mark.parametrize("spoil", [unsafe, a_file, a_dangling_link, a_file_inside])
def test_a_folder_that_cannot_be_used_is_told_once(
    tmp_path: Path, cached: Cached, spoil: Callable[[Path], None]
) -> None:
    """One CacheOff event; every shard comes from the store, right."""
    spoil(tmp_path)
    assert all(cached.is_right(shard) for shard in [*range(NUM_SHARDS)] * 2)
    (event,) = cached.rig.events
    assert isinstance(event, CacheOff)
    assert str(tmp_path) in str(event)
    assert cached.gets == 2 * NUM_SHARDS


def test_a_folder_of_entries_that_is_none_is_told_once(cached: Cached) -> None:
    """A file where the folder of some entries should be: they come from the store, and others from the cache."""
    assert cached.is_right(0)
    cached.entry(1).parent.write_bytes(b"")
    assert cached.is_right(1)
    assert cached.is_right(1)
    assert cached.is_right(0)
    (event,) = cached.rig.events
    assert isinstance(event, CacheOff)
    assert "Not a directory" in event.cause
    assert cached.counts == (1, 3, 0, 0)


def test_storing_is_tried_again_after_a_pause(tmp_path: Path, good: tuple[MemoryStore, Index]) -> None:
    """A disk that was full may have room later; until then nothing is tried."""
    folder = folder_of(tmp_path, keep_free_bytes=2 * shutil.disk_usage(tmp_path).free)
    cached = Cached(good, folder, "compressed")
    assert cached.is_right()
    folder._keep_free_bytes = 0
    assert cached.is_right()
    assert not cached.entry().exists()
    assert not cached.clock.wait(threading.Event(), PAUSE_S)
    assert cached.is_right()
    assert cached.entry().exists()
    assert len(cached.rig.events) == 1


SMALL_DISK: Final = """
import resource
import sys
from pathlib import Path
from streamshards.engine.cachefolder import CacheFolder
from tests.engine.rig import numbered
from tests.engine.test_cache import MODES, NUM_SHARDS, Cached
disk, case = Path(sys.argv[1]), sys.argv[2]
if case == "others fill it":
    filler = open(disk / "filler", "wb", buffering=0)
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
if case == "no large file":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for mode in MODES:
    cached = Cached(numbered([30] * NUM_SHARDS), CacheFolder(str(disk), budget_bytes=1 << 50, keep_free_bytes=0), mode)
    assert all(cached.is_right(shard) for shard in [*range(NUM_SHARDS)] * 2)
    assert all(cached.is_right(shard) for shard in [NUM_SHARDS - 1] * 2)
    print(mode, [str(event) for event in cached.rig.events], cached.rig.stats["cache_hits"] > 0)
    assert not list(disk.rglob("*.tmp")), "nothing is left behind"
    cached.folder.clear()
"""


@pytest.mark.parametrize(
    ("case", "told", "hits"),
    [
        ("small", "", True),
        ("others fill it", "bytes are free on the disk|No space left", False),
        ("no large file", "File too large", False),
    ],
)
def test_a_disk_that_is_full_costs_nothing_but_the_cache(tmp_path: Path, case: str, told: str, hits: bool) -> None:
    """On a real file system of 96 KiB all rows are right and no file is left behind.

    What fits of the cache is used. If nothing does, or writing fails, there is one event.
    """
    script = 'mount -t tmpfs -o size=96k none "$1" && shift && exec "$@"'
    mounted = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs in a namespace of our own is not permitted here")
    command = [*mounted, sys.executable, "-c", SMALL_DISK, str(tmp_path), case]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert re.search(told, line)
        assert ("[]" in line) == (not told)
        assert line.count("the node cache is off") == (told != "")
        assert line.endswith(str(hits)), line
    assert len(done.stdout.splitlines()) == len(MODES)
