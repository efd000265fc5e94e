"""The node cache behind a dataset: the same samples with and without, whoever shares it, whoever is killed."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import pytest
import torch

import streamshards as ss
from streamshards.convert.indexing import build_index
from streamshards.engine.cachefolder import CacheFolder
from streamshards.events import CacheDamaged, CacheOff, Event
from streamshards.runtime import cache_directory
from tests.conftest import StoreUrl
from tests.datasets import assert_same, flat, ids, sample, write
from tests.pt_files import fill

NUM_SAMPLES: Final = 1200
MODES: Final = ("raw", "compressed")
SEED: Final = 11


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset") / "train"
    write(str(folder), range(NUM_SAMPLES))
    return str(folder)


@pytest.fixture(params=MODES)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> ss.CacheOptions:
    return cache_in(tmp_path, request.param)


def cache_in(tmp_path: Path, mode: Any = "raw", **changes: Any) -> ss.CacheOptions:
    return ss.CacheOptions(directory=tmp_path / "cache", mode=mode, keep_free_bytes=0, **changes)


def assert_equal(actual: Any, expected: Any) -> None:
    """Check that two batches are equal, bit for bit and type for type; lists of tensors, too."""
    if isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_equal(actual[key], value)
    else:
        assert_same(actual, expected)


def entries(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".raw", ".object")]


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_samples_are_the_same_with_and_without(store_url: StoreUrl, cache: ss.CacheOptions) -> None:
    """Every field kind, on every kind of store, in the epoch that fills the cache and in the one that uses it."""
    url, storage_options = store_url
    write(url, range(300), storage_options=storage_options)
    ds = ss.StreamingDataset(url, storage_options=storage_options, cache=cache)
    for _ in range(2):
        for number, got in enumerate(list(ds)):
            assert_same(got, sample(number))


def test_batches_are_the_same_with_and_without(url: str, cache: ss.CacheOptions) -> None:
    """Shuffled, in batches, some columns only, a part of the dataset: bit for bit, in both epochs."""
    for options in ({}, {"columns": ["tokens", "meta"]}, {"tail": "uneven"}):
        how: dict[str, Any] = {"batch_size": 64, "shuffle": True, "seed": SEED, **options}
        plain = ss.StreamingDataset(url, **how).split(0.7)[0]
        cached = ss.StreamingDataset(url, cache=cache, **how).split(0.7)[0]
        for _ in range(2):
            for expected, got in zip(plain, cached, strict=True):
                assert_equal(got, expected)


def test_the_second_epoch_needs_no_store(tmp_path: Path, cache: ss.CacheOptions) -> None:
    """With the store gone, the second epoch is right; decoded shards are not decoded again."""
    url = str(tmp_path / "train")
    write(url, range(600))
    ds = ss.StreamingDataset(url, batch_size=50, shuffle=True, seed=SEED, cache=cache)
    plain = ss.StreamingDataset(url, batch_size=50, shuffle=True, seed=SEED)
    expected = [list(plain), list(plain)]
    assert_equal(list(ds)[3], expected[0][3])
    first = ds.stats()
    assert (first["cache_hits"], first["cache_misses"]) == (0, ds.index.num_shards)
    assert first["shards_read"] == ds.index.num_shards
    shutil.rmtree(url)
    for got, want in zip(ds, expected[1], strict=True):
        assert_equal(got, want)
    second = ds.stats()
    assert (second["shards_read"], second["bytes_read"]) == (first["shards_read"], first["bytes_read"])
    assert (second["cache_hits"], second["cache_misses"]) == (ds.index.num_shards, ds.index.num_shards)
    decoded = second["bytes_decoded"] - first["bytes_decoded"]
    assert decoded == (0 if cache.mode == "raw" else first["bytes_decoded"])
    assert second["bytes_cached"] == sum(path.stat().st_size for path in entries(tmp_path))


def test_foreign_files_are_kept_as_they_came(tmp_path: Path, cache: ss.CacheOptions) -> None:
    """Files that someone else wrote: the same samples, in both modes, also without the store."""
    src = fill(tmp_path / "src", "columns")
    build_index(str(src))
    plain = list(ss.StreamingDataset(str(src)))
    ds = ss.StreamingDataset(str(src), cache=cache)
    for epoch in range(2):
        for got, want in zip(ds, plain, strict=True):
            assert_equal(got, want)
        if not epoch:
            shutil.rmtree(src)
    assert {path.suffix for path in entries(tmp_path)} == {".object"}


def test_single_samples_come_through_the_cache(url: str, cache: ss.CacheOptions) -> None:
    """``ds[i]`` uses and fills it."""
    for expected in (0, 1):
        ds = ss.StreamingDataset(url, cache=cache)
        assert_same(ds[777], sample(777))
        assert ds.stats()["cache_hits"] == expected


def test_mixtures_use_the_caches_of_their_sources(tmp_path: Path, url: str, cache: ss.CacheOptions) -> None:
    """Each source has its own options; here one has a cache."""
    write(str(tmp_path / "other"), range(5000, 5300))

    def mixture(cache: ss.CacheOptions | None) -> ss.Mixture:
        sources = {
            "a": ss.StreamingDataset(url, batch_size=20, cache=cache),
            "b": ss.StreamingDataset(str(tmp_path / "other"), batch_size=20),
        }
        return ss.Mixture(sources, weights={"a": 0.5, "b": 0.5}, stop=400)

    mixed = mixture(cache)
    for got, want in zip(mixed, mixture(None), strict=True):
        assert_equal(got, want)
    assert mixed.sources["a"].stats()["cache_misses"] > 0
    assert mixed.sources["b"].stats()["cache_misses"] == 0


# -- who shares it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_share_it(url: str, tmp_path: Path, context: str) -> None:
    """Workers made by fork, from a process that has used it, and by spawn: same batches, hits in the second epoch."""
    how: dict[str, Any] = {"batch_size": 40, "shuffle": True, "seed": SEED}
    how["order"] = ss.OrderOptions(lanes=2)
    expected = ss.StreamingDataset(url, **how)
    ds = ss.StreamingDataset(url, cache=cache_in(tmp_path), **how)
    assert ids([next(iter(ds))]) == ids([next(iter(expected))])
    loader = ss.StreamingDataLoader(ds, num_workers=2, multiprocessing_context=context)
    for _ in range(2):
        assert ids(loader) == ids(expected)
    assert ds.stats()["cache_hits"] >= ds.index.num_shards
    assert ds.stats()["shards_read"] <= ds.index.num_shards + 2 * 2, "two readers may meet at a border, once"


def test_datasets_share_it(tmp_path: Path, url: str, cache: ss.CacheOptions) -> None:
    """Two datasets in one folder, and a copy of the first at another url, which finds all its shards."""
    other, copy = str(tmp_path / "other"), str(tmp_path / "copy")
    write(other, range(3000, 3300))
    shutil.copytree(url, copy)
    for place, first in ((url, 0), (other, 3000)):
        for got in ss.StreamingDataset(place, cache=cache):
            assert_same(got, sample(first))
            first += 1
    ds = ss.StreamingDataset(copy, cache=cache)
    assert [got["id"] for got in ds] == list(range(NUM_SAMPLES))
    assert ds.stats()["shards_read"] == 0


def test_it_is_not_pickled(url: str, cache: ss.CacheOptions) -> None:
    """Options travel, what a process holds does not."""
    ds = ss.StreamingDataset(url, cache=cache)
    assert len(list(ds)) == NUM_SAMPLES
    again = pickle.loads(pickle.dumps(ds))
    assert [got["id"] for got in again] == list(range(NUM_SAMPLES))
    assert again.stats()["shards_read"] == 0, "all hits"


def test_no_descriptor_is_left(url: str, cache: ss.CacheOptions) -> None:
    """After whole epochs, and after leaving one in the middle."""
    ds = ss.StreamingDataset(url, batch_size=10, cache=cache)
    assert len(list(ds)) == NUM_SAMPLES / 10
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert len(list(ds)) == NUM_SAMPLES / 10
        iterator = iter(ds)
        next(iterator)
        del iterator
    assert len(os.listdir("/proc/self/fd")) <= len(before)


# -- smaller than the data ---------------------------------------------------------------------------------------------


def disk_of(*urls: str, mode: Any, place: Path) -> int:
    """Return the disk that all shards of some datasets take in a cache."""
    options = cache_in(place, mode)
    for url in urls:
        for _ in ss.StreamingDataset(url, cache=options):
            pass
    folder = CacheFolder(str(options.directory), budget_bytes=1, keep_free_bytes=0)
    return sum(entry.nbytes for entry in folder.entries())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_half_a_cache_gives_half_the_hits(tmp_path: Path, url: str, mode: Any, shuffle: bool) -> None:
    """From the second epoch on, shuffled as well as in order; nothing is evicted, and nothing is told."""
    budget = disk_of(url, mode=mode, place=tmp_path / "whole") // 2
    events: list[Event] = []
    options = cache_in(tmp_path, mode, budget_bytes=budget)
    ds = ss.StreamingDataset(url, batch_size=50, shuffle=shuffle, seed=SEED, cache=options, observer=events.append)
    hits = [0]
    for _ in range(3):
        assert sum(len(batch["id"]) for batch in ds) == NUM_SAMPLES
        hits.append(int(ds.stats()["cache_hits"]))
    rates = [(after - before) / ds.index.num_shards for before, after in itertools.pairwise(hits)]
    assert rates[0] == 0
    assert min(rates[1:]) >= 0.45
    assert (ds.stats()["cache_evicted"], events) == (0, [])
    assert 0 < ds.stats()["cache_full"] <= ds.stats()["cache_misses"] - len(entries(tmp_path))


def test_single_samples_keep_what_is_there(tmp_path: Path, url: str) -> None:
    """``ds[i]`` over a dataset of twice the cache: half of its shards are hits the second time."""
    options = cache_in(tmp_path, budget_bytes=disk_of(url, mode="raw", place=tmp_path / "whole") // 2)
    for lowest in (0.0, 0.45):
        ds = ss.StreamingDataset(url, cache=options)
        for number in range(NUM_SAMPLES):
            assert int(ds[number]["id"]) == number
        assert ds.stats()["cache_hits"] / ds.index.num_shards >= lowest
        assert ds.stats()["cache_evicted"] == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_and_validation_in_turn_leave_each_other_alone(tmp_path: Path, url: str, num_workers: int) -> None:
    """In one process, and in workers that are made anew for each epoch: once both have been read, nothing is evicted,
    validation is all hits, and training has those that the rest of the cache can give."""
    other = str(tmp_path / "other")
    write(other, range(5000, 5000 + NUM_SAMPLES // 4))
    budget = disk_of(url, other, mode="raw", place=tmp_path / "whole") * 6 // 10
    options = cache_in(tmp_path, budget_bytes=budget)
    train, valid = (ss.StreamingDataset(place, batch_size=50, shuffle=True, cache=options) for place in (url, other))
    loaders = [ss.StreamingDataLoader(ds, num_workers=num_workers) for ds in (train, valid)]
    for epoch in range(4):
        if epoch == 1:
            evicted = train.stats()["cache_evicted"], valid.stats()["cache_evicted"]
            before = train.stats()["cache_hits"]
        for loader in loaders:
            ids(loader)
    assert (train.stats()["cache_evicted"], valid.stats()["cache_evicted"]) == evicted
    assert valid.stats()["cache_hits"] == 3 * valid.index.num_shards
    share = 0.6 * 1.25 - 0.25
    assert (train.stats()["cache_hits"] - before) / 3 / train.index.num_shards >= share - 0.1


def test_a_dataset_that_nobody_reads_any_more_gives_way(tmp_path: Path, url: str) -> None:
    """The next one, of the cache's size, is stored in its first epoch, and all hits in the second."""
    other = str(tmp_path / "other")
    write(other, range(5000, 5000 + NUM_SAMPLES // 4))
    options = cache_in(tmp_path, budget_bytes=disk_of(other, mode="raw", place=tmp_path / "whole") * 11 // 10)
    for _ in ss.StreamingDataset(url, cache=options):
        pass
    ds = ss.StreamingDataset(other, cache=options)
    for _ in range(2):
        assert len(list(ds)) == NUM_SAMPLES // 4
    assert ds.stats()["cache_evicted"] > 0
    assert ds.stats()["cache_hits"] == ds.index.num_shards


def test_the_sources_of_a_mixture_leave_each_other_alone(tmp_path: Path, url: str) -> None:
    """Its passes may be so short that they use few shards of each: still all of them are its own."""
    other = str(tmp_path / "other")
    write(other, range(5000, 5000 + NUM_SAMPLES))
    options = cache_in(tmp_path, budget_bytes=disk_of(url, other, mode="raw", place=tmp_path / "whole") // 2)
    sources = {name: ss.StreamingDataset(place, cache=options) for name, place in (("a", url), ("b", other))}
    order = ss.OrderOptions(shuffle_block=50)
    mixed = ss.Mixture(sources, weights={"a": 0.5, "b": 0.5}, stop=200, batch_size=50, order=order)
    for _ in range(24):
        for _ in mixed:
            pass
    stats = mixed.stats()
    assert stats["cache_evicted"] == 0
    assert stats["cache_full"] > 0


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "zip"},
        {"budget_bytes": 0},
        {"budget_bytes": "much"},
        {"keep_free_bytes": -1},
        {"keep_free_bytes": False},
        {"directory": ""},
        {"directory": 3},
        {"directory": "s3://bucket/cache"},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    """At once, with the value."""
    with pytest.raises(ss.OptionInvalid, match=next(iter(wrong))):
        ss.CacheOptions(**wrong)


def test_cache_must_be_options(url: str) -> None:
    """A path or True is not enough to say."""
    with pytest.raises(ss.OptionInvalid, match="CacheOptions"):
        ss.StreamingDataset(url, cache=True)  # type: ignore[arg-type]  # the mistake


def test_options_are_right_once_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are bytes, a relative folder is absolute, ``~`` is the home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    options = ss.CacheOptions(directory="here", budget_bytes="2GiB", keep_free_bytes=0)
    assert (options.directory, options.budget_bytes, options.keep_free_bytes) == (str(tmp_path / "here"), 2 << 30, 0)
    assert ss.CacheOptions(directory="~/cache").directory == "/home/someone/cache"


def test_the_default_folder_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME, if it is an absolute path, else the home's .cache; asked when it is needed."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == "/home/someone/.cache/streamshards"
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/me")
    assert cache_directory() == "/scratch/me/streamshards"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == "/home/someone/.cache/streamshards"
    assert cache_directory("/chosen") == "/chosen"


# -- when it cannot be used --------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_used_costs_one_warning(url: str, tmp_path: Path) -> None:
    """A file where the folder should be: one event, every sample."""
    (tmp_path / "cache").write_bytes(b"")
    events: list[Event] = []
    ds = ss.StreamingDataset(url, cache=cache_in(tmp_path), observer=events.append)
    for _ in range(2):
        assert [got["id"] for got in ds] == list(range(NUM_SAMPLES))
    assert [type(event) for event in events] == [CacheOff]


def test_a_read_only_folder_is_read(tmp_path: Path, url: str, cache: ss.CacheOptions) -> None:
    """What is there is used; what is not cannot be stored: one event."""
    if os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder; see the test with a read-only mount")
    assert len(list(ss.StreamingDataset(url, cache=cache))) == NUM_SAMPLES
    victim = entries(tmp_path)[0]
    victim.unlink()
    folders = [tmp_path / "cache", *(path for path in (tmp_path / "cache").rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        _check_read_only(url, cache)
    finally:
        for folder in folders:
            folder.chmod(0o700)


def _check_read_only(url: str, cache: ss.CacheOptions) -> None:
    events: list[Event] = []
    ds = ss.StreamingDataset(url, cache=cache, observer=events.append)
    assert [got["id"] for got in ds] == list(range(NUM_SAMPLES))
    assert [type(event) for event in events] == [CacheOff]
    assert ds.stats()["cache_misses"] == 1
    assert ds.stats()["cache_hits"] == ds.index.num_shards - 1


READ_ONLY: Final = """
import sys
import streamshards as ss
from tests.test_node_cache import _check_read_only
_check_read_only(sys.argv[1], ss.CacheOptions(directory=sys.argv[2], mode=sys.argv[3], keep_free_bytes=0))
"""


def test_a_read_only_disk_is_read(tmp_path: Path, url: str, cache: ss.CacheOptions) -> None:
    """The same on a disk that is mounted read-only."""
    import subprocess
    import sys

    assert len(list(ss.StreamingDataset(url, cache=cache))) == NUM_SAMPLES
    entries(tmp_path)[0].unlink()
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    mounted = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", str(tmp_path / "cache")]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting in a namespace of our own is not permitted here")
    command = [*mounted, sys.executable, "-c", READ_ONLY, url, str(cache.directory), cache.mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr


def test_damage_is_mended_and_told(tmp_path: Path, url: str, cache: ss.CacheOptions) -> None:
    """Each bad entry is one event and one fetch in the run that finds them; no sample is lost; the next run has all."""
    assert len(list(ss.StreamingDataset(url, cache=cache))) == NUM_SAMPLES
    rng = random.Random(3)
    bad = sorted(entries(tmp_path))[::2]
    for path in bad:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1
        path.write_bytes(data)
    events: list[Event] = []
    ds = ss.StreamingDataset(url, cache=cache, observer=events.append)
    for number, got in enumerate(ds):
        assert_same(got, sample(number))
    assert sorted(event.path for event in events if isinstance(event, CacheDamaged)) == [str(path) for path in bad]
    assert len(events) == ds.stats()["cache_damaged"] == ds.stats()["shards_read"] == len(bad)
    ds = ss.StreamingDataset(url, cache=cache)
    assert len(list(ds)) == NUM_SAMPLES
    assert ds.stats()["cache_hits"] == ds.index.num_shards


# -- killed at any instant ---------------------------------------------------------------------------------------------

NUM_KILLS: Final = 60
NUM_EPOCHS: Final = 3
_forkserver = multiprocessing.get_context("forkserver")


def _train(url: str, cache: ss.CacheOptions, expected: list[list[int]], started: Connection) -> None:
    """Go through epochs for ever, and check each sample; exit with 3 when one is wrong."""
    try:
        torch.set_num_threads(1)
        events: list[Event] = []
        ds = ss.StreamingDataset(
            url, batch_size=50, shuffle=True, seed=SEED, cache=cache, observer=events.append, on_corrupt="raise"
        )
        while True:
            for epoch in range(NUM_EPOCHS):
                ds.set_epoch(epoch)
                started.send_bytes(b"epoch")
                _check_epoch(ds, expected[epoch])
                if events:
                    raise AssertionError(events)
    except BaseException:  # noqa: BLE001 - whatever it is, the exit code tells
        import traceback

        traceback.print_exc()
        os._exit(3)


def _check_epoch(ds: ss.StreamingDataset, expected: list[int]) -> None:
    got = list(ds)
    assert flat(ids(got)) == expected
    for batch in got:
        numbers = batch["id"].tolist()
        assert batch["text"] == [f"sample {number} - ümläut" for number in numbers]
        assert torch.equal(batch["x"][:, 1], -batch["id"].float())
        assert all(
            torch.equal(t, torch.arange(n % 11, dtype=torch.int32) + n)
            for t, n in zip(batch["tokens"], numbers, strict=True)
        )


@contextlib.contextmanager
def trainers(count: int, *args: Any) -> Iterator[list[tuple[Any, Connection]]]:
    """Run *count* of them; they are killed at the end."""
    running = []
    try:
        for _ in range(count):
            ours, theirs = _forkserver.Pipe(duplex=False)
            process = _forkserver.Process(target=_train, args=(*args, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append((process, ours))
        yield running
    finally:
        for process, ours in running:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            process.join()
            ours.close()


def _look(folder: CacheFolder, cache: ss.CacheOptions) -> int:
    """Return how many entries there are, and check that they are within the budget, unless an eviction is under way."""
    if not folder.require_safe():
        return 0
    with contextlib.suppress(FileNotFoundError), folder._meter.lock() as is_ours:
        if is_ours:
            found = folder.entries()
            assert sum(entry.nbytes for entry in found) <= int(cache.budget_bytes)
            return len(found)
    return 0


def kill_at_random(url: str, cache: ss.CacheOptions, folder: CacheFolder, *, num_kills: int, seed: int) -> int:
    """Kill trainers that share a cache until *num_kills* are dead; return how many entries were looked at."""
    rng = random.Random(seed)
    plain = ss.StreamingDataset(url, batch_size=50, shuffle=True, seed=SEED)
    expected = [flat(ids(plain)) for _ in range(NUM_EPOCHS)]
    killed = looked = 0
    while killed < num_kills:
        with trainers(rng.randint(2, 4), url, cache, expected) as running:
            wait([ours for _, ours in running])  # one has begun its first epoch
            until = time.monotonic() + rng.uniform(0, 0.25)
            while (left_s := until - time.monotonic()) > 0:  # the instant is what is random here
                for ours in wait([ours for _, ours in running], min(left_s, 0.02)):
                    ours.recv_bytes()
                looked += _look(folder, cache)
            for process, _ in rng.sample(running, len(running)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        assert [process.exitcode for process, _ in running] == [-signal.SIGKILL] * len(running)
        killed += len(running)
        if rng.random() < 0.3:  # a survivor finds it usable, and everything right
            events: list[Event] = []
            ds = ss.StreamingDataset(
                url, batch_size=50, shuffle=True, seed=SEED, cache=cache, observer=events.append, on_corrupt="raise"
            )
            for epoch in range(NUM_EPOCHS):
                _check_epoch(ds, expected[epoch])
            assert events == []
            assert ds.stats()["cache_hits"] > 0
            assert ds.stats()["bytes_cached"] + ds.stats()["cache_full"] > 0
    return looked


def test_killed_at_any_instant_the_cache_stays_right(tmp_path: Path, url: str, cache: ss.CacheOptions) -> None:
    """Processes that share a cache of half the dataset are killed with SIGKILL: every epoch of the others and of those
    that come after is exactly right, no entry is ever found damaged, the budget holds, and nothing piles up."""
    whole = cache_in(tmp_path / "whole", cache.mode)
    assert len(list(ss.StreamingDataset(url, cache=whole))) == NUM_SAMPLES
    size = CacheFolder(str(whole.directory), budget_bytes=1, keep_free_bytes=0).entries()
    cache = cache_in(tmp_path, cache.mode, budget_bytes=sum(entry.nbytes for entry in size) // 2)
    folder = CacheFolder(str(cache.directory), budget_bytes=int(cache.budget_bytes), keep_free_bytes=0)
    num_kills = int(os.environ.get("STREAMSHARDS_KILLS", NUM_KILLS))
    looked = kill_at_random(url, cache, folder, num_kills=num_kills, seed=num_kills)
    assert looked > 100
    done = folder.evict()
    assert done is not None
    assert not list((tmp_path / "cache").rglob("*.tmp")), "what the killed left behind is removed"
