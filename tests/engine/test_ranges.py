"""Parts of shards through the engine: fewer bytes, the same rows, and the whole wherever a part is not to be had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import streamshards as ss
from streamshards.errors import AccessDenied, ShardCorrupt, StoreUnavailable
from streamshards.events import Event, FetchRetried, ShardSkipped
from streamshards.storage import Store
from streamshards.testing import DENIED, UNAVAILABLE, Fail, FaultyStore, FlipBit, MemoryStore, Swap, Truncate

ROWS = 400
SHARDS = 4
RETRY = ss.RetryOptions(base_s=0.001, max_wait_s=0.002, deadline_s=0.5)


class Asked(MemoryStore):
    """Notes what is read of it."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self.whole: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []

    def get(self, key: str, *, timeout_s: float, max_bytes: int) -> bytes:
        self.whole.append(key)
        return super().get(key, timeout_s=timeout_s, max_bytes=max_bytes)

    def get_range(self, key: str, start: int, stop: int, *, timeout_s: float) -> bytes:
        self.ranges.append((key, start, stop))
        return self.objects[key][start:stop]


class Whole(MemoryStore):
    """A store from before there were ranges."""

    get_range = None  # type: ignore[assignment]  # as if it had none


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    """Shards of 4 MB in four columns: two large, a ragged one, and labels."""
    store = MemoryStore()
    draw = np.random.default_rng(3)
    with ss.ShardWriter("x", store=store, shard_bytes="4.2MB") as out:
        for shard in range(SHARDS):
            out.write_batch(
                {
                    "image": draw.integers(0, 256, (ROWS, 5_000), dtype=np.uint8),
                    "sound": draw.integers(0, 256, (ROWS, 5_000), dtype=np.uint8),
                    "text": [f"{shard}-{row} " * int(draw.integers(1, 9)) for row in range(ROWS)],
                    "label": np.arange(ROWS) + shard * ROWS,
                }
            )
    return store.objects


def shards_of(objects: dict[str, bytes]) -> list[str]:
    return sorted(key for key in objects if key != "index.json")


def dataset(store: Store, **options: Any) -> ss.StreamingDataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamshards.dataset.open_store", lambda *_: store)
        return ss.StreamingDataset("x", **{"batch_size": 100, "shuffle": True, "retry": RETRY, **options})


def same(batches: list[Any], others: list[Any]) -> bool:
    return len(batches) == len(others) and all(
        one.keys() == other.keys()
        and all(torch.equal(one[k], other[k]) if isinstance(one[k], torch.Tensor) else one[k] == other[k] for k in one)
        for one, other in zip(batches, others, strict=True)
    )


@pytest.mark.parametrize("columns", [["label"], ["text", "label"], ["sound"], ["image", "text"]])
def test_named_columns_cost_their_own_bytes(objects: dict[str, bytes], columns: list[str]) -> None:
    """The epoch is the one that whole shards give; the bytes of other large columns are not read."""
    store = Asked(objects)
    part = dataset(store, columns=columns)
    batches = list(part)
    assert same(batches, list(dataset(Whole(objects), columns=columns)))
    stored = int(part.index.sizes.sum())
    is_large = {"sound", "image"} & {*columns}
    read = part.stats()["bytes_read"]
    assert read == sum(stop - start for _, start, stop in store.ranges) + sum(len(objects[k]) for k in store.whole[1:])
    assert read < stored * (0.55 if is_large else 0.05)
    assert part.stats()["shards_read"] == SHARDS


def test_all_columns_are_read_whole(objects: dict[str, bytes]) -> None:
    """One request a shard, and no look at its tail."""
    store = Asked(objects)
    list(dataset(store))
    assert sorted(store.whole) == [*shards_of(objects), "index.json"]
    assert store.ranges == []


def test_columns_that_are_most_of_a_shard_are_read_whole(objects: dict[str, bytes]) -> None:
    """That is known after the first shard's tail."""
    store = Asked(objects)
    options = ss.PrefetchOptions(threads=1)
    list(dataset(store, columns=["image", "sound"], prefetch=options))
    assert sorted(store.whole) == [*shards_of(objects), "index.json"]
    assert len(store.ranges) == 1


def test_a_sample_costs_a_frame_of_each_column(objects: dict[str, bytes]) -> None:
    """``ds[i]`` does not read the shard, and what is there already is not read again."""
    store = Asked(objects)
    part = dataset(store, columns=["sound", "text"])
    plain = dataset(Whole(objects), columns=["sound", "text"])
    for number in (0, 1, ROWS + 7, 2 * ROWS - 1, SHARDS * ROWS - 1):
        mine, theirs = part[number], plain[number]
        assert torch.equal(mine["sound"], theirs["sound"])
        assert mine["text"] == theirs["text"]
    assert store.whole == ["index.json"]
    before = len(store.ranges)
    assert part[SHARDS * ROWS - 1]["text"] == plain[SHARDS * ROWS - 1]["text"]
    assert len(store.ranges) == before


def test_lane_borders_read_their_part() -> None:
    """A shard that four lanes share is not read four times over."""
    store = MemoryStore()
    with ss.ShardWriter("x", store=store, shard_bytes="16MB") as out:
        out.write_batch({"image": np.random.default_rng(3).integers(0, 256, (3_200, 10_000), dtype=np.uint8)})
    lanes = ss.OrderOptions(lanes=8, chunk=100)
    parts, wholes = (dataset(kind(store.objects), order=lanes, shuffle=False) for kind in (MemoryStore, Whole))
    assert same(list(parts), list(wholes))
    assert parts.index.num_shards == 2
    assert wholes.stats()["bytes_read"] >= 4 * int(parts.index.sizes.sum())
    assert parts.stats()["bytes_read"] < 2 * int(parts.index.sizes.sum())


FAULTS: dict[str, Any] = {
    "cut": Truncate(-1),
    "a flipped bit": FlipBit(100),
    "no range requests": Fail(ss.StoreError, "416"),
    "another object": None,
}


@pytest.mark.parametrize("nth", [0, 1], ids=["tail", "frames"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_part_is_settled_by_the_whole(objects: dict[str, bytes], fault: str, nth: int) -> None:
    """Every sample comes, as it is, and one event says what happened."""
    names = shards_of(objects)
    kind = FAULTS[fault] or Swap(names[1])

    def script(key: str, number: int) -> Any:
        return kind if key == names[0] and number == nth else None

    events: list[Event] = []
    part = dataset(FaultyStore(MemoryStore(objects), script), columns=["sound"], observer=events.append)
    assert same(list(part), list(dataset(Whole(objects), columns=["sound"])))
    (event,) = [event for event in events if isinstance(event, FetchRetried)]
    assert names[0] in event.url
    assert event.cause.endswith("now the whole shard is asked for")


def test_a_damaged_frame_of_a_part_is_settled_by_the_whole(objects: dict[str, bytes]) -> None:
    """Also when it shows only while it is decoded, long after it came."""
    names = shards_of(objects)

    def script(key: str, number: int) -> Any:
        return FlipBit(8 * 500_000) if key == names[0] and number == 1 else None

    events: list[Event] = []
    part = dataset(FaultyStore(MemoryStore(objects), script), columns=["sound"], observer=events.append)
    assert same(list(part), list(dataset(Whole(objects), columns=["sound"])))
    assert [event.cause.rpartition("; ")[2] for event in events if isinstance(event, FetchRetried)] == [
        "now the whole shard is asked for"
    ]


def test_a_dataset_that_is_replaced_while_a_part_is_decoded_is_told_as_such(objects: dict[str, bytes]) -> None:
    """A frame is damaged, and the whole shard is gone with its dataset: no loss of one shard, and never skipped."""
    name = shards_of(objects)[0]
    other = MemoryStore()
    with ss.ShardWriter("x", store=other) as out:
        out.write({"sound": torch.zeros(1)})
    store = MemoryStore(objects)

    def script(key: str, number: int) -> Any:
        if key != name or number == 0:
            return None
        if number == 1:
            return FlipBit(8 * 500_000)
        store.objects.pop(name, None)
        store.objects["index.json"] = other.objects["index.json"]
        return None

    with pytest.raises(ss.DatasetReplaced, match="replaced while it was read"):
        list(dataset(FaultyStore(store, script), columns=["sound"], max_corrupt=1.0))


def test_a_sample_whose_part_does_not_come_is_taken_from_the_whole() -> None:
    """Also where another part of the shard is open already; one event says so."""
    memory = MemoryStore()
    with ss.ShardWriter("x", store=memory, shard_bytes="16MB") as out:
        out.write_batch({"image": np.random.default_rng(3).integers(0, 256, (1_200, 10_000), dtype=np.uint8)})
    (name,) = shards_of(memory.objects)
    events: list[Event] = []
    store = FaultyStore(memory, lambda key, number: Truncate(-1) if (key, number) == (name, 2) else None)
    part, plain = dataset(store, observer=events.append), dataset(Whole(memory.objects))
    for number in (0, 1_199, 600):
        assert torch.equal(part[number]["image"], plain[number]["image"])
    (event,) = [event for event in events if isinstance(event, FetchRetried)]
    assert name in event.url
    assert event.cause.endswith("now the whole shard is asked for")
    assert store.gets.count(name) == 4, "the tail, two frames, and once the whole"


def test_a_store_without_ranges_has_none_when_it_is_wrapped(objects: dict[str, bytes]) -> None:
    """A fault script does not give it what it lacks."""
    part = dataset(FaultyStore(Whole(objects), ()), columns=["label"])
    assert same(list(part), list(dataset(Whole(objects), columns=["label"])))


@pytest.mark.parametrize(("fault", "error"), [(UNAVAILABLE, StoreUnavailable), (DENIED, AccessDenied)])
def test_an_outage_is_none_of_the_parts_business(objects: dict[str, bytes], fault: Fail, error: type) -> None:
    """It is retried and raised as for a whole shard."""

    def script(key: str, _: int) -> Any:
        return None if key == "index.json" else fault

    with pytest.raises(error):
        list(dataset(FaultyStore(MemoryStore(objects), script), columns=["sound"]))


@pytest.mark.parametrize("damage", ["gone", "spoiled"])
def test_a_bad_shard_is_skipped_as_ever(objects: dict[str, bytes], damage: str) -> None:
    """Read in part or whole: the same rows take its rows' places."""
    name = shards_of(objects)[2]
    spoiled = bytes(byte ^ 1 for byte in objects[name][:-40]) + objects[name][-40:]
    bad = {k: spoiled if k == name else v for k, v in objects.items() if k != name or damage == "spoiled"}
    events: list[Event] = []
    options: dict[str, Any] = {"columns": ["label"], "max_corrupt": 1.0}
    part = dataset(MemoryStore(bad), observer=events.append, **options)
    batches = list(part)
    assert same(batches, list(dataset(Whole(bad), **options)))
    assert [event.rows for event in events if isinstance(event, ShardSkipped)] == [part.index.rows[2]]
    with pytest.raises((ShardCorrupt, ss.ShardMissing)):
        list(dataset(MemoryStore(bad), columns=["label"], on_corrupt="raise"))


def test_a_dataset_of_before_is_read_whole(objects: dict[str, bytes]) -> None:
    """An index that does not know its shards' tails."""
    index = ss.Index.parse(objects["index.json"], url="x")
    old = ss.Index(**{name: getattr(index, name) for name in OLD_FIELDS})
    store = Asked({**objects, "index.json": old.dump()})
    assert same(list(dataset(store, columns=["label"])), list(dataset(Whole(objects), columns=["label"])))
    assert store.ranges == []


OLD_FIELDS = ("schema", "names", "rows", "sizes", "raw_sizes", "digests", "layout", "codec", "created", "writer")


def test_small_shards_are_read_whole() -> None:
    """A request takes longer than their bytes."""
    store = MemoryStore()
    with ss.ShardWriter("x", store=store) as out:
        out.write_batch({"a": torch.zeros(100, 100), "b": torch.arange(100)})
    asked = Asked(store.objects)
    list(dataset(asked, columns=["b"]))
    assert asked.ranges == []


def test_a_store_that_refuses_ranges_is_not_asked_for_ever(objects: dict[str, bytes]) -> None:
    """It serves whole shards as well."""

    class Refusing(Asked):
        def get_range(self, key: str, start: int, stop: int, *, timeout_s: float) -> bytes:
            super().get_range(key, start, stop, timeout_s=timeout_s)
            raise ss.StoreError("501")

    store = Refusing(objects)
    part = dataset(store, columns=["label"], order=ss.OrderOptions(lanes=2, chunk=10))
    assert same(list(part), list(dataset(Whole(objects), columns=["label"], order=ss.OrderOptions(lanes=2, chunk=10))))
    assert SHARDS <= len(store.ranges) <= SHARDS + 2


@pytest.mark.parametrize("on_corrupt", ["skip", "raise"])
def test_a_shard_that_goes_before_its_frames_are_decoded(objects: dict[str, bytes], on_corrupt: str) -> None:
    """The range that came was damaged, and the whole is no longer there: lost, as the policy says."""
    name = shards_of(objects)[0]
    store = MemoryStore(dict(objects))

    def script(key: str, number: int) -> Any:
        if key == name and number == 2:
            del store.objects[name]
        return FlipBit(8 * 500_000) if key == name and number == 1 else None

    part = dataset(FaultyStore(store, script), columns=["sound"], max_corrupt=1.0, on_corrupt=on_corrupt)
    if on_corrupt == "raise":
        with pytest.raises(ss.ShardMissing):
            list(part)
    else:
        assert len(list(part)) == len(part)
        assert part.stats()["rows_skipped"] == part.index.rows[0]
