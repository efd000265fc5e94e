"""Loading blocks: within the budget, on few cores, in the order of need, and what becomes of lost shards."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.engine import loading
from streamshards.engine.blocks import BlockBuffers, loaded_sizes
from streamshards.engine.loading import BlockLoader
from streamshards.engine.retry import Cancelled
from streamshards.engine.source import LossPolicy
from streamshards.errors import AccessDenied, ShardCorrupt, ShardMissing, StoreUnavailable, TooManyCorrupt
from streamshards.plan import schedule as schedule_module
from streamshards.plan.index import Index
from streamshards.plan.schedule import Visit, schedule
from streamshards.plan.topology import Topology
from streamshards.shard.columns import to_samples
from streamshards.testing import (
    DENIED,
    MISSING,
    UNAVAILABLE,
    Block,
    Fault,
    FaultyStore,
    FlipBit,
    MemoryStore,
    Truncate,
)
from tests.engine.rig import Rig, dataset_of, drain, engine_threads, ids_of, join_all, numbered, sample, until, watched
from tests.shard.shard_cases import same

BAD = FlipBit(800)


@cache
def dataset(rows: tuple[int, ...]) -> tuple[MemoryStore, Index]:
    return numbered(rows)


def rig_of(rows: Sequence[int], faults: dict[int, Fault] | None = None, **changes: Any) -> Rig:
    """Return a rig over shards of that many *rows*; some of them always fail as *faults* says."""
    store, index = dataset(tuple(rows))
    by_name = {index.names[shard]: fault for shard, fault in (faults or {}).items()}
    return Rig(FaultyStore(store, lambda key, _: by_name.get(key)), index, **changes)


def gets(rig: Rig) -> list[str]:
    assert isinstance(rig.store, FaultyStore)
    return rig.store.gets


def visits_of(rig: Rig) -> list[Visit]:
    return [visit for step in schedule(rig.order(), rig.assignment()) for visit in step.opened]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    watched(lambda: join_all(engine_threads()))


class Loading:
    """A loader whose visits are admitted by hand; stops its threads."""

    def __init__(self, rig: Rig) -> None:
        self.visits = visits_of(rig)
        self.loader = rig.loader()

    def __enter__(self) -> tuple[BlockLoader, list[Visit]]:
        return self.loader, self.visits

    def __exit__(self, *_: object) -> None:
        self.loader.close()
        join_all(self.loader.threads)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_budget_is_used() -> None:
    """With room for all blocks, all are loaded ahead while the consumer has not taken a single batch."""
    rig = rig_of([8] * 6, shuffle_block=8, ready_batches=1)
    loader = rig.loader()
    stream = rig.stream(loader)
    batches = drain(stream)
    assert len(batches) == 12
    assert loader.peak_bytes > needed_bytes(rig)


def test_a_block_fits_beside_what_is_held() -> None:
    """Stored and raw bytes count until a block is decoded, raw ones until it is released; an empty loader takes any."""
    rig = rig_of([8] * 4, shuffle_block=1)
    raw, stored = loaded_sizes(rig.index, rig.dataset_schema), rig.index.sizes
    rig.budget_bytes = int(raw.sum() + stored.sum()) - 1
    with Loading(rig) as (loader, visits):
        shards = [visit.block.pieces[0].shard for visit in visits]
        for visit in visits[:3]:
            assert loader.fits(visit)
            loader.admit(visit)
            watched(lambda visit=visit: loader.wait(visit))
        assert loader._used_bytes == raw[shards[:3]].sum()
        assert loader.fits(visits[3])
        loader._budget_bytes = int(raw.sum() + stored[shards[3]]) - 1
        assert not loader.fits(visits[3])
        loader.release(visits[0])
        assert loader._used_bytes == raw[shards[1:3]].sum()
        assert loader.fits(visits[3])
        loader._budget_bytes = 1
        assert not loader.fits(visits[3])
        for visit in visits[1:3]:
            loader.release(visit)
        assert loader._used_bytes == 0
        assert loader.fits(visits[3])


def test_memory_is_reckoned_in_the_datasets_form() -> None:
    """A shard in which a field is always None stores next to nothing of it, but its rows take their full room."""
    wide = torch.zeros(1000)
    store, index = dataset_of([[{"id": 0, "x": wide}], [{"id": n, "x": None} for n in range(1, 50)]])
    rig = Rig(store, index, shuffle=False, shuffle_block=1)
    assert index.raw_sizes[1] < 49 * wide.nbytes / 10
    with Loading(rig) as (loader, visits):
        loader.admit(visits[1])
        block = watched(lambda: loader.wait(visits[1]))
        assert block.columns.nbytes > 49 * wide.nbytes
        assert loader._used_bytes >= block.columns.nbytes + block.index.nbytes


def test_long_rows_do_not_hide_what_is_always_none() -> None:
    """A shard that is large for one field and stores nothing of another takes room for both."""
    wide = torch.zeros(1000)
    none = [{"id": n, "t": "x" * 4000, "x": None} for n in range(1, 200)]
    store, index = dataset_of([[{"id": 0, "t": "", "x": wide}], none])
    rig = Rig(store, index, shuffle=False, shuffle_block=1)
    with Loading(rig) as (loader, visits):
        loader.admit(visits[1])
        block = watched(lambda: loader.wait(visits[1]))
        assert loader._used_bytes >= block.columns.nbytes + block.index.nbytes


@pytest.mark.parametrize("rows", [(1,), (5, 1, 7, 2), (40, 40)], ids=str)
def test_what_is_reckoned_is_what_is_taken(rows: tuple[int, ...]) -> None:
    """The bytes admitted for a block cover its columns and its order, and are not far above."""
    rig = rig_of(rows, shuffle_block=20)
    with Loading(rig) as (loader, visits):
        for visit in visits:
            before = loader._used_bytes
            loader.admit(visit)
            block = watched(lambda visit=visit: loader.wait(visit))
            taken = block.columns.nbytes + block.index.nbytes
            overhead = 4096 * len(visit.block.pieces)  # of the .pt file around the columns
            assert taken <= loader._used_bytes - before <= 2 * taken + overhead


def test_a_released_block_is_forgotten() -> None:
    """After its release nothing holds a block's memory: not the loader, and not a thread that waits for more work."""
    rig = rig_of([8] * 6, shuffle_block=1, threads=3)
    with Loading(rig) as (loader, visits):
        for visit in visits:
            loader.admit(visit)
        held = [weakref.ref(watched(lambda visit=visit: loader.wait(visit)).columns) for visit in visits]
        until(lambda: idle_threads(loader) == 3)
        for visit in visits:
            loader.release(visit)
        gc.collect()
        assert [ref() for ref in held] == [None] * len(visits)
        assert all(thread.is_alive() for thread in loader.threads)


def idle_threads(loader: BlockLoader) -> int:
    """Return how many threads wait for work."""
    with loader._changed:
        return len(loader._changed._waiters)  # type: ignore[attr-defined]  # of the standard library


# -- threads -----------------------------------------------------------------------------------------------------------


def test_at_most_cores_threads_decode_and_the_others_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four threads decode, side by side; the other two fetch all the rest and start no third decode."""
    rig = rig_of([4] * 12, shuffle_block=1, threads=4, cores=2)
    all_fetched = threading.Event()
    both = threading.Barrier(2)
    lock = threading.Lock()
    active: set[int] = set()
    most = 0
    num_fills = 0

    class Watched(BlockBuffers):
        def fill(self, number: int) -> None:
            nonlocal most, num_fills
            with lock:
                active.add(threading.get_ident())
                most = max(most, len(active))
                num_fills += 1
                is_early = num_fills <= 2
            if is_early:
                both.wait(60)
                assert all_fetched.wait(60)
            super().fill(number)
            with lock:
                active.remove(threading.get_ident())

    def script(key: str, turn: int) -> None:
        if len(gets(rig)) == 12:
            all_fetched.set()

    rig.store = FaultyStore(dataset((4,) * 12)[0], script)
    monkeypatch.setattr(loading, "BlockBuffers", Watched)
    batches = drain(rig.stream())
    assert [ids_of(batch) for batch in batches] == rig.expected_ids()
    assert (most, num_fills) == (2, 12)


def test_one_thread_decodes_what_it_has_before_it_fetches_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block is whole before the second is begun, however many have been admitted."""
    rig = rig_of([4] * 4, shuffle_block=8, threads=1)
    log: list[str] = []

    class Logged(BlockBuffers):
        def fill(self, number: int) -> None:
            log.append(f"fill {rig.index.names[self.pieces[number].piece.shard]}")
            super().fill(number)

    monkeypatch.setattr(loading, "BlockBuffers", Logged)
    rig.store = FaultyStore(dataset((4,) * 4)[0], lambda key, _: log.append(f"get {key}"))
    admitted = threading.Event()
    rig.store = FaultyStore(rig.store, lambda *_: Block(admitted))
    with Loading(rig) as (loader, visits):
        for visit in visits:
            loader.admit(visit)
        admitted.set()
        watched(lambda: loader.wait(visits[-1]))
    expected = []
    for visit in visits:
        names = [rig.index.names[piece.shard] for piece in visit.block.pieces]
        expected += [f"get {name}" for name in names] + [f"fill {name}" for name in names]
    assert log == expected


def test_a_failure_reaches_whoever_waits_for_that_block_only() -> None:
    """Blocks before and after come through; the error is the store's own, with the traceback of where it happened."""
    rig = rig_of([4] * 5, shuffle_block=1, threads=2)
    denied = visits_of(rig)[2].block.pieces[0].shard
    rig = rig_of([4] * 5, {denied: DENIED}, shuffle_block=1, threads=2)
    with Loading(rig) as (loader, visits):
        for visit in visits:
            loader.admit(visit)
        for number, visit in enumerate(visits):
            if number != 2:
                assert watched(lambda visit=visit: loader.wait(visit)).columns.num_rows == 4
        for _ in range(2):
            with pytest.raises(AccessDenied) as caught:
                watched(lambda: loader.wait(visits[2]))
        assert "_open_piece" in [entry.name for entry in caught.traceback]


def test_an_error_of_ours_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what nobody thought of, a MemoryError while decoding, arrives where the block is waited for."""

    class Broken(BlockBuffers):
        def fill(self, number: int) -> None:
            raise MemoryError("no room")

    monkeypatch.setattr(loading, "BlockBuffers", Broken)
    rig = rig_of([4, 4])
    with Loading(rig) as (loader, visits):
        loader.admit(visits[0])
        with pytest.raises(MemoryError, match="no room"):
            watched(lambda: loader.wait(visits[0]))
    assert loader._filling == 0


def test_close_ends_waits_and_threads() -> None:
    """Whoever waits gets Cancelled; nothing admitted later is begun; the threads end as their requests return."""
    until, entered = threading.Event(), threading.Event()
    rig = rig_of([4] * 4, dict.fromkeys(range(4), Block(until, entered)), shuffle_block=1, threads=2)
    loader, visits = rig.loader(), visits_of(rig)
    for visit in visits[:3]:
        loader.admit(visit)
    assert entered.wait(60)
    outcome: list[str] = []

    def wait() -> None:
        try:
            loader.wait(visits[0])
        except Cancelled:
            outcome.append("cancelled")

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    loader.close()
    loader.close()
    join_all([waiter])
    assert outcome == ["cancelled"]
    loader.admit(visits[3])
    with pytest.raises(Cancelled):
        watched(lambda: loader.wait(visits[3]))
    until.set()
    join_all(loader.threads)
    assert len(gets(rig)) <= 2


def test_threads_that_cannot_start_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the process's limit of threads the reader fails, and the threads it had started end."""
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    rig = rig_of([4], threads=4)
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="new thread"):
        rig.loader()
    monkeypatch.undo()
    assert len(started) == 2
    watched(lambda: join_all(started))


def test_describe_at_every_stage() -> None:
    """What a slow block waits for can be told at any time: memory, shards by name, decoding, or nothing more."""
    answer = threading.Event()
    rig = rig_of([4] * 4, {3: Block(answer)}, shuffle=False, shuffle_block=8, threads=2)
    with Loading(rig) as (loader, (first, second, third, *_)):
        assert loader.describe(third) == "memory to load lane 0, block 3"
        for visit in (first, second, third):
            loader.admit(visit)
        until(lambda: len(gets(rig)) == 4 and idle_threads(loader) == 1)
        assert loader.describe(third) == "003.pt.zst (1 of 2 shards of lane 0, block 3)"
        assert loader.describe(first) == "lane 0, block 0 to be gathered"
        answer.set()
        watched(lambda: loader.wait(third))
        assert loader.describe(third) == "lane 0, block 3 to be gathered"


# -- lost shards -------------------------------------------------------------------------------------------------------


def delivered(rig: Rig) -> list[list[int]]:
    """Return the ids of each batch, after checking that each row is all of the sample that its id names."""
    batches = drain(rig.stream())
    for batch in batches:
        assert same(to_samples(batch), [sample(number) for number in ids_of(batch)])
    return [ids_of(batch) for batch in batches]


ROWS = (6, 6, 3, 6, 9, 6)
LOST: dict[int, Fault] = {1: BAD, 2: MISSING, 4: Truncate(100)}
SHAPE: dict[str, Any] = {"lanes": 2, "chunk": 3, "shuffle_block": 12, "batch_size": 6}


def flat(batches: Iterable[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def ids_in(rows: Sequence[int], shards: Iterable[int]) -> set[int]:
    first = np.concatenate([[0], np.cumsum(rows)]).tolist()
    return {number for shard in shards for number in range(first[shard], first[shard + 1])}


def test_lost_rows_are_replaced_and_all_others_stay() -> None:
    """As many batches of as many rows as without loss; rows of good shards at their own places, others at the rest."""
    expected = rig_of(ROWS, **SHAPE).expected_ids()
    lost = ids_in(ROWS, LOST)
    got = delivered(rig_of(ROWS, LOST, **SHAPE))
    assert [len(batch) for batch in got] == [len(batch) for batch in expected]
    for now, then in zip(flat(got), flat(expected), strict=True):
        assert now not in lost
        assert now == then or then in lost


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_topology_refills_alike(world_size: int, num_workers: int, threads: int) -> None:
    """The global batches of an epoch with lost shards are the same on 1, 2 and 3 ranks with 1 and 2 workers each."""
    reference = delivered(rig_of(ROWS, LOST, **SHAPE))
    parts: dict[int, list[int]] = {}
    for rank in range(world_size):
        for worker in range(num_workers):
            topology = Topology(rank=rank, world_size=world_size).with_worker(worker, num_workers)
            shape = SHAPE | {"batch_size": SHAPE["batch_size"] // world_size}
            batches = delivered(rig_of(ROWS, LOST, topology=topology, threads=threads, **shape))
            for number, batch in enumerate(batches):
                parts.setdefault((number * num_workers + worker) * world_size + rank, []).extend(batch)
    whole = [parts[number] for number in sorted(parts)]
    assert [flat(whole[t : t + world_size]) for t in range(0, len(whole), world_size)] == reference


def test_a_resumed_epoch_refills_alike() -> None:
    """From any position, the rest of a damaged epoch is what it would have been."""
    reference = flat(delivered(rig_of(ROWS, LOST, tail="uneven", **SHAPE)))
    for start in range(0, sum(ROWS), 5):
        rest = delivered(rig_of(ROWS, LOST, tail="uneven", start=start, **SHAPE))
        assert flat(rest) == reference[start:]


def test_a_lost_shard_is_one_event_and_its_rows_are_counted() -> None:
    """One ShardSkipped per lost shard, with url, shard, rows and cause; none for good ones."""
    rig = rig_of(ROWS, LOST, lanes=1, shuffle_block=12)
    delivered(rig)
    assert sorted((event.shard, event.url, event.rows) for event in rig.skipped) == [
        (shard, f"fake://store/{shard:03}.pt.zst", ROWS[shard]) for shard in LOST
    ]
    causes = {event.shard: event.cause for event in rig.skipped}
    assert "digest" in causes[1]
    assert "does not have it" in causes[2]
    assert "100 received" in causes[4]
    assert (rig.stats["shards_skipped"], rig.stats["rows_skipped"]) == (3, 18)


def test_a_lost_shard_of_several_lanes_is_one_event() -> None:
    """A shard that lies in two lanes is logged once; all of its rows are counted."""
    rig = rig_of([4, 20, 4], {1: BAD}, lanes=2, chunk=1, shuffle=False, shuffle_block=100, batch_size=4)
    delivered(rig)
    assert [event.shard for event in rig.skipped] == [1]
    assert (rig.stats["shards_skipped"], rig.stats["rows_skipped"]) == (1, 20)


def test_a_block_visited_twice_is_counted_once() -> None:
    """Where the tail wraps to the epoch's first rows, the shards that are lost there are not lost anew."""
    rig = rig_of([4, 4, 4, 4], {0: BAD}, shuffle=False, shuffle_block=1, batch_size=7)
    rig.policy = LossPolicy(skip=True, max_rows=4)
    got = flat(delivered(rig))
    assert len(got) == 21
    assert got[16:] == got[:5]
    assert len(rig.skipped) == 1
    assert rig.stats["rows_skipped"] == 4


def test_a_wholly_lost_block_takes_rows_of_the_next_in_its_lane() -> None:
    """All shards of a block gone: its places hold rows of the next block that has any, cyclically, and no others."""
    rows = [4] * 6
    for lost, donors in [({1}, {2}), ({1, 2, 3}, {4}), ({5}, {0}), ({4, 5, 0}, {1})]:
        rig = rig_of(rows, dict.fromkeys(lost, BAD), shuffle=False, shuffle_block=1, batch_size=4)
        got = delivered(rig)
        for shard, batch in enumerate(got):
            if shard in lost:
                # The donor of a block at the end of a chain is the first good one after it.
                assert set(batch) <= ids_in(rows, donors)
            else:
                assert batch == sorted(ids_in(rows, {shard}))
        assert sorted(event.shard for event in rig.skipped) == sorted(lost), (
            "a donor's own losses are its own to report"
        )


def test_a_donor_that_is_damaged_itself() -> None:
    """A block refilled from one with lost shards takes its surviving rows only."""
    rows = [2, 1, 4, 4, 20]
    rig = rig_of(rows, {1: BAD, 2: BAD}, shuffle=False, shuffle_block=8, batch_size=1, tail="uneven")
    got = flat(delivered(rig))
    assert len(got) == sum(rows)
    assert set(got) <= ids_in(rows, {0, 3, 4})


def test_a_lost_lane_takes_rows_of_the_lanes_after_it() -> None:
    """With no shard of a lane left, its places hold rows of the next lane that has any, cyclically."""
    shape: dict[str, Any] = {"lanes": 3, "chunk": 4, "shuffle": False, "shuffle_block": 1, "batch_size": 4}
    for lost, donors in [({2, 3}, {4}), ({4, 5}, {0}), ({0, 1, 2, 3}, {4}), ({2, 3, 4}, {5})]:
        rig = rig_of([4] * 6, dict.fromkeys(lost, BAD), **shape)
        for got, planned in zip(delivered(rig), rig.expected_ids(), strict=True):
            if planned[0] // 4 not in lost:
                assert got == planned
            elif 2 <= planned[0] // 4 < 4:
                assert set(got) <= ids_in([4] * 6, donors)
            else:
                assert not set(got) & ids_in([4] * 6, lost)


@pytest.mark.parametrize("fault", [BAD, MISSING], ids=str)
def test_an_epoch_without_any_good_shard_is_too_much(fault: Fault) -> None:
    """When nothing is left to refill from it is TooManyCorrupt, whatever the policy allows; never an empty epoch."""
    stream = rig_of([4] * 4, dict.fromkeys(range(4), fault), lanes=2, shuffle_block=1).stream()
    for _ in range(2):
        with pytest.raises(TooManyCorrupt, match=r"fake://store/00\d.pt.zst: this shard and all others"):
            watched(stream.next)


def test_max_rows_is_exact() -> None:
    """As many rows as the policy allows may be lost, and not one more; the error names the shard and what to do."""
    rig = rig_of(ROWS, LOST, policy=LossPolicy(skip=True, max_rows=18))
    assert len(delivered(rig)) == 9
    rig = rig_of(ROWS, LOST, policy=LossPolicy(skip=True, max_rows=17))
    with pytest.raises(TooManyCorrupt, match=r"00\d.pt.zst: 18 rows lost .* allows 17 of 36; .*streamshards verify"):
        drain(rig.stream())


@pytest.mark.parametrize(("fault", "kind"), [(BAD, ShardCorrupt), (MISSING, ShardMissing)], ids=str)
def test_raise_raises_in_its_place(fault: Fault, kind: type[Exception]) -> None:
    """Without skipping, the batches before the bad shard come, then its error with its url; nothing is skipped."""
    rig = rig_of([4] * 4, {2: fault}, shuffle=False, shuffle_block=1, policy=LossPolicy(skip=False, max_rows=1000))
    stream = rig.stream()
    assert [ids_of(watched(stream.next)) for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(kind, match=r"fake://store/002\.pt\.zst"):
        watched(stream.next)
    assert rig.skipped == []


def test_an_outage_never_counts_as_loss() -> None:
    """With skipping on, a store that stays down is StoreUnavailable, not a refilled shard."""
    rig = rig_of([4] * 4, {2: UNAVAILABLE}, shuffle=False, shuffle_block=1)
    with pytest.raises(StoreUnavailable):
        drain(rig.stream())
    assert rig.skipped == []


def test_a_shard_that_opens_but_does_not_decode_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage that only decoding finds leads to the same batches and one event, as if the shard had not opened."""
    reference = delivered(rig_of(ROWS, {1: BAD}, **SHAPE))
    rig = rig_of(ROWS, **SHAPE)

    class Spoiled(BlockBuffers):
        def fill(self, number: int) -> None:
            super().fill(number)
            if self.pieces[number].piece.shard == 1:
                raise ShardCorrupt("it does not decode")

    monkeypatch.setattr(loading, "BlockBuffers", Spoiled)
    assert delivered(rig) == reference
    assert [event.shard for event in rig.skipped] == [1]
    assert rig.skipped[0].cause == "it does not decode"


def test_decoding_is_counted() -> None:
    """bytes_decoded is the raw size of the rows that were decoded; decode time runs on the engine's clock."""
    rig = rig_of([4, 20, 4], lanes=4, chunk=1, batch_size=4)
    delivered(rig)
    assert rig.stats["bytes_decoded"] == pytest.approx(int(rig.index.raw_sizes.sum()), abs=8)
    assert rig.stats["samples"] == 28


# -- whole epochs ------------------------------------------------------------------------------------------------------

SHAPES = st.fixed_dictionaries(
    {
        "rows": st.sampled_from(
            [(3,), (5, 1, 7, 2), (1, 1, 1, 1, 1, 1), (4, 0, 9, 0, 3), (8, 8, 8, 8, 8, 8), (31, 2, 2)]
        ),
        "lanes": st.integers(1, 6),
        "chunk": st.integers(1, 5),
        "shuffle_block": st.sampled_from([1, 4, 9, 1000]),
        "shuffle": st.booleans(),
        "batch_size": st.integers(1, 7),
        "world_size": st.integers(1, 3),
        "num_workers": st.integers(1, 3),
        "threads": st.integers(1, 4),
        "cores": st.integers(1, 3),
        "tail": st.sampled_from(["pad", "drop", "uneven"]),
        "ready_batches": st.integers(1, 3),
        "share": st.sampled_from([0.0, 0.3, 0.9, 1.0, 100.0]),
        "who": st.integers(0, 8),
        "from": st.sampled_from([0.0, 0.4, 1.0]),
        "planned_at_once": st.sampled_from([1, 9, 1 << 14]),
    }
)


def rig_of_shape(shape: dict[str, Any]) -> Rig | None:
    """Return the rig of a drawn shape, its budget that share of what its blocks need; None if it has too many lanes."""
    names = ("chunk", "shuffle_block", "shuffle", "batch_size", "threads", "cores", "tail", "ready_batches")
    rows, who = shape["rows"], shape["who"]
    if shape["lanes"] > sum(rows):
        return None
    topology = Topology(rank=who % shape["world_size"], world_size=shape["world_size"])
    topology = topology.with_worker(who // 3 % shape["num_workers"], shape["num_workers"])
    options = {name: shape[name] for name in names}
    rig = rig_of(rows, lanes=shape["lanes"], topology=topology, start=int(shape["from"] * sum(rows)), **options)
    rig.budget_bytes = max(1, int(shape["share"] * needed_bytes(rig)))
    return rig


def needed_bytes(rig: Rig) -> int:
    """Return what one block of each lane that the reader ever takes a row from needs."""
    order, assignment = rig.order(), rig.assignment()
    lanes, _ = order.locate(assignment.positions(0, assignment.num_batches)[0])
    sizes = loaded_sizes(rig.index, rig.schema or rig.dataset_schema) + rig.index.sizes
    return sum(order.max_block_bytes(lane, sizes) for lane in set(lanes.tolist()))


@given(shape=SHAPES)
@settings(max_examples=500, deadline=None)
def test_any_epoch_is_delivered_within_its_budget(shape: dict[str, Any]) -> None:
    """Any lanes, chunks, blocks, batches, readers, threads and budget: the plan's own rows, no hang, nothing kept.

    Where one block of each of its lanes fits, the budget holds; below that the epoch goes through all the same.
    """
    rig = rig_of_shape(shape)
    if rig is None:
        return
    loader = rig.loader()
    # Long epochs are planned piece by piece: a block may be needed again beyond what has been planned.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "_PLANNED_POSITIONS", shape["planned_at_once"])
        batches = drain(rig.stream(loader))
    assert [ids_of(batch) for batch in batches] == rig.expected_ids()
    if shape["share"] >= 1.0:
        assert loader.peak_bytes <= rig.budget_bytes
    assert loader.peak_bytes <= needed_bytes(rig) or shape["share"] > 1.0
    assert loader._used_bytes == 0
    assert loader._loads == {}
    assert rig.events == []
