from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from streamshards import ShardWriter, StreamingDataset
from streamshards.convert.checking import verify
from streamshards.convert.place import Place
from streamshards.engine.verify import check_shards
from streamshards.errors import AccessDenied, OptionInvalid
from streamshards.options import RetryOptions
from streamshards.shard.schema import Schema
from streamshards.testing.stores import DENIED, FaultyStore, FlipBit, MemoryStore
from tests.conftest import StoreUrl
from tests.datasets import sample
from tests.pt_files import fill

ONCE = RetryOptions(corrupt_attempts=1)


def write(folder: Path) -> list[str]:
    """Write a dataset of a dozen shards and return their names."""
    with ShardWriter(folder, shard_bytes=1_000) as out:
        for number in range(60):
            out.write(sample(number))
    index = StreamingDataset(str(folder)).index
    assert index.num_shards >= 8
    return list(index.names)


def test_a_good_dataset_is_good(store_url: StoreUrl) -> None:
    """Nothing bad, no orphans, on any store; every shard is told of."""
    with ShardWriter(store_url.url, shard_bytes=1_000, storage_options=store_url.storage_options) as out:
        for number in range(30):
            out.write(sample(number))
    told: list[tuple[int, int, str]] = []
    found = verify(
        store_url.url,
        orphans=True,
        storage_options=store_url.storage_options,
        progress=lambda *step: told.append(step),
    )
    assert (found.bad, found.orphans) == ([], [])
    assert [done for done, _, _ in told] == list(range(1, found.index.num_shards + 1))
    assert sorted(name for _, _, name in told) == sorted(found.index.names)


@pytest.mark.parametrize("threads", [1, 4])
def test_each_kind_of_damage_is_found(tmp_path: Path, threads: int) -> None:
    """A flipped bit, a truncated, a missing and two swapped shards are listed in index order, the others are not."""
    names = write(tmp_path)
    flipped, truncated, missing, one, other = (tmp_path / names[i] for i in (1, 3, 4, 6, 7))
    data = flipped.read_bytes()
    flipped.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    truncated.write_bytes(truncated.read_bytes()[:-5])
    missing.unlink()
    swap = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(swap)
    found = verify(tmp_path, threads=threads, retry=ONCE)
    assert [bad.name for bad in found.bad] == [names[i] for i in (1, 3, 4, 6, 7)]
    assert [bad.is_missing for bad in found.bad] == [False, False, True, False, False]
    assert "digest" in found.bad[0].cause
    assert "bytes promised" in found.bad[1].cause
    assert all(bad.num_samples > 0 and not bad.cause.startswith(str(tmp_path)) for bad in found.bad)


def test_an_index_that_is_wrong_about_a_tail_is_found(tmp_path: Path) -> None:
    """Its fingerprint does not cover that, and whole shards are read all the same."""
    names = write(tmp_path)
    content = json.loads((tmp_path / "index.json").read_text())
    content["shards"]["tail_check"][2] ^= 1
    (tmp_path / "index.json").write_text(json.dumps(content))
    (bad,) = verify(tmp_path).bad
    assert bad.name == names[2]
    assert "the index is wrong about its last bytes" in bad.cause


def test_any_flipped_bit_of_a_shard_is_found() -> None:
    """Whichever bit the store gets wrong, the check of that shard fails, and only that."""
    store = MemoryStore(url="fake://bits")
    with ShardWriter("fake://bits", shard_bytes=1_000, store=store) as out:
        for number in range(20):
            out.write(sample(number))
    index = out.index
    victim = index.names[1]
    for bit in range(0, len(store.objects[victim]) * 8, 499):
        faulty = FaultyStore(store, lambda key, _, bit=bit: FlipBit(bit) if key == victim else None)  # type: ignore[misc]
        place = Place(store=faulty, retry=ONCE)
        checks = check_shards(
            place.fetcher(index), index.num_shards, Schema.from_json(index.schema), threads=2, cancelled=place.cancelled
        )
        assert [check.shard for check in checks if check.error is not None] == [1]


def _verifiers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("streamshards-verify")]


def test_closing_in_the_middle_ends_the_threads(tmp_path: Path) -> None:
    """Whoever stops asking leaves no thread behind."""
    write(tmp_path)
    place = Place.at(tmp_path)
    index = place.load_index()
    checks = check_shards(
        place.fetcher(index), index.num_shards, Schema.from_json(index.schema), threads=4, cancelled=place.cancelled
    )
    next(checks)
    checks.close()
    assert _verifiers() == []


def test_a_store_that_refuses_raises() -> None:
    """Refused credentials are no bad shard: the error comes out, and no thread stays."""
    store = MemoryStore(url="fake://denied")
    with ShardWriter("fake://denied", shard_bytes=1_000, store=store) as out:
        for number in range(20):
            out.write(sample(number))
    place = Place(store=FaultyStore(store, lambda _key, _number: DENIED), retry=ONCE)
    checks = check_shards(
        place.fetcher(out.index),
        out.index.num_shards,
        Schema.from_json(out.index.schema),
        threads=3,
        cancelled=place.cancelled,
    )
    with pytest.raises(AccessDenied):
        list(checks)
    assert _verifiers() == []


def test_orphans_are_listed(tmp_path: Path) -> None:
    """What the index does not name, with its size; the index and its shards are not among them."""
    write(tmp_path)
    (tmp_path / "notes.txt").write_text("12345")
    fill(tmp_path / "old", "rows")
    found = verify(tmp_path, orphans=True)
    assert found.orphans is not None
    assert found.orphans[0] == ("notes.txt", 5)
    assert [orphan.name for orphan in found.orphans[1:]] == sorted(f"old/part-{number}.pt" for number in range(12))
    assert verify(tmp_path).orphans is None


def test_the_number_of_threads_is_checked(tmp_path: Path) -> None:
    """From 1 to 256."""
    with pytest.raises(OptionInvalid, match="threads=0"):
        verify(tmp_path, threads=0)
