"""Batches ahead of the training loop: in order, exactly once, and nothing left behind however the loop is left."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from streamshards import OrderOptions, ShardWriter, StreamingDataset
from streamshards.engine import loading
from streamshards.engine.blocks import BlockBuffers
from streamshards.engine.prefetch import BatchStream
from streamshards.errors import AccessDenied, StreamShardsError
from streamshards.events import ReadSlow
from streamshards.plan.index import Index
from streamshards.shard.columns import Columns
from streamshards.testing import DENIED, UNAVAILABLE, Block, FakeClock, FaultyStore, MemoryStore
from tests.engine.rig import HANGS_AFTER_S, Rig, drain, engine_threads, ids_of, join_all, numbered, until, watched

ROWS = (4,) * 6


@cache
def dataset() -> tuple[MemoryStore, Index]:
    return numbered(ROWS)


def rig_of(script: Any = (), *, columns: list[str] | None = None, **changes: Any) -> Rig:
    """Return a rig over six shards of one block and one batch each; of some columns only, if given."""
    store, index = dataset()
    rig = Rig(FaultyStore(store, script), index, **{"shuffle_block": 1, **changes})
    if columns is not None:
        rig.schema = rig.dataset_schema.select(columns)
    return rig


def threads_of(stream: BatchStream[Any]) -> list[threading.Thread]:
    return [stream._thread, *stream._loader.threads]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    watched(lambda: join_all(engine_threads()))


class Gate:
    """Something that a thread enters and then waits in."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, value: Any = None) -> Any:
        self.entered.set()
        assert self.opened.wait(HANGS_AFTER_S)
        return value


# -- in order, once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready_batches", [1, 2, 100])
@pytest.mark.parametrize("skip", [0, 1, 5, 6])
def test_batches_come_in_order_once_and_then_it_is_over_for_ever(ready_batches: int, skip: int) -> None:
    """Every batch of the plan, then StopIteration at each further next, and the threads have ended by themselves."""
    rig = rig_of(ready_batches=ready_batches, skip=skip)
    stream = rig.stream()
    expected = rig.expected_ids()
    assert [ids_of(watched(stream.next)) for _ in expected] == expected
    for _ in range(3):
        with pytest.raises(StopIteration):
            watched_stop(stream)
    join_all(threads_of(stream))
    assert rig.stats["batches"] == len(expected)
    assert rig.stats["samples"] == 4 * len(expected)


def watched_stop(stream: BatchStream[Any]) -> None:
    """Call ``next``; it must come back at once."""
    watched(lambda: stream.next())


def test_no_more_batches_are_made_than_asked_for() -> None:
    """With three kept ready, a fourth is assembled and held back; taking one lets in one."""
    made: list[int] = []

    def convert(columns: Columns) -> Columns:
        made.append(columns.num_rows)
        return columns

    stream = rig_of(ready_batches=3, convert=convert).stream()
    until(lambda: is_waiting_for_room(stream))
    assert (len(stream._ready), len(made)) == (3, 4)
    watched(stream.next)
    until(lambda: len(made) == 5 and is_waiting_for_room(stream))
    assert len(stream._ready) == 3
    drain(stream)
    assert len(made) == 6


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.9, 1), (2.0, 2), (2.9, 2), (100.0, 5)])
def test_ready_batches_are_bounded_in_bytes(share: float, expected: int) -> None:
    """As many are kept ready as fit ready_bytes, and one that is larger still; taking one makes its room free again."""
    row_bytes = drain(rig_of(columns=["id"]).stream())[0].nbytes
    rig = rig_of(columns=["id"], ready_batches=5, ready_bytes=int(share * row_bytes))
    stream = rig.stream()
    for _ in range(2):
        until(lambda: is_waiting_for_room(stream) or not stream._thread.is_alive())
        assert len(stream._ready) == min(expected, 5)
        watched(stream.next)
    assert [ids_of(batch) for batch in drain(stream)] == rig.expected_ids()[2:]


def is_waiting_for_room(stream: BatchStream[Any]) -> bool:
    """Whether the assembling thread waits until a batch is taken (no consumer may be waiting)."""
    with stream._changed:
        return len(stream._changed._waiters) == 1  # type: ignore[attr-defined]  # of the standard library


def test_several_consumers_share_the_batches() -> None:
    """Each batch goes to exactly one of four threads that take from one stream."""
    rig = rig_of(batch_size=1)
    stream = rig.stream()
    taken: list[list[int]] = [[] for _ in range(4)]

    def take(mine: list[int]) -> None:
        try:
            while True:
                mine += ids_of(stream.next())
        except StopIteration:
            return

    consumers = [threading.Thread(target=take, args=(mine,), daemon=True) for mine in taken]
    for consumer in consumers:
        consumer.start()
    watched(lambda: join_all(consumers))
    order = [batch[0] for batch in rig.expected_ids()]
    assert sorted(number for mine in taken for number in mine) == sorted(order)
    assert all(mine == sorted(mine, key=order.index) for mine in taken)


def test_waits_and_gathering_are_counted_on_the_engines_clock() -> None:
    """wait_s is what the training loop lost; an epoch in which no time passes cost nothing."""
    clock = FakeClock()
    rig = rig_of(clock=clock, ready_batches=1)
    drain(rig.stream())
    assert rig.stats["wait_s"] == rig.stats["gather_s"] == 0
    gate = Gate()
    rig = rig_of(lambda *_: Block(gate.opened, gate.entered), clock=clock)
    stream = rig.stream()
    consumer = threading.Thread(target=stream.next, daemon=True)
    consumer.start()
    until(lambda: gate.entered.is_set() and is_waiting_for_room(stream))
    clock.advance(5)
    gate.opened.set()
    join_all([consumer])
    assert rig.stats["wait_s"] == 5
    drain(stream)


# -- errors ------------------------------------------------------------------------------------------------------------


def failing(kind: str) -> tuple[Rig, type[BaseException]]:
    """Return a rig whose third batch cannot be had, and the error that comes instead."""
    if kind == "store":
        return rig_of(lambda key, _: DENIED if key == "002.pt.zst" else None, shuffle=False), AccessDenied

    def convert(columns: Columns) -> Columns:
        if 8 in ids_of(columns):
            raise SystemExit("from a thread")
        return columns

    return rig_of(shuffle=False, convert=convert), SystemExit


@pytest.mark.parametrize("ready_batches", [1, 6])
@pytest.mark.parametrize("kind", ["store", "convert"])
def test_an_error_comes_after_the_good_batches_and_stays(kind: str, ready_batches: int) -> None:
    """However far ahead it happened: the batches before it first, then it, again and again, and never StopIteration."""
    rig, error = failing(kind)
    rig.ready_batches = ready_batches
    stream = rig.stream()
    assert [ids_of(watched(stream.next)) for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for _ in range(3):
        with pytest.raises(error) as caught:
            watched(stream.next)
        assert "_assemble_all" in [entry.name for entry in caught.traceback], "it says where it happened"
    join_all(threads_of(stream))
    stream.close()
    with pytest.raises(error):
        watched(stream.next)


def test_an_error_in_the_plan_arrives_too() -> None:
    """What the schedule raises is not lost with its thread."""
    rig = rig_of()

    def broken() -> Iterator[Any]:
        raise ZeroDivisionError("in the plan")
        yield

    stream = BatchStream(
        broken(),
        rig.loader(),
        rig.dataset_schema,
        num_samples=8,
        convert=lambda columns: columns,
        ready_batches=1,
        ready_bytes=1 << 40,
        slow_s=1000,
        url="fake://store",
        clock=rig.clock,
        counters=rig.counters,
        emit=rig.emit,
    )
    with pytest.raises(ZeroDivisionError, match="in the plan"):
        drain(stream)


def test_threads_that_cannot_start_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the assembling thread cannot be started, those that load end again."""
    rig = rig_of()
    loader = rig.loader()

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            rig.stream(loader)
    watched(lambda: join_all(loader.threads))


# -- stopping ----------------------------------------------------------------------------------------------------------

STAGES = ("fetch", "decode", "gather", "hand-over", "idle")


def stopped_in(stage: str, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> BatchStream[Any]:
    """Return a running stream that is held up in that stage, by *gate* where something has to hold it."""
    rig = rig_of(ready_batches=1)
    if stage == "fetch":
        rig = rig_of(lambda *_: Block(gate.opened, gate.entered))
    elif stage == "decode":

        class Slow(BlockBuffers):
            def fill(self, number: int) -> None:
                gate()
                super().fill(number)

        monkeypatch.setattr(loading, "BlockBuffers", Slow)
    elif stage == "gather":
        rig.convert = gate
    elif stage == "idle":
        rig.ready_batches = 100
    stream = rig.stream()
    if stage in ("fetch", "decode", "gather"):
        assert gate.entered.wait(HANGS_AFTER_S)
    elif stage == "hand-over":
        until(lambda: is_waiting_for_room(stream))
    else:
        join_all(threads_of(stream))
    return stream


@pytest.mark.parametrize("closer", ["consumer", "another thread", "four threads", "twice"])
@pytest.mark.parametrize("stage", STAGES)
def test_close_ends_everything(stage: str, closer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the threads are in and whoever closes: it returns, no further work begins, and all threads end."""
    gate = Gate()
    stream = stopped_in(stage, gate, monkeypatch)
    if closer == "consumer":
        watched(stream.close)
    elif closer == "twice":
        watched(lambda: (stream.close(), stream.close()))
    else:
        closers = [threading.Thread(target=stream.close, daemon=True) for _ in range(1 if closer[0] == "a" else 4)]
        for thread in closers:
            thread.start()
        watched(lambda: join_all(closers))
    with pytest.raises(StopIteration):
        watched_stop(stream)
    if stage != "gather":
        join_all([stream._thread])  # it does not wait for what the others are in
    store: Any = stream._loader._sources[0].fetcher._store
    num_gets = len(store.gets)
    gate.opened.set()
    watched(lambda: join_all(threads_of(stream)))
    assert len(store.gets) == num_gets
    assert not stream._ready
    assert stream._loader._fetches == stream._loader._fills == [], "what nobody will do is not kept"
    with pytest.raises(StopIteration):
        watched_stop(stream)


def test_close_wakes_a_consumer_that_waits() -> None:
    """A training loop that waits for a store without an answer ends when another thread closes."""
    gate = Gate()
    stream = rig_of(lambda *_: Block(gate.opened, gate.entered)).stream()
    outcome: list[str] = []

    def consume() -> None:
        try:
            stream.next()
        except StopIteration:
            outcome.append("over")

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    until(lambda: is_waiting_for_room(stream))
    stream.close()
    join_all([consumer])
    assert outcome == ["over"]
    gate.opened.set()


def test_a_closed_stream_is_freed_without_the_garbage_collector() -> None:
    """Nothing in the engine refers to itself: the memory goes when the last reference does."""
    gc.collect()
    gc.disable()
    try:
        rig = rig_of()
        stream = rig.stream()
        batch = weakref.ref(watched(stream.next))
        stream.close()
        join_all(threads_of(stream))
        ref = weakref.ref(stream), weakref.ref(stream._loader)
        del stream
        assert [r() for r in ref] == [None, None]
        assert batch() is None
    finally:
        gc.enable()


# -- slow reads --------------------------------------------------------------------------------------------------------


def test_a_slow_read_is_told() -> None:
    """Each time next has waited slow_s: the url, the seconds so far, and which shard it is that does not come."""
    answer = threading.Event()
    told: list[ReadSlow] = []
    clock = FakeClock()

    def observe(event: Any) -> None:
        told.append(event)
        clock.advance(30)
        if len(told) == 3:
            answer.set()

    rig = rig_of(lambda *_: Block(answer), slow_s=1e-9, clock=clock, on_event=observe, threads=1)
    stream = rig.stream()
    until(lambda: stream._waiting_for is not None)
    watched(stream.next)
    first = rig.index.names[next(rig.order().blocks(0)).pieces[0].shard]
    assert [event.url for event in told[:3]] == ["fake://store"] * 3
    assert [event.waited_s for event in told[:3]] == [0, 30, 60]
    assert [event.waiting_for.split()[0] for event in told[:3]] == [first] * 3
    assert rig.stats["slow_reads"] == len(told)
    drain(stream)


def test_a_slow_read_tells_attempt_and_cause() -> None:
    """After a failed attempt: the number of the one under way, for how long, and why the last one failed."""
    answer, entered = threading.Event(), threading.Event()
    told: list[ReadSlow] = []

    def observe(event: Any) -> None:
        if isinstance(event, ReadSlow) and event.attempt == 3:
            told.append(event)
            answer.set()

    def script(_key: str, number: int) -> Any:
        return Block(answer, entered) if number == 2 else UNAVAILABLE if number < 2 else None

    stream = rig_of(script, slow_s=1e-3, on_event=observe, threads=1).stream()
    watched(stream.next)
    assert (told[0].doing, told[0].cause) == ("asked 0 s ago", "get failed: scripted")
    assert re.fullmatch(
        r"fake://store: waited 0 s for 0\d\d.pt.zst \(.*\), attempt 3, asked 0 s ago; failed before: .*scripted",
        str(told[0]),
    )
    drain(stream)


def test_what_a_slow_read_waits_for_is_told_at_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is being put together is told as such."""
    gate = Gate()
    stream = stopped_in("gather", gate, monkeypatch)
    told: list[ReadSlow] = []
    stream._slow_s = 1e-9
    stream._emit = lambda event: (told.append(event), gate.opened.set())
    watched(stream.next)
    assert told[0].waiting_for == "the batch to be assembled"
    drain(stream)


def test_an_observer_may_do_what_it_likes() -> None:
    """It is called without a lock: it may wait for another thread that closes the very stream it is told about."""
    answer = threading.Event()
    closed: list[bool] = []

    def observe(event: Any) -> None:
        closer = threading.Thread(target=stream.close, daemon=True)
        closer.start()
        closer.join(HANGS_AFTER_S)
        closed.append(not closer.is_alive())
        answer.set()

    stream = rig_of(lambda *_: Block(answer), slow_s=1e-9, on_event=observe).stream()
    with pytest.raises(StopIteration):
        watched_stop(stream)
    assert closed == [True]


# -- through the dataset -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("prefetch") / "train")
    with ShardWriter(folder, shard_bytes=400) as out:
        for number in range(200):
            out.write({"id": number})
    return folder


def blocked(url: str, gate: Gate) -> StreamingDataset:
    """Return a dataset whose second shard does not come before the gate is opened."""
    dataset = StreamingDataset(url, batch_size=4, order=OrderOptions(shuffle_block=1))
    second = dataset.index.names[1]
    store = FaultyStore(dataset._store, lambda key, _: Block(gate.opened, gate.entered) if key == second else None)
    dataset._store = store
    return dataset


def leave_by_del(dataset: StreamingDataset) -> None:
    iterator = iter(dataset)
    next(iterator)
    del iterator


def leave_by_break(dataset: StreamingDataset) -> None:
    for _ in dataset:
        break


def leave_by_exception(dataset: StreamingDataset) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in dataset:
            raise ZeroDivisionError


def leave_by_cycle(dataset: StreamingDataset) -> None:
    cycle: list[Any] = [iter(dataset)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()


def leave_unused(dataset: StreamingDataset) -> None:
    iter(dataset)


@pytest.mark.parametrize(
    "leave", [leave_by_del, leave_by_break, leave_by_exception, leave_by_cycle, leave_unused], ids=lambda f: f.__name__
)
def test_leaving_the_loop_ends_its_threads(url: str, leave: Callable[[StreamingDataset], None]) -> None:
    """However the iterator is dropped, with an unanswered request in flight: once that returns, no thread is left."""
    gate = Gate()
    dataset = blocked(url, gate)
    watched(lambda: leave(dataset))
    threads = engine_threads()
    gate.opened.set()
    watched(lambda: join_all(threads))
    watched(lambda: join_all(engine_threads()))


def num_descriptors() -> int:
    gc.collect()  # those that other tests have left to it
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_two_hundred_abandoned_iterators(url: str) -> None:
    """200 iterators begun and dropped, some of them with their neighbours still alive, leave no thread and no file."""
    dataset = StreamingDataset(url, batch_size=4)
    next(iter(dataset))
    until(lambda: not engine_threads())
    gc.collect()
    before = num_descriptors()
    kept: list[Any] = []
    for number in range(200):
        iterator = iter(dataset)
        if number % 3:
            next(iterator)
        kept.append(iterator)
        if len(kept) == 5:
            kept.clear()
    kept.clear()
    del iterator
    until(lambda: not engine_threads())
    gc.collect()
    assert num_descriptors() <= before  # what other tests left may go meanwhile


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_an_iterator_used_after_a_fork_says_so(url: str) -> None:
    """In a forked child next raises at once and says what to do, close does nothing, and the parent goes on."""
    dataset = StreamingDataset(url, batch_size=4)
    iterator = iter(dataset)
    first = next(iterator)["id"].tolist()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "it returned"
        try:
            next(iterator)
        except StreamShardsError as error:
            text = str(error)
        except BaseException as error:  # noqa: BLE001 - told to the parent
            text = repr(error)
        iterator._stream.close()
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    try:
        with open(read, "rb") as pipe:
            text = watched(pipe.read).decode()
    finally:
        os.kill(child, signal.SIGKILL)  # it has ended, or hangs
        os.waitpid(child, 0)
    assert f"made in process {os.getpid()}" in text
    assert "call iter()" in text
    assert first + [number for batch in iterator for number in batch["id"].tolist()] == list(range(200))
