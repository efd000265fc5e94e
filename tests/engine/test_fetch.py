"""Fetching one shard: what is tried again, what is given up, and that wrong bytes never come through."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamshards.engine.fetch import Fetcher, Progress
from streamshards.engine.retry import Cancelled, circuit_of
from streamshards.errors import (
    AccessDenied,
    ObjectMissing,
    ObjectTooLarge,
    ShardCorrupt,
    ShardMissing,
    StoreError,
    StoreUnavailable,
    StreamShardsError,
)
from streamshards.events import FetchHedged, FetchRetried
from streamshards.options import RetryOptions
from streamshards.plan.index import Index
from streamshards.shard.payload import digest_of
from streamshards.storage.local import LocalStore
from streamshards.storage.store import Patience, Store
from streamshards.testing import (
    MISSING,
    UNAVAILABLE,
    Block,
    Fail,
    FakeClock,
    Fault,
    FaultyStore,
    FlipBit,
    MemoryStore,
    Swap,
    Truncate,
)
from tests.engine.rig import Rig, ids_of, join_all, numbered, watched

NAME = "001.pt.zst"
ROWS = 30
OPTIONS = RetryOptions(deadline_s=100, base_s=1, max_wait_s=8)


@pytest.fixture(scope="module")
def good() -> tuple[MemoryStore, Index]:
    """Three shards of 30 rows."""
    return numbered([ROWS, ROWS, ROWS])


def rig_of(good: tuple[MemoryStore, Index], script: Any = (), **changes: Any) -> Rig:
    store, index = good
    return Rig(FaultyStore(MemoryStore(store.objects), script), index, retry=OPTIONS, **changes)


def waits(rig: Rig) -> list[float]:
    assert isinstance(rig.clock, FakeClock)
    return rig.clock.waits


def gets(rig: Rig) -> int:
    assert isinstance(rig.store, FaultyStore)
    return sum(key.endswith(".pt.zst") for key in rig.store.gets)  # not the look at the index after a loss


def is_right(rig: Rig, fetcher: Fetcher, shard: int = 1) -> bool:
    return ids_of(fetcher.fetch(shard).columns()) == list(range(shard * ROWS, (shard + 1) * ROWS))


# -- the policy, row by row --------------------------------------------------------------------------------------------


def test_a_good_shard_takes_one_request(good: tuple[MemoryStore, Index]) -> None:
    """One GET, no wait, no event; shards and bytes are counted exactly, and the time on the engine's clock."""
    rig = rig_of(good)
    assert is_right(rig, rig.fetcher())
    assert (gets(rig), waits(rig), rig.events) == (1, [], [])
    assert rig.stats["shards_read"] == 1
    assert rig.stats["bytes_read"] == rig.index.sizes[1]


def test_transient_errors_are_retried_until_they_pass(good: tuple[MemoryStore, Index]) -> None:
    """Outages cost waits and events, never the shard."""
    rig = rig_of(good, [UNAVAILABLE] * 5)
    assert is_right(rig, rig.fetcher())
    assert waits(rig) == [1, 2, 4, 8, 8]
    assert [(event.url, event.attempt, event.wait_s) for event in rig.retried] == [
        (f"fake://store/{NAME}", attempt, wait_s) for attempt, wait_s in enumerate(waits(rig), start=1)
    ]
    assert rig.stats["retries"] == 5
    assert rig.stats["shards_read"] == 1
    assert rig.stats["fetch_s"] == 23


def test_an_outage_beyond_the_deadline_is_no_corruption(good: tuple[MemoryStore, Index]) -> None:
    """StoreUnavailable once the deadline would pass, with its last cause; and the shard is not written off."""
    rig = rig_of(good, [UNAVAILABLE] * 16)
    fetcher = rig.fetcher()
    with pytest.raises(StoreUnavailable, match=r"fake://store/001.pt.zst: gave up after 15 attempts .*scripted"):
        fetcher.fetch(1)
    assert sum(waits(rig)) < OPTIONS.deadline_s <= sum(waits(rig)) + 8
    assert rig.stats["shards_read"] == 0
    assert is_right(rig, fetcher), "the store is back, and so is the shard"


def test_a_corrupt_shard_is_fetched_three_times(good: tuple[MemoryStore, Index]) -> None:
    """corrupt_attempts GETs, one event between two of them, then ShardCorrupt naming url and cause."""
    rig = rig_of(good, [FlipBit(800)] * 3)
    with pytest.raises(ShardCorrupt, match=r"fake://store/001.pt.zst: digest [0-9a-f]{32}, the index promises"):
        rig.fetcher().fetch(1)
    assert gets(rig) == 3
    assert waits(rig) == [1, 1]
    assert [event.attempt for event in rig.retried] == [1, 2]
    assert all("digest" in event.cause for event in rig.retried)
    assert rig.stats["retries"] == 2
    assert rig.stats["bytes_read"] == 3 * rig.index.sizes[1], "what was paid for is counted"


def test_corrupt_attempts_is_an_option(good: tuple[MemoryStore, Index]) -> None:
    """One attempt means no second look."""
    rig = rig_of(good, [FlipBit(800)])
    rig.retry = replace(OPTIONS, corrupt_attempts=1)
    with pytest.raises(ShardCorrupt):
        rig.fetcher().fetch(1)
    assert (gets(rig), rig.events) == (1, [])


@pytest.mark.parametrize("fault", [FlipBit(800), Truncate(), Swap("000.pt.zst")], ids=str)
def test_a_good_second_attempt_is_delivered(good: tuple[MemoryStore, Index], fault: Fault) -> None:
    """Damage on the way is gone after one refetch: one event, the right rows."""
    rig = rig_of(good, [fault])
    assert is_right(rig, rig.fetcher())
    assert (gets(rig), len(rig.events)) == (2, 1)


def test_an_outage_between_two_corrupt_answers_keeps_both_counts(good: tuple[MemoryStore, Index]) -> None:
    """Transient failures do not use up the attempts that corrupt shards have."""
    rig = rig_of(good, [FlipBit(800), UNAVAILABLE, UNAVAILABLE, FlipBit(801), UNAVAILABLE])
    assert is_right(rig, rig.fetcher())
    assert gets(rig) == 6
    assert rig.stats["retries"] == 5


def test_a_missing_shard_is_looked_for_once_more(good: tuple[MemoryStore, Index]) -> None:
    """One second look after one second, then ShardMissing with the command that lists all such shards."""
    rig = rig_of(good, [MISSING, MISSING])
    with pytest.raises(ShardMissing, match="streamshards verify fake://store"):
        rig.fetcher().fetch(1)
    assert (gets(rig), waits(rig), rig.stats["retries"]) == (2, [1.0], 1)


def test_a_late_shard_is_delivered(good: tuple[MemoryStore, Index]) -> None:
    """A store that serves a shard a second late costs that second, even if it stumbles in between."""
    rig = rig_of(good, [MISSING, UNAVAILABLE])
    assert is_right(rig, rig.fetcher())
    assert waits(rig) == [1.0, 1.0]


@pytest.mark.parametrize("kind", [AccessDenied, StoreError], ids=lambda kind: kind.__name__)
def test_what_waiting_cannot_mend_is_raised_at_once(
    good: tuple[MemoryStore, Index], kind: type[StreamShardsError]
) -> None:
    """No retry, no wait, no event; and the next fetch asks again, for it may have been mended."""
    rig = rig_of(good, [Fail(kind)])
    fetcher = rig.fetcher()
    with pytest.raises(kind) as caught:
        fetcher.fetch(1)
    assert type(caught.value) is kind
    assert (gets(rig), waits(rig), rig.events) == (1, [], [])
    assert is_right(rig, fetcher)


@pytest.mark.parametrize("faults", [[FlipBit(800)] * 3, [MISSING] * 2], ids=["corrupt", "missing"])
def test_a_lost_shard_stays_lost(good: tuple[MemoryStore, Index], faults: list[Fault]) -> None:
    """Within one epoch a lost shard is not fetched again, and its error stays the same: all its rows share one fate."""
    rig = rig_of(good, faults)
    fetcher = rig.fetcher()
    texts = set()
    for _ in range(3):
        with pytest.raises((ShardCorrupt, ShardMissing)) as caught:
            fetcher.fetch(1)
        texts.add((type(caught.value), str(caught.value)))
    assert len(texts) == 1
    assert gets(rig) == len(faults)
    assert is_right(rig, fetcher, shard=2)


def test_a_lost_shard_gives_its_memory_back(good: tuple[MemoryStore, Index]) -> None:
    """Remembering that a shard is bad does not keep its bytes: 16 bad shards of 32 MiB would take 512 MiB."""
    rig = rig_of(good)
    data = b"not a shard".ljust(int(rig.index.sizes[1]), b"!")
    rig.store = MemoryStore({NAME: data})
    fetcher = rig.fetcher()
    before = sys.getrefcount(data)
    with pytest.raises(ShardCorrupt):
        fetcher.fetch(1)
    assert sys.getrefcount(data) == before


def test_a_refetch_does_not_hold_two_copies(good: tuple[MemoryStore, Index]) -> None:
    """Bytes found wrong are let go before they are fetched anew."""
    rig = rig_of(good)
    data = b"not a shard".ljust(int(rig.index.sizes[1]), b"!")
    rig.store = MemoryStore({NAME: data})
    held: list[int] = []
    rig.clock = FakeClock(on_wait=lambda _: held.append(sys.getrefcount(data)))
    before = sys.getrefcount(data)
    with pytest.raises(ShardCorrupt):
        rig.fetcher().fetch(1)
    assert held == [before, before]


def test_a_deleted_dataset_is_told_as_such(good: tuple[MemoryStore, Index]) -> None:
    """A shard is missing and so is the index: a plain StoreError that says the dataset is gone, never a skip."""
    rig = rig_of(good)
    rig.store = MemoryStore({})
    with pytest.raises(
        StoreError, match=r"fake://store/001.pt.zst: the dataset is gone: index.json is no longer there"
    ):
        rig.fetcher().fetch(1)
    rig.store = MemoryStore({NAME: b"bad", "000.pt.zst": b""})
    with pytest.raises(ShardCorrupt):
        rig.fetcher().fetch(1)


def test_a_missing_shard_of_a_dataset_with_an_index_is_one_shard(good: tuple[MemoryStore, Index]) -> None:
    """While the index is there, unchanged, a missing shard is that and nothing more."""
    rig = rig_of(good, lambda key, _: MISSING if key == NAME else None)
    with pytest.raises(ShardMissing) as caught:
        rig.fetcher().fetch(1)
    assert type(caught.value) is ShardMissing


# -- how it goes -------------------------------------------------------------------------------------------------------


def test_how_a_fetch_goes_is_known_at_any_time(good: tuple[MemoryStore, Index]) -> None:
    """Which attempt, what it does, since when, and why the one before failed: in a request, and between two."""
    answer, entered = threading.Event(), threading.Event()
    script = [UNAVAILABLE, Block(answer, entered)]
    rig = rig_of(good, script)
    between: list[Progress | None] = []
    clock = FakeClock(on_wait=lambda _: between.append(fetcher.progress(1)))
    rig.clock = clock
    fetcher = rig.fetcher()
    assert fetcher.progress(1) is None
    thread = threading.Thread(target=lambda: fetcher.fetch(1), daemon=True)
    thread.start()
    watched(entered.wait)
    clock.advance(12)
    assert fetcher.progress(1) == Progress(2, "asked 12 s ago", "get failed: scripted")
    assert fetcher.progress(0) is None
    answer.set()
    join_all([thread])
    assert between == [Progress(1, "next in 1 s", "get failed: scripted")]
    assert fetcher.progress(1) is None


def test_a_wait_behind_others_is_told_as_such(good: tuple[MemoryStore, Index]) -> None:
    """Behind an open circuit: no attempt yet, and the store answers nobody."""
    rig = rig_of(good)
    seen: list[Progress | None] = []

    def see(_: float) -> None:
        seen.append(fetcher.progress(1))
        circuit.answered()

    rig.clock = FakeClock(on_wait=see)
    fetcher, circuit = rig.fetcher(), circuit_of(rig.store, rig.clock)
    for _ in range(16):
        circuit.failed(5, OPTIONS)
    assert is_right(rig, fetcher)
    assert seen == [Progress(0, "waiting for the store to answer others", "")]


class Hedging(MemoryStore):
    """A store that makes the second request at once whenever it may, and says that it won."""

    def get(self, key: str, *, timeout_s: float, max_bytes: int) -> bytes:
        hedge = timeout_s.hedge if isinstance(timeout_s, Patience) else None
        if hedge is not None and hedge.begin():
            hedge.is_won = True
        return super().get(key, timeout_s=timeout_s, max_bytes=max_bytes)


def test_second_requests_are_counted_and_told(good: tuple[MemoryStore, Index]) -> None:
    """Of 60 reads 3 may be hedged: each is one event, one count; without ``hedge_s`` none is."""
    for hedge_s, hedges in ((0.5, 3), (None, 0)):
        rig = rig_of(good)
        rig.store = Hedging(good[0].objects)
        rig.retry = replace(OPTIONS, hedge_s=hedge_s)
        fetcher = rig.fetcher()
        for _ in range(60):
            assert is_right(rig, fetcher)
        assert rig.events == [FetchHedged(f"fake://store/{NAME}", 0.5, is_won=True)] * hedges
        assert rig.stats["hedges"] == rig.stats["hedges_won"] == hedges
        assert rig.stats["shards_read"] == 60


def test_a_read_has_one_second_request(good: tuple[MemoryStore, Index]) -> None:
    """However often a shard is fetched anew, it is asked for a second time once."""
    rig = rig_of(good)
    rig.store = Hedging({NAME: b"bad".ljust(int(rig.index.sizes[1]))})
    rig.retry = replace(OPTIONS, hedge_s=0.5)
    fetcher, circuit = rig.fetcher(), circuit_of(rig.store, rig.clock)
    for _ in range(100):
        circuit.read()
    with pytest.raises(ShardCorrupt):
        fetcher.fetch(1)
    assert rig.stats["hedges"] == 1


# -- damage -----------------------------------------------------------------------------------------------------------


def grown(extra: int) -> Callable[[bytes], bytes]:
    return lambda data: data + b"\x5a" * extra


def patched(at: float, patch: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        place = min(int(len(data) * at), len(data) - len(patch))
        return data[:place] + patch + data[place + len(patch) :]

    return change


def shifted(data: bytes) -> bytes:
    return data[1:] + data[:1]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "one byte": lambda data: data[:1],
    "cut in half": lambda data: data[: len(data) // 2],
    "last byte gone": lambda data: data[:-1],
    "first byte gone": lambda data: data[1:],
    "first byte flipped": patched(0.0, b"\x00"),
    "middle flipped": patched(0.5, b"\x00\xff\x00\xff"),
    "directory flipped": patched(0.9, b"\x00"),
    "last byte flipped": patched(1.0, b"\x00"),
    "zeroed": lambda data: bytes(len(data)),
    "zeroed from the middle": lambda data: data[: len(data) // 2].ljust(len(data), b"\0"),
    "rotated": shifted,
    "one byte more": grown(1),
    "two bytes more": grown(2),
    "a MiB more": grown(1 << 20),
    "twice": lambda data: data * 2,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_damage_is_corruption(good: tuple[MemoryStore, Index], tmp_path: Path, kind: str, place: str) -> None:
    """Whatever became of the object, it ends as ShardCorrupt with its url, after corrupt_attempts looks, and no row."""
    store, index = good
    bad = DAMAGE[kind](store.objects[NAME])
    assert bad != store.objects[NAME]
    inner: Store = MemoryStore({NAME: bad})
    if place == "disk":
        (tmp_path / NAME).write_bytes(bad)
        inner = LocalStore(tmp_path)
    rig = Rig(FaultyStore(inner, []), index, retry=OPTIONS)
    with pytest.raises(ShardCorrupt, match=NAME):
        rig.fetcher().fetch(1)
    assert gets(rig) == 3
    assert [event.attempt for event in rig.retried] == [1, 2]


def test_a_grown_object_says_what_was_promised(good: tuple[MemoryStore, Index]) -> None:
    """However much longer the object is, the message has the promised size; the store's own error is the cause."""
    for extra in (1, 2, 1000):
        rig = rig_of(good)
        rig.store = MemoryStore({NAME: good[0].objects[NAME] + b"x" * extra})
        with pytest.raises(ShardCorrupt, match=f"{rig.index.sizes[1]:,} bytes promised by the index") as caught:
            rig.fetcher().fetch(1)
    assert isinstance(caught.value.__cause__, ObjectTooLarge)


def test_no_single_bit_passes(good: tuple[MemoryStore, Index]) -> None:
    """A flipped bit in any byte of a shard (every 5th of them, tried here) is noticed."""
    for byte in range(0, int(good[1].sizes[1]), 5):
        rig = rig_of(good, [FlipBit(8 * byte + byte % 8)])
        rig.retry = replace(OPTIONS, corrupt_attempts=1)
        with pytest.raises(ShardCorrupt):
            rig.fetcher().fetch(1)


def test_another_shard_in_its_place_is_noticed(good: tuple[MemoryStore, Index]) -> None:
    """A whole and healthy shard under the wrong name is corrupt, even if it has the same size and rows."""
    store, index = good
    data = store.objects[NAME]
    other = store.objects["002.pt.zst"]
    index = replace(index, sizes=np.array([len(data), len(other), len(other)]))
    rig = Rig(MemoryStore({NAME: other}), index, retry=OPTIONS)
    with pytest.raises(ShardCorrupt, match="digest"):
        rig.fetcher().fetch(1)


def test_a_right_digest_is_not_enough(good: tuple[MemoryStore, Index]) -> None:
    """Bytes that are what the index promises, but no shard, or of other rows or a larger payload, are corrupt."""
    store, index = good
    junk = b"junk" * 100
    bad_indexes = {
        "no seek table": (
            replace(index, sizes=np.array([1, len(junk), 1]), digests=["", digest_of(junk), ""]),
            junk,
        ),
        "29 rows promised": (replace(index, rows=np.array([ROWS, ROWS - 1, ROWS])), store.objects[NAME]),
        "inflates to": (replace(index, raw_sizes=index.raw_sizes - 1), store.objects[NAME]),
    }
    for text, (bad_index, data) in bad_indexes.items():
        rig = Rig(MemoryStore({NAME: data}), bad_index, retry=OPTIONS)
        with pytest.raises(ShardCorrupt, match=text):
            rig.fetcher().fetch(1)


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults", [[UNAVAILABLE] * 9, [FlipBit(800)] * 9, [MISSING] * 9], ids=["transient", "corrupt", "missing"]
)
def test_cancelling_ends_every_wait(good: tuple[MemoryStore, Index], faults: list[Fault]) -> None:
    """Whatever is being waited for: once cancelled, no further request is made and the shard is not written off."""
    rig = rig_of(good, faults)
    rig.clock = FakeClock(on_wait=lambda _: rig.cancelled.set())
    fetcher = rig.fetcher()
    with pytest.raises(Cancelled):
        fetcher.fetch(1)
    assert gets(rig) == 1
    rig.cancelled.clear()
    rig.clock = FakeClock()
    rig.store._script = []  # type: ignore[attr-defined]  # a FaultyStore
    assert is_right(rig, fetcher)


def test_cancelled_before_the_request(good: tuple[MemoryStore, Index]) -> None:
    """Nothing is asked of the store any more."""
    rig = rig_of(good)
    rig.cancelled.set()
    with pytest.raises(Cancelled):
        rig.fetcher().fetch(1)
    assert gets(rig) == 0


def test_many_threads_may_fetch(good: tuple[MemoryStore, Index]) -> None:
    """8 threads over one fetcher, half of them on a lost shard: each gets the right rows, or the right error."""
    rig = rig_of(good, lambda key, _: FlipBit(800) if key == NAME else None)
    fetcher = rig.fetcher()
    barrier = threading.Barrier(8)
    results: list[bool | str] = []

    def work(shard: int) -> None:
        barrier.wait()
        try:
            results.append(is_right(rig, fetcher, shard))
        except ShardCorrupt as error:
            results.append(str(error))

    threads = [threading.Thread(target=work, args=(number % 3,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    watched(lambda: join_all(threads))
    texts = {result for result in results if result is not True}
    assert len(results) == 8
    assert len(texts) == 1
    assert NAME in str(texts)


def test_the_event_is_told_before_the_wait(good: tuple[MemoryStore, Index]) -> None:
    """Whoever watches learns of a retry when it happens, not when it is over."""
    rig = rig_of(good, [FlipBit(800), MISSING])
    told: list[int] = []
    rig.clock = FakeClock(on_wait=lambda _: told.append(len(rig.events)))
    assert is_right(rig, rig.fetcher())
    assert told == [1, 2]
    assert all(isinstance(event, FetchRetried) for event in rig.events)


def test_a_blocked_store_is_abandoned_after_the_attempts_timeout(good: tuple[MemoryStore, Index]) -> None:
    """The store is given attempt_timeout_s, and its failure to keep it is transient."""
    rig = rig_of(good, [Block(threading.Event())])
    rig.retry = replace(OPTIONS, attempt_timeout_s=1e-6)
    assert is_right(rig, rig.fetcher())
    assert len(rig.retried) == 1
    assert "no answer" in rig.retried[0].cause


def test_missing_is_told_from_missing_elsewhere(good: tuple[MemoryStore, Index]) -> None:
    """ShardMissing is an ObjectMissing that names the shard's url and has the store's own as its cause."""
    rig = rig_of(good, [MISSING, MISSING])
    with pytest.raises(ObjectMissing) as caught:
        rig.fetcher().fetch(1)
    assert type(caught.value) is ShardMissing
    assert type(caught.value.__cause__) is ObjectMissing
