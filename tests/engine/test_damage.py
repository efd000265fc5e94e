"""Damaged shards through the whole dataset: no wrong row, no batch fewer, one error in the log for each, one order."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from streamshards import (
    OrderOptions,
    RetryOptions,
    ShardCorrupt,
    ShardMissing,
    StreamingDataset,
    TooManyCorrupt,
    Topology,
)
from streamshards.engine.catalog import INDEX_KEY
from streamshards.events import Event, FetchRetried, ShardSkipped
from streamshards.testing import FakeClock
from tests.engine.rig import numbered, sample, watched
from tests.shard.shard_cases import same

NUM_SHARDS = 64
NUM_SAMPLES = NUM_SHARDS * 20
BATCH_SIZE = 16
LANES = OrderOptions(lanes=4, shuffle_block=100)
FAST = RetryOptions(base_s=1e-6)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 shards of 20 samples each."""
    folder = tmp_path_factory.mktemp("damage") / "good"
    folder.mkdir()
    store, index = numbered([20] * NUM_SHARDS)
    for name, data in store.objects.items():
        (folder / name).write_bytes(data)
    (folder / INDEX_KEY).write_bytes(index.dump())
    return folder


# -- the damage --------------------------------------------------------------------------------------------------------


def flip(at: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(len(data) - 1, int(at * len(data)))] ^= 0x10
        path.write_bytes(data)

    return damage


def cut(to: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(to * path.stat().st_size)]) and None


def grow(extra: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes() + extra) and None


def into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SINGLE: list[Callable[[Path], None]] = [
    flip(0.0),
    flip(0.3),
    flip(0.6),
    flip(0.9),
    flip(1.0),
    cut(0.99),
    cut(0.5),
    cut(0.0),
    grow(b"\0"),
    grow(b"garbage" * 1000),
    Path.unlink,
    into_a_folder,
]
GONE = (Path.unlink, into_a_folder)
PAIRS = 2
DAMAGED = [4 * n + n % 3 for n in range(len(SINGLE) + 2 * PAIRS)]
"""16 of the 64, all over the dataset; the last four swap places in pairs."""


@pytest.fixture(scope="module")
def url(good: Path) -> str:
    """The same 64 shards, 16 of them damaged, each in another way."""
    folder = good.parent / "damaged"
    shutil.copytree(good, folder)
    paths = [folder / StreamingDataset(good).index.names[shard] for shard in DAMAGED]
    for damage, path in zip(SINGLE, paths, strict=False):
        damage(path)
    rest = paths[len(SINGLE) :]
    for one, two in zip(rest[::2], rest[1::2], strict=True):
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    return str(folder)


def opened(url: str | Path, **options: Any) -> StreamingDataset:
    """Return the dataset, shuffled, on a clock on which waiting takes no time."""
    defaults: dict[str, Any] = {
        "batch_size": BATCH_SIZE, "shuffle": True, "seed": 3, "order": LANES, "max_corrupt": 0.5, "retry": FAST,
    }  # fmt: skip
    dataset = StreamingDataset(str(url), **defaults | options)
    dataset._clock = FakeClock()
    return dataset


def identity(batch: Any) -> Any:
    return batch


def checked_ids(batches: Iterable[dict[str, Any]]) -> list[list[int]]:
    """Return the ids of each batch, after comparing each row with the sample that its id names."""
    ids = []
    for batch in batches:
        ids.append(batch["id"].tolist())
        for row, number in enumerate(ids[-1]):
            is_here = bool(batch["maybe?"][row])
            got = {name: batch[name][row] for name in ("x", "tokens", "text")}
            expected = sample(number)
            assert same(got | {"id": number, "maybe": batch["maybe"][row] if is_here else None}, expected)
    return ids


LOST = {number for shard in DAMAGED for number in range(20 * shard, 20 * shard + 20)}


# -- the tests ---------------------------------------------------------------------------------------------------------


def test_no_wrong_row_and_no_batch_fewer(good: Path, url: str) -> None:
    """A quarter of the shards damaged: 80 batches of right rows; where a good row was planned, it is there."""
    expected = checked_ids(opened(good))
    got = checked_ids(watched(lambda: list(opened(url))))
    assert [len(batch) for batch in got] == [len(batch) for batch in expected] == [BATCH_SIZE] * 80
    for now, then in zip(got, expected, strict=True):
        for number, planned in zip(now, then, strict=True):
            assert number not in LOST
            assert number == planned or planned in LOST


def test_each_damaged_shard_is_logged_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """One ERROR per damaged shard, with its url and number; two warnings for each that was fetched three times."""
    events: list[Event] = []
    dataset = opened(url, observer=events.append)
    with caplog.at_level(logging.WARNING, "streamshards"):
        watched(lambda: list(dataset))
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    names = dataset.index.names
    assert len(errors) == 16
    for shard in DAMAGED:
        (line,) = [line for line in errors if names[shard] in line]
        assert f"{url}/{names[shard]}: shard {shard} skipped" in line
    skipped = [event for event in events if isinstance(event, ShardSkipped)]
    assert sorted(event.shard for event in skipped) == sorted(DAMAGED)
    retries = Counter(event.url.rpartition("/")[2] for event in events if isinstance(event, FetchRetried))
    gone = {
        names[shard] for shard, damage in zip(DAMAGED, SINGLE, strict=False) if damage in (Path.unlink, into_a_folder)
    }
    for shard in DAMAGED:
        # Damaged: two more looks. Gone: one. (A shard on a lane's border may be fetched by two threads at once.)
        assert retries[names[shard]] in ((1, 2) if names[shard] in gone else (2, 4))
    assert set(retries) == {names[shard] for shard in DAMAGED}


def test_the_counters_are_right(url: str) -> None:
    """16 shards and 320 rows skipped, all batches and samples counted, over one epoch."""
    dataset = opened(url, order=OrderOptions(lanes=1, shuffle_block=100))
    watched(lambda: list(dataset))
    stats = dataset.stats()
    assert stats["shards_skipped"] == 16
    assert stats["rows_skipped"] == 320
    assert stats["retries"] == 2 * (16 - len(GONE)) + len(GONE)
    assert stats["batches"] == 80
    assert stats["samples"] == NUM_SAMPLES
    assert stats["slow_reads"] == 0


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_refill_alike(url: str, num_workers: int) -> None:
    """With the order's lanes given, the refilled epoch is the same with any number of DataLoader workers."""
    reference = checked_ids(opened(url))
    loader = DataLoader(opened(url), batch_size=None, num_workers=num_workers, collate_fn=identity)
    assert checked_ids(loader) == reference


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_refill_alike(url: str, world_size: int) -> None:
    """The global batches of the damaged epoch are the same on 1, 2 and 4 ranks, and every rank has as many."""
    reference = checked_ids(opened(url))
    parts = [
        checked_ids(
            opened(url, batch_size=BATCH_SIZE // world_size, topology=Topology(rank=rank, world_size=world_size))
        )
        for rank in range(world_size)
    ]
    together = [[number for part in step for number in part] for step in zip(*parts, strict=True)]
    assert together == reference


def test_a_second_epoch_and_a_second_look(url: str) -> None:
    """Each epoch looks at bad shards anew, for they may have been repaired; the same epoch is refilled the same way."""
    dataset = opened(url)
    first, second = checked_ids(dataset), checked_ids(dataset)
    assert dataset.stats()["rows_skipped"] == 640
    assert first != second
    dataset.set_epoch(0)
    assert checked_ids(dataset) == first


def test_a_resumed_damaged_epoch_is_the_same(url: str) -> None:
    """State taken anywhere in a damaged epoch continues it exactly."""
    reference = checked_ids(opened(url))
    for taken in (1, 40, 79, 80):
        dataset = opened(url)
        iterator = iter(dataset)
        for _ in range(taken):
            next(iterator)
        resumed = opened(url)
        resumed.load_state_dict(dataset.state_dict())
        assert checked_ids(resumed) == reference[taken:]


@pytest.mark.parametrize("number", range(len(SINGLE)))
def test_raise_names_the_shard(good: Path, tmp_path: Path, number: int) -> None:
    """With on_corrupt="raise" each kind of damage is an error of its kind with the url, after the good batches."""
    shutil.copytree(good, tmp_path / "train")
    dataset = opened(
        tmp_path / "train", on_corrupt="raise", shuffle=False, order=OrderOptions(lanes=1, shuffle_block=20)
    )
    name = dataset.index.names[30]
    SINGLE[number](tmp_path / "train" / name)
    kind = ShardMissing if SINGLE[number] in GONE else ShardCorrupt
    iterator = iter(dataset)
    got = checked_ids(next(iterator) for _ in range(37))
    assert [n for batch in got for n in batch] == list(range(37 * BATCH_SIZE))
    for _ in range(2):
        with pytest.raises(kind, match=f"{tmp_path / 'train'}/{name}"):
            watched(lambda: next(iterator))
    assert dataset.stats()["shards_skipped"] == 0


def test_too_many_corrupt(url: str) -> None:
    """A quarter is lost: allowed with max_corrupt=0.25, too much with less; never a silent end."""
    assert len(checked_ids(opened(url, max_corrupt=0.25))) == 80
    for max_corrupt in (0, 0.1, 0.249):
        dataset = opened(url, max_corrupt=max_corrupt)
        with pytest.raises(TooManyCorrupt, match=r"max_corrupt allows .* of 1,280.*streamshards verify"):
            watched(lambda dataset=dataset: list(dataset))


def test_single_samples_are_refilled_alike(url: str) -> None:
    """Without a batch size the damaged epoch has every place filled, too, in the order of the batches."""
    batches = checked_ids(opened(url))
    singles = [s["id"] for s in opened(url, batch_size=None, order=OrderOptions(lanes=4, chunk=4, shuffle_block=100))]
    assert singles == [number for batch in batches for number in batch]
