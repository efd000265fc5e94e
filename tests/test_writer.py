"""The writer: shards in the background, one commit, and nothing to be seen until then."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from streamshards import ShardWriter
from streamshards.engine.catalog import load_index
from streamshards.errors import (
    AccessDenied,
    IndexInvalid,
    ObjectExists,
    OptionInvalid,
    SampleInvalid,
    StoreUnavailable,
    StreamShardsError,
)
from streamshards.events import Event
from streamshards.options import MiB, RetryOptions
from streamshards.plan.index import Index
from streamshards.shard.columns import to_samples
from streamshards.shard.payload import FramedShard, digest_of
from streamshards.shard.schema import Schema
from streamshards.storage import Store, open_store
from streamshards.testing import FakeClock, MemoryStore
from streamshards.writer import WriteProgress
from tests.datasets import assert_same, sample

QUICK: Final = RetryOptions(deadline_s=1e-3, first_contact_s=1e-3, base_s=1e-6, max_wait_s=1e-6)
"""One failure, and it is over."""


def index_of(store: Store) -> Index:
    return load_index(
        store, retry=RetryOptions(), clock=FakeClock(), cancelled=threading.Event(), on_retry=lambda _: None
    )


def read(store: Store) -> list[dict[str, Any]]:
    """Return every sample of the dataset, in order, each shard verified against the index."""
    index = index_of(store)
    schema = Schema.from_json(index.schema)
    samples: list[dict[str, Any]] = []
    for number, name in enumerate(index.names):
        data = store.get(name, timeout_s=60, max_bytes=int(index.sizes[number]))
        assert digest_of(data) == index.digests[number]
        assert len(data) == index.sizes[number]
        shard = FramedShard(data, name=name, max_raw_bytes=int(index.raw_sizes[number]))
        assert (shard.num_rows, shard.raw_bytes) == (index.rows[number], index.raw_sizes[number])
        samples += to_samples(shard.columns(schema))
    return samples


def ids(store: Store) -> list[int]:
    return [row["id"] for row in read(store)]


def names(store: Store) -> list[str]:
    return [name for name, _ in store.list()]


def write(store: Store, numbers: range, **options: Any) -> None:
    with ShardWriter(store.url, store=store, **{"shard_bytes": 2_000, **options}) as out:
        for number in numbers:
            out.write(sample(number))


class HookedStore(MemoryStore):
    """Calls ``hook(operation, key)`` before each put and delete; it may raise."""

    def __init__(self, hook: Callable[[str, str], None]) -> None:
        super().__init__()
        self.hook = hook

    def put(self, key: str, data: bytes | memoryview, *, timeout_s: float, if_absent: bool = False) -> None:
        self.hook("put", key)
        super().put(key, data, timeout_s=timeout_s, if_absent=if_absent)

    def delete(self, key: str, **how: Any) -> None:
        self.hook("delete", key)
        super().delete(key, **how)


def failing(kind: type[BaseException], operation: str = "put", matching: str = ".pt.zst") -> Callable[[str, str], None]:
    """Return a hook that fails every such operation."""

    def hook(done: str, key: str) -> None:
        if done == operation and matching in key:
            raise kind(f"no {operation} of {key}")

    return hook


@pytest.fixture
def threads_before() -> Iterator[set[threading.Thread]]:
    """The writer leaves no thread behind."""
    before = set(threading.enumerate())
    yield before
    assert {thread for thread in threading.enumerate() if thread.name.startswith("streamshards-")} <= before


# ---- what comes back -------------------------------------------------------------------------------------------------


def test_round_trip_on_every_store(store_url: Any, threads_before: set[threading.Thread]) -> None:
    """Many shards, every kind of field, appended to and replaced: disks, memory, two S3 servers."""
    store = open_store(store_url.url, store_url.storage_options)
    options = {"storage_options": store_url.storage_options, "shard_bytes": 3_000}
    with ShardWriter(store_url.url, **options) as out:
        for number in range(300):
            out.write(sample(number))
    assert out.index.num_shards > 10
    assert out.index.fingerprint == index_of(store).fingerprint
    assert out.index.num_samples == 300
    for number, row in enumerate(read(store)):
        assert_same(row, sample(number))
    with pytest.raises(OptionInvalid, match=r"a dataset of 300 samples is here.*append.*replace"):
        ShardWriter(store_url.url, **options)
    with ShardWriter(store_url.url, mode="append", **options) as out:
        for number in range(300, 350):
            out.write(sample(number))
    assert ids(store) == list(range(350))
    with ShardWriter(store_url.url, mode="replace", **options) as out:
        out.write(sample(7))
    assert ids(store) == [7]
    assert sorted(names(store)) == sorted([*out.index.names, "index.json"])


def test_the_order_is_that_of_writing(threads_before: set[threading.Thread]) -> None:
    """Uploads that end in the reverse order change nothing about the index."""
    last_is_stored = threading.Event()

    def hook(operation: str, key: str) -> None:
        if key.endswith("-000000.pt.zst"):
            assert last_is_stored.wait(60)

    def progress(done: WriteProgress) -> None:
        if done.samples == 38:
            last_is_stored.set()

    store = HookedStore(hook)
    with ShardWriter("x", store=store, shard_bytes=8 * 2, threads=2, progress=progress) as out:
        for number in range(40):
            out.write({"id": number})
    assert ids(store) == list(range(40))
    assert [name.partition("-")[2] for name in out.index.names] == [f"{n:06d}.pt.zst" for n in range(20)]


@pytest.mark.parametrize("seed", range(5))
def test_batches_make_the_same_shards_as_samples(seed: int) -> None:
    """Written one by one, in batches of any size, or mixed: the same rows in the same shards."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (500,), generator=generator).tolist()
    rows: list[dict[str, Any]] = [
        {
            "id": number,
            "x": torch.full((3, 2), number, dtype=torch.float16),
            "tokens": torch.arange(length),
            "image": torch.zeros(length, 9 - length),
            "text": "é" * length,
            "deep": {"flag": number % 2 == 0, "z": complex(number, 1), "tags": [1] * length},
            "maybe": None if length < 3 else torch.ones(2),
            "none": None,
        }
        for number, length in enumerate(lengths)
    ]

    def batch(lo: int, hi: int) -> dict[str, Any]:
        def column(get: Callable[[dict[str, Any]], Any]) -> list[Any]:
            return [get(row) for row in rows[lo:hi]]

        deep = {key: column(lambda row, key=key: row["deep"][key]) for key in rows[0]["deep"]}
        plain = {key: column(lambda row, key=key: row[key]) for key in rows[0] if key not in ("deep", "x")}
        x = torch.stack(column(lambda row: row["x"])) if hi > lo else torch.zeros(0, 3, 2, dtype=torch.float16)
        return {"id": plain.pop("id"), "x": x, **plain, "deep": deep}

    def by_sample(out: ShardWriter) -> None:
        for row in rows:
            out.write(row)

    def at_once(out: ShardWriter) -> None:
        out.write_batch(batch(0, 500))

    def mixed(out: ShardWriter) -> None:
        at = 0
        while at < 500:
            size = int(torch.randint(0, 70, (), generator=generator))
            if size % 3 == 0:
                for row in rows[at : at + size]:
                    out.write(row)
            else:
                out.write_batch(batch(at, min(500, at + size)))
            at += size

    def pack(fill: Callable[[ShardWriter], None]) -> tuple[list[int], list[dict[str, Any]]]:
        store = MemoryStore()
        with ShardWriter("x", store=store, shard_bytes=2_500) as out:
            fill(out)
        return out.index.rows.tolist(), read(store)

    borders, samples = pack(by_sample)
    assert len(borders) > 10
    for fill in (at_once, mixed):
        other_borders, others = pack(fill)
        assert other_borders == borders
        for one, other, row in zip(samples, others, rows, strict=True):
            assert {**one, "deep": dict(sorted(one["deep"].items()))}.keys() == other.keys() == row.keys()
            for key, value in row.items():
                assert_same(other[key], value)
                assert_same(one[key], value)


def test_a_shard_ends_with_the_sample_that_fills_it() -> None:
    """``shard_bytes`` counts uncompressed bytes, and a larger sample gets a shard of its own."""
    store = MemoryStore()
    with ShardWriter("x", store=store, shard_bytes="1KB") as out:
        for size in (400, 500, 100, 5_000, 999, 1, 1):
            out.write({"x": torch.zeros(size, dtype=torch.uint8)})
    assert out.index.rows.tolist() == [3, 1, 2, 1]


@pytest.mark.parametrize("compression", ["auto", "none", "zstd:-7", "zstd:1", "zstd:22"])
def test_every_compression_comes_back(compression: str) -> None:
    """Each is told in the index; "none" is as large as the data, the others are smaller."""
    store = MemoryStore()
    tokens = torch.randint(0, 50, (4, 20_000), generator=torch.Generator().manual_seed(0))
    with ShardWriter("x", store=store, compression=compression) as out:
        out.write_batch({"x": tokens})
    assert torch.equal(torch.stack([row["x"] for row in read(store)]), tokens)
    assert index_of(store).codec == compression
    assert (int(out.index.sizes[0]) >= tokens.nbytes) == (compression == "none")


@pytest.mark.parametrize("mode", ["error", "append", "replace"])
def test_nothing_written_is_an_empty_dataset(mode: Any) -> None:
    """A clean exit without samples commits an empty dataset; samples of any type can be appended to it."""
    store = MemoryStore()
    with ShardWriter("x", store=store, mode=mode):
        pass
    assert read(store) == []
    write(store, range(3), mode="append")
    assert ids(store) == [0, 1, 2]


# ---- append and replace ----------------------------------------------------------------------------------------------


def test_append_binds_types_and_widens_sizes() -> None:
    """What is appended must have the fields and types of the dataset; sizes may come to vary."""
    store = MemoryStore()
    with ShardWriter("x", store=store) as out:
        out.write({"x": torch.zeros(3), "y": None})
    old = index_of(store)
    with (
        pytest.raises(SampleInvalid, match=r"'x'.*float32.*float64"),
        ShardWriter("x", store=store, mode="append") as out,
    ):
        out.write({"x": torch.zeros(3).double(), "y": None})
    assert index_of(store).fingerprint == old.fingerprint
    with ShardWriter("x", store=store, mode="append") as out:
        out.write({"x": torch.ones(5), "y": "now"})
    assert [row["x"].tolist() for row in read(store)] == [[0.0] * 3, [1.0] * 5]
    assert [row["y"] for row in read(store)] == [None, "now"]
    assert out.index.names[0] == old.names[0]
    field = Schema.from_json(out.index.schema).field(("x",))
    assert field is not None
    assert field.describe() == "float32 (*,)"


def test_an_append_of_nothing_changes_nothing() -> None:
    """No commit, the same fingerprint, and ``index`` is the dataset's."""
    store = MemoryStore()
    write(store, range(3))
    before = dict(store.objects)
    with ShardWriter("x", store=store, mode="append") as out:
        pass
    assert store.objects == before
    assert out.index.num_samples == 3


def test_append_to_files_used_in_place_is_refused() -> None:
    """An index of foreign files is not mixed with shards, and its files survive a replace."""
    store = MemoryStore()
    write(store, range(3))
    old = index_of(store)
    shards = dict(store.objects)
    foreign = Index.parse(store.objects["index.json"].replace(b'"layout":"shard"', b'"layout":"shard"'), url="x")
    object.__setattr__(foreign, "layout", "list")
    foreign.__dict__.pop("fingerprint", None)
    store.objects["index.json"] = foreign.dump()
    with pytest.raises(OptionInvalid, match="streamshards pack"):
        ShardWriter("x", store=store, mode="append")
    write(store, range(5), mode="replace")
    assert ids(store) == list(range(5))
    assert all(store.objects[name] == shards[name] for name in old.names)


def test_replace_takes_the_place_of_a_damaged_index(caplog: pytest.LogCaptureFixture) -> None:
    """The other modes raise; replace says that the old shards stay."""
    store = MemoryStore({"index.json": b"{}", "old.pt.zst": b""})
    for mode in ("error", "append"):
        with pytest.raises(IndexInvalid):
            ShardWriter("x", store=store, mode=mode)
    with caplog.at_level(logging.WARNING, "streamshards"):
        write(store, range(2), mode="replace")
    assert "cannot be read" in caplog.text
    assert ids(store) == [0, 1]
    assert "old.pt.zst" in store.objects


def test_replace_stands_though_the_old_shards_cannot_be_deleted(caplog: pytest.LogCaptureFixture) -> None:
    """What is left over is logged, once."""
    store = HookedStore(failing(AccessDenied, "delete"))
    write(store, range(50))
    with caplog.at_level(logging.WARNING, "streamshards"):
        write(store, range(3), mode="replace")
    assert ids(store) == [0, 1, 2]
    assert len([record for record in caplog.records if "not deleted" in record.message]) == 1


@pytest.mark.parametrize("mode", ["error", "append"])
def test_of_two_overlapping_writers_one_commits(mode: Any) -> None:
    """The second to commit hears that another was first, takes its shards back and leaves the other's alone."""
    store = MemoryStore()
    if mode == "append":
        write(store, range(2))
    with (
        pytest.raises(ObjectExists, match="another writer committed in the meantime"),
        ShardWriter("x", store=store, mode=mode) as late,
    ):
        late.write(sample(100))
        write(store, range(2, 4), mode=mode)
        committed = names(store)
    assert ids(store) == ([0, 1, 2, 3] if mode == "append" else [2, 3])
    assert set(names(store)) <= set(committed)
    assert not [name for name in names(store) if name != "index.json" and name not in index_of(store).names]


# ---- when things go wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_exception_leaves_nothing(error: BaseException, store_url: Any) -> None:
    """Neither an index nor a shard; the exception arrives as it was."""
    store = open_store(store_url.url, store_url.storage_options)
    with (
        pytest.raises(type(error)) as caught,
        ShardWriter(store_url.url, shard_bytes=1_000, storage_options=store_url.storage_options) as out,
    ):
        for number in range(50):
            out.write(sample(number))
        raise error
    assert caught.value is error
    assert store.list() == []
    assert "abandoned" in repr(out)
    with pytest.raises(OptionInvalid, match="no index"):
        _ = out.index


def test_an_exception_leaves_the_old_dataset() -> None:
    """An append or a replace that fails takes back what it added, and nothing else."""
    store = MemoryStore()
    write(store, range(20))
    before = dict(store.objects)
    for mode in ("append", "replace"):
        with pytest.raises(ZeroDivisionError), ShardWriter("x", store=store, mode=mode, shard_bytes=500) as out:
            for number in range(20):
                out.write(sample(number))
            _ = 1 / 0
        assert store.objects == before


def test_shards_that_cannot_be_taken_back_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The user's exception is not replaced by that of the clean-up."""
    store, stored = HookedStore(failing(AccessDenied, "delete")), threading.Event()
    with (
        caplog.at_level(logging.WARNING, "streamshards"),
        pytest.raises(ZeroDivisionError),
        ShardWriter("x", store=store, shard_bytes=1, progress=lambda _: stored.set()) as out,
    ):
        out.write(sample(1))
        assert stored.wait(60)
        _ = 1 / 0
    assert "streamshards verify --orphans" in caplog.text
    assert len(store.objects) == 1


KILLED: Final = """
import os, signal, sys, threading
from streamshards import ShardWriter
from tests.datasets import sample
stored = threading.Event()
with ShardWriter(sys.argv[1], mode=sys.argv[2], shard_bytes=1000, progress=lambda _: stored.set()) as out:
    for number in range(1000, 1100):
        out.write(sample(number))
    assert stored.wait(60)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("mode", ["error", "append", "replace"])
def test_a_killed_writer_changes_nothing_but_orphans(mode: str, tmp_path: Path) -> None:
    """SIGKILL: no index where there was none, else the old dataset as it was; the next writer succeeds."""
    store = open_store(tmp_path / "data")
    if mode != "error":
        write(store, range(30))
    before = {name: store.get(name, timeout_s=1, max_bytes=MiB) for name in names(store)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, store.url, mode], cwd=Path(__file__).parent.parent, timeout=120
    )
    assert done.returncode == -9
    assert len(names(store)) > len(before)
    assert {name: store.get(name, timeout_s=1, max_bytes=MiB) for name in before} == before
    if mode == "error":
        with pytest.raises(IndexInvalid, match="still at work or was killed"):
            index_of(store)
    write(store, range(30, 40), mode=mode)
    assert ids(store) == {"error": [*range(30, 40)], "append": [*range(40)], "replace": [*range(30, 40)]}[mode]


APPENDER: Final = """
import sys
from streamshards import ShardWriter
from streamshards.errors import ObjectExists
try:
    with ShardWriter(sys.argv[1], mode="append") as out:
        print("open", flush=True)
        out.write({"id": int(sys.argv[2])})
        sys.stdin.readline()
    print("committed", flush=True)
except ObjectExists as error:
    print("refused:", error, flush=True)
"""


def test_two_processes_append_at_once(tmp_path: Path) -> None:
    """Both were open on the same dataset: one commits, the other gets the clear error, nothing else changes."""
    store = open_store(tmp_path / "data")
    with ShardWriter(store.url) as out:
        out.write({"id": 0})
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDER, store.url, str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
        )
        for number in (1, 2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    answers = [process.communicate("go on\n", timeout=120)[0] for process in processes]
    assert answers[0] == "committed\n"
    assert answers[1].startswith("refused:")
    assert "another writer committed in the meantime: 2 samples" in answers[1]
    assert ids(store) == [0, 1]
    assert len(names(store)) == 3


@pytest.mark.parametrize("kind", [AccessDenied, ValueError])
def test_a_failed_upload_surfaces_once(kind: type[Exception], threads_before: set[threading.Thread]) -> None:
    """It stops the next write with the shard's name and the cause; writing on is refused, and nothing is committed."""
    store = HookedStore(failing(kind, matching="-000001.pt.zst"))
    with (
        pytest.raises(StreamShardsError, match="earlier error"),
        ShardWriter("x", store=store, shard_bytes=1, max_pending_bytes=1) as out,
    ):
        with pytest.raises(StreamShardsError) as caught:
            for number in itertools.count():
                out.write({"id": number})
        with pytest.raises(StreamShardsError, match="earlier error lost samples"):
            out.write({"id": 1})
    assert isinstance(caught.value, AccessDenied if kind is AccessDenied else StreamShardsError)
    assert "-000001.pt.zst was not stored" in str(caught.value)
    assert isinstance(caught.value.__cause__, kind)
    assert store.objects == {}


def test_a_failed_upload_surfaces_at_the_end() -> None:
    """When no write came after it, the exit raises it."""
    store = HookedStore(failing(AccessDenied))
    with (
        pytest.raises(AccessDenied, match=r"shard \w{12}-000000.pt.zst was not stored"),
        ShardWriter("x", store=store) as out,
    ):
        out.write({"id": 1})
    assert store.objects == {}


def test_transient_failures_are_retried_and_told() -> None:
    """A put that fails twice is an event each time, and the dataset is whole."""
    failures, events = itertools.count(), list[Event]()

    def hook(operation: str, key: str) -> None:
        if key.endswith("-000001.pt.zst") and next(failures) < 2:
            raise StoreUnavailable("busy")

    store, retry = HookedStore(hook), RetryOptions(base_s=1e-6)
    with ShardWriter("x", store=store, shard_bytes=1, retry=retry, observer=events.append) as out:
        for number in range(4):
            out.write({"id": number})
    assert ids(store) == [0, 1, 2, 3]
    assert ["-000001.pt.zst: attempt" in str(event) for event in events] == [True, True]


def test_a_store_that_stays_away_is_given_up() -> None:
    """After the deadline: StoreUnavailable with the shard's name."""
    store = HookedStore(failing(StoreUnavailable))
    with (
        pytest.raises(StoreUnavailable, match=r"-000000\.pt\.zst was not stored"),
        ShardWriter("x", store=store, retry=QUICK) as out,
    ):
        out.write({"id": 1})


def test_a_commit_of_unknown_outcome_deletes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The index may have arrived: shards that it may name stay."""
    store = HookedStore(failing(StoreUnavailable, matching="index.json"))
    with (
        caplog.at_level(logging.ERROR, "streamshards"),
        pytest.raises(StoreUnavailable, match="unknown"),
        ShardWriter("x", store=store, retry=QUICK) as out,
    ):
        out.write({"id": 1})
    assert len(store.objects) == 1
    assert "1 new shards were left in place" in caplog.text


def test_a_refused_commit_takes_the_shards_back() -> None:
    """The index was certainly not stored: nothing stays."""
    store = HookedStore(failing(AccessDenied, matching="index.json"))
    with pytest.raises(AccessDenied), ShardWriter("x", store=store) as out:
        out.write({"id": 1})
    assert store.objects == {}


def test_a_progress_callback_that_raises_is_a_failure() -> None:
    """It is the user's code, and its error must not vanish in a thread."""

    def progress(done: WriteProgress) -> None:
        raise LookupError("my bar broke")

    store = MemoryStore()
    with (
        pytest.raises(StreamShardsError, match="my bar broke") as caught,
        ShardWriter("x", store=store, progress=progress) as out,
    ):
        out.write({"id": 1})
    assert isinstance(caught.value.__cause__, LookupError)
    assert store.objects == {}


# ---- bounded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 40_000])
def test_pending_bytes_are_bounded(limit: int) -> None:
    """However slow the store, no more than the limit (or one shard) is under way: the caller is made to wait."""
    seen: list[int] = []
    waiting: list[int] = []
    written = itertools.count(1)
    last = 0

    def hook(operation: str, key: str) -> None:
        if key.endswith(".pt.zst"):
            seen.append(out._packer.pending_bytes)
            waiting.append(last - out._done.samples)

    store = HookedStore(hook)
    with ShardWriter("x", store=store, shard_bytes=10_000, compression="none", max_pending_bytes=limit) as out:
        for row in torch.randint(0, 256, (300, 1_000), generator=torch.Generator().manual_seed(0)).byte():
            last = next(written)
            out.write({"x": row})
    assert len(seen) == 30
    assert max(seen) <= max(limit, 10_000)
    assert max(waiting) <= 10 + max(limit, 10_000) // 1_000


def test_a_large_batch_is_taken_in_parts() -> None:
    """Its first shards are stored before its last rows are looked at; when those don't fit, nothing is committed."""
    puts: list[str] = []
    store = HookedStore(lambda *request: puts.append(request[0]))
    with (
        pytest.raises(StreamShardsError, match="earlier error lost samples"),
        ShardWriter("x", store=store, shard_bytes=8_000, max_pending_bytes=1) as out,
    ):
        with pytest.raises(SampleInvalid, match=r"batch after sample 48,000: item 1,999: field 's': expected str, got"):
            out.write_batch({"x": torch.zeros(50_000), "s": ["a"] * 49_999 + [3]})
        assert "failed" in repr(out)
        assert "put" in puts
        with pytest.raises(StreamShardsError, match="earlier error lost samples"):
            out.write_batch({"x": torch.zeros(1), "s": ["a"]})
    assert store.objects == {}


# ---- samples that don't fit ------------------------------------------------------------------------------------------


def test_a_sample_that_does_not_fit_is_refused_alone() -> None:
    """The error names sample, field, what stands and what came; caught, the writer goes on without that sample."""
    store = MemoryStore()
    with ShardWriter("x", store=store, shard_bytes=1) as out:
        out.write({"id": 0, "x": torch.zeros(2)})
        out.write_batch({"id": [1, 2], "x": torch.ones(2, 2)})
        with pytest.raises(SampleInvalid, match=r"sample 3: came without 'x' .* and with 'y'"):
            out.write({"id": 3, "y": 1})
        with pytest.raises(SampleInvalid, match=r"sample 3: field 'x': expected float32 \(2,\), got int64 \(2,\)"):
            out.write({"id": 3, "x": torch.zeros(2, dtype=torch.int64)})
        with pytest.raises(SampleInvalid, match=r"batch after sample 3: columns differ in length"):
            out.write_batch({"id": [3, 4], "x": torch.ones(3, 2)})
        out.write({"id": 3, "x": torch.zeros(2)})
    assert ids(store) == [0, 1, 2, 3]


def test_a_sample_that_does_not_fit_commits_nothing() -> None:
    """Not caught, it ends the writer like any exception."""
    store = MemoryStore()
    with pytest.raises(SampleInvalid), ShardWriter("x", store=store, shard_bytes=1) as out:
        out.write({"id": 0})
        out.write({"id": "zero"})
    assert store.objects == {}


# ---- the call --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "w"}, "mode='w'"),
        ({"shard_bytes": 0}, "shard_bytes=0"),
        ({"shard_bytes": "big"}, "shard_bytes='big'"),
        ({"max_pending_bytes": -1}, "max_pending_bytes=-1"),
        ({"threads": 0}, "threads=0"),
        ({"threads": True}, "threads=True"),
        ({"compression": "best"}, "compression='best'"),
        ({"compression": "zstd"}, "compression='zstd'"),
        ({"compression": "zstd:0"}, "compression='zstd:0'"),
        ({"compression": "zstd:23"}, "compression='zstd:23'"),
        ({"compression": "zstd:-8"}, "compression='zstd:-8'"),
        ({"compression": 3}, "compression=3"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], match: str) -> None:
    """The message holds the offending value."""
    with pytest.raises(OptionInvalid, match=match):
        ShardWriter("x", store=MemoryStore(), **options)


def test_writing_is_for_the_with_block() -> None:
    """Before, after and a second time are errors that say so."""
    store = MemoryStore()
    out = ShardWriter("x", store=store)
    with pytest.raises(OptionInvalid, match="write inside a with block"):
        out.write({"id": 1})
    with out:
        out.write({"id": 1})
        with pytest.raises(OptionInvalid, match="no index"):
            _ = out.index
    with pytest.raises(OptionInvalid, match="has ended"):
        out.write({"id": 2})
    with pytest.raises(OptionInvalid, match="entered before"), out:
        pass
    assert ids(store) == [1]


def test_progress_and_repr_tell_the_state() -> None:
    """One call per stored shard with running sums; the repr names url, state, mode and counts."""
    store, calls = MemoryStore(url="memory://train"), list[WriteProgress]()
    out = ShardWriter("x", store=store, shard_bytes=16, progress=calls.append)
    assert "memory://train: new, mode='error', 0 samples written" in repr(out)
    with out:
        for number in range(5):
            out.write({"id": number})
        assert "open" in repr(out)
        assert "5 samples written" in repr(out)
    assert "committed" in repr(out)
    assert [done.shards for done in calls] == [1, 2, 3]
    assert (calls[-1].samples, calls[-1].raw_bytes) == (5, int(out.index.raw_sizes.sum()))
    assert calls[-1].stored_bytes == int(out.index.sizes.sum())


def test_a_wrong_place_is_known_at_construction() -> None:
    """Whatever the mode, a store that does not answer is not found out after hours."""

    class Away(MemoryStore):
        def get(self, key: str, *, timeout_s: float, max_bytes: int) -> bytes:
            raise StoreUnavailable("no route")

    for mode in ("error", "append", "replace"):
        with pytest.raises(StoreUnavailable, match="no route"):
            ShardWriter("x", store=Away(), mode=mode, retry=QUICK)


def test_a_local_writer_leaves_no_temporary_files(tmp_path: Path) -> None:
    """After a commit the folder holds shards and the index, nothing hidden."""
    with ShardWriter(tmp_path, shard_bytes=1) as out:
        out.write({"id": 1})
        out.write({"id": 2})
    assert sorted(os.listdir(tmp_path)) == sorted([*out.index.names, "index.json"])
