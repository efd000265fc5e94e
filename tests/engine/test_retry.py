"""Retries: what is tried again, how long is waited, and when it ends; on a fake clock."""

from __future__ import annotations

import heapq
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.clock import SystemClock
from streamshards.engine.retry import Cancelled, Circuit, backoff_limit_s, circuit_of, with_retries
from streamshards.errors import AccessDenied, ObjectMissing, ShardCorrupt, StoreUnavailable
from streamshards.events import FetchRetried
from streamshards.options import RetryOptions
from streamshards.storage import open_store
from streamshards.storage.store import site_of
from streamshards.testing import DENIED, MISSING, UNAVAILABLE, FakeClock, FaultyStore, MemoryStore
from tests.engine.rig import HANGS_AFTER_S, join_all, watched

OPTIONS = RetryOptions(deadline_s=100, attempt_timeout_s=30, base_s=1, max_wait_s=8)


class Attempts:
    """An action that fails *failures* times, each attempt taking *seconds*, and records its timeouts."""

    def __init__(self, clock: FakeClock, failures: float, *, seconds: float = 0.0) -> None:
        self.timeouts: list[float] = []
        self._clock = clock
        self._failures = failures
        self._seconds = seconds

    def __call__(self, timeout_s: float) -> str:
        self.timeouts.append(timeout_s)
        self._clock.advance(min(self._seconds, timeout_s))
        if len(self.timeouts) <= self._failures:
            raise StoreUnavailable(f"failure {len(self.timeouts)}")
        return "done"


def _retry(action: Callable[[float], Any], clock: FakeClock, **changes: Any) -> tuple[Any, list[FetchRetried]]:
    events: list[FetchRetried] = []
    arguments: dict[str, Any] = {
        "what": "s3://b/a", "options": OPTIONS, "deadline_s": OPTIONS.deadline_s, "clock": clock,
        "cancelled": threading.Event(), "on_retry": events.append,
    }  # fmt: skip
    return with_retries(action, **(arguments | changes)), events


def test_success_at_once() -> None:
    """What works is tried once, with the whole attempt timeout, and nothing is told."""
    clock = FakeClock()
    action = Attempts(clock, 0)
    assert _retry(action, clock) == ("done", [])
    assert action.timeouts == [30]
    assert clock.waits == []


def test_backoff_doubles_up_to_its_cap() -> None:
    """Waits are drawn from ranges of 1, 2, 4, 8, 8, … s; each failure is one event, told before its wait."""
    clock = FakeClock()
    _, events = _retry(Attempts(clock, 6), clock)
    assert clock.waits == [1, 2, 4, 8, 8, 8]
    assert events[2] == FetchRetried("s3://b/a", attempt=3, wait_s=4, cause="failure 3")
    assert [event.wait_s for event in events] == clock.waits


def test_jitter_is_full() -> None:
    """The whole range is drawn from, down to no wait at all."""
    clock = FakeClock(chance=0.25)
    _retry(Attempts(clock, 3), clock)
    assert clock.waits == [0.25, 0.5, 1.0]


def test_gives_up_before_the_deadline() -> None:
    """No attempt begins after the deadline, no wait ends after it, and the error says all there is to know."""
    clock = FakeClock()
    action = Attempts(clock, float("inf"))
    with pytest.raises(StoreUnavailable, match=r"s3://b/a: gave up after 7 attempts in 31\.0 s .*failure 7") as caught:
        _retry(action, clock, deadline_s=32.0)
    assert isinstance(caught.value.__cause__, StoreUnavailable)
    assert "RetryOptions" in str(caught.value)
    assert clock.now() == 31.0


def test_last_attempt_gets_what_is_left() -> None:
    """An attempt's timeout never reaches beyond the deadline."""
    clock = FakeClock()
    action = Attempts(clock, float("inf"), seconds=1000)
    with pytest.raises(StoreUnavailable, match="gave up after 2 attempts in 40"):
        _retry(action, clock, deadline_s=40.0)
    assert action.timeouts == [30, 9]


def test_the_error_tells_the_last_two_causes() -> None:
    """The deadline cuts the last attempt short: that it timed out says less than what the one before died of."""
    clock = FakeClock()
    with pytest.raises(StoreUnavailable, match=r"last: failure 7; before: failure 6; check the store"):
        _retry(Attempts(clock, float("inf")), clock, deadline_s=32.0)


@settings(deadline=None)  # the machine may be busy; the clock under test is not real
@given(deadline_s=st.floats(0.1, 1e4), seconds=st.floats(0, 200), chance=st.floats(0, 1))
def test_deadline_holds(deadline_s: float, seconds: float, chance: float) -> None:
    """Whatever the attempts take and the jitter draws, the deadline is kept (here: in at most 1,000 attempts)."""
    clock = FakeClock(chance=chance)
    action = Attempts(clock, 1000, seconds=seconds)
    try:
        _retry(action, clock, deadline_s=deadline_s)
    except StoreUnavailable:
        assert len(action.timeouts) <= 1000
    assert clock.now() <= deadline_s * (1 + 1e-9)
    assert all(0 < timeout <= OPTIONS.attempt_timeout_s for timeout in action.timeouts)


@settings(deadline=None)
@given(attempt=st.integers(1, 10**9))
def test_backoff_is_bounded(attempt: int) -> None:
    """The range never overflows, shrinks or passes its cap."""
    assert OPTIONS.base_s <= backoff_limit_s(attempt, OPTIONS) <= OPTIONS.max_wait_s


@pytest.mark.parametrize("error", [AccessDenied("x"), ObjectMissing("x"), ShardCorrupt("x"), ValueError("x")])
def test_what_is_not_transient_is_not_retried(error: Exception) -> None:
    """Everything but a transient error comes out at once, unchanged."""
    clock = FakeClock()

    def action(_timeout_s: float) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        _retry(action, clock)
    assert caught.value is error
    assert clock.waits == []


def test_cancelled_before() -> None:
    """A cancelled reader does not even try."""
    clock, cancelled = FakeClock(), threading.Event()
    cancelled.set()
    action = Attempts(clock, 0)
    with pytest.raises(Cancelled):
        _retry(action, clock, cancelled=cancelled)
    assert action.timeouts == []


def test_cancelled_while_waiting() -> None:
    """Cancelling ends the wait, and no further attempt is made."""
    cancelled = threading.Event()
    clock = FakeClock(on_wait=lambda _seconds: cancelled.set())
    action = Attempts(clock, float("inf"))
    with pytest.raises(Cancelled):
        _retry(action, clock, cancelled=cancelled)
    assert len(action.timeouts) == 1
    assert clock.now() == 0


def test_cancelling_wakes_a_real_wait() -> None:
    """With real time, too: a wait of up to an hour ends as soon as it is cancelled."""
    cancelled = threading.Event()

    def action(_timeout_s: float) -> None:
        raise StoreUnavailable("x")

    class HourClock(SystemClock):
        def jitter(self, limit_s: float) -> float:
            return limit_s

    hour = RetryOptions(deadline_s=7200, base_s=3600, max_wait_s=3600)
    with pytest.raises(Cancelled):
        with_retries(
            action, what="x", options=hour, deadline_s=7200, clock=HourClock(), cancelled=cancelled,
            on_retry=lambda _event: threading.Timer(0, cancelled.set).start(),
        )  # fmt: skip


def test_with_a_faulty_store() -> None:
    """Two outages, then the object; a missing or denied one is not asked for again."""
    clock = FakeClock()
    store = FaultyStore(MemoryStore({"a": b"1"}), [UNAVAILABLE, UNAVAILABLE, None, MISSING, DENIED])

    def fetch(timeout_s: float) -> bytes:
        return store.get("a", timeout_s=timeout_s, max_bytes=1)

    assert _retry(fetch, clock)[0] == b"1"
    for kind in (ObjectMissing, AccessDenied):
        with pytest.raises(kind):
            _retry(fetch, clock)
    assert len(store.gets) == 5


# -- together ----------------------------------------------------------------------------------------------------------


def test_a_circuit_opens_after_16_failures_in_a_row() -> None:
    """Until then everyone may ask; then one at a time, once the last wait is over; any answer lets all ask again."""
    clock = FakeClock()
    circuit = Circuit(clock)
    for _ in range(15):
        assert circuit.claim(8) == 0
        circuit.failed(3, OPTIONS)
    assert [circuit.claim(8), circuit.claim(8)] == [0, 0]
    circuit.failed(3, OPTIONS)
    assert circuit.claim(8) == 3
    clock.advance(3)
    assert [circuit.claim(8), circuit.claim(8)] == [0, 8], "one probes, the other waits"
    circuit.failed(5, OPTIONS)
    assert circuit.claim(8) == 5
    clock.advance(5)
    assert circuit.claim(8) == 0
    circuit.left()
    assert circuit.claim(8) == 0, "who left without an answer holds nobody up"
    circuit.answered()
    assert [circuit.claim(8), circuit.claim(8)] == [0, 0]


def test_an_answer_between_failures_keeps_a_circuit_closed() -> None:
    """Only failures in a row count: a store that answers half of the requests is asked by all."""
    circuit = Circuit(FakeClock())
    for _ in range(100):
        circuit.failed(1, OPTIONS)
        circuit.failed(1, OPTIONS)
        circuit.answered()
    assert circuit.claim(8) == 0


def test_who_never_gets_a_turn_gives_up_at_the_deadline() -> None:
    """Behind an open circuit the deadline holds, the store is not asked, and the error says why."""
    clock = FakeClock()
    circuit = Circuit(clock)
    for _ in range(16):
        circuit.failed(0, OPTIONS)
    assert circuit.claim(8) == 0, "another thread asks, and never comes back"
    action = Attempts(clock, 0)
    with pytest.raises(StoreUnavailable, match=r"s3://b/a: gave up .*does not answer other requests either"):
        _retry(action, clock, circuit=circuit)
    assert action.timeouts == []
    assert clock.now() == OPTIONS.deadline_s


def test_a_turn_that_comes_with_the_deadline_is_not_taken() -> None:
    """An attempt always has time: when a wait ends at the deadline no request follows, and no turn is held."""
    clock = FakeClock()
    circuit = Circuit(clock)
    for _ in range(16):
        circuit.failed(OPTIONS.deadline_s, OPTIONS)
    action = Attempts(clock, 0)
    with pytest.raises(StoreUnavailable, match="does not answer other requests either"):
        _retry(action, clock, circuit=circuit)
    assert action.timeouts == []
    clock.advance(OPTIONS.max_wait_s)
    assert circuit.claim(8) == 0


def test_cancelling_ends_the_wait_for_a_turn() -> None:
    """Behind an open circuit, too, no request follows."""
    cancelled = threading.Event()
    clock = FakeClock(on_wait=lambda _: cancelled.set())
    circuit = Circuit(clock)
    for _ in range(16):
        circuit.failed(50, OPTIONS)
    action = Attempts(clock, 0)
    with pytest.raises(Cancelled):
        _retry(action, clock, circuit=circuit, cancelled=cancelled)
    assert action.timeouts == []


def test_retry_after_is_kept_up_to_the_longest_wait() -> None:
    """The store's own word is the least that is waited, but never more than ``max_wait_s``."""

    def busy(asked_s: float) -> Callable[[float], str]:
        def action(_: float) -> str:
            if clock.waits:
                return "done"
            error = StoreUnavailable("busy")
            error.retry_after_s = asked_s
            raise error

        return action

    for asked_s, waited_s in ((0, 1), (3, 3), (1e9, 8)):
        clock = FakeClock()
        assert _retry(busy(asked_s), clock)[0] == "done"
        assert clock.waits == [waited_s]


def test_an_attempt_knows_how_patient_to_be() -> None:
    """``stall_s`` and ``min_bytes_per_s`` travel with the timeout, to whatever store is asked."""
    clock = FakeClock()
    action = Attempts(clock, 0)
    _retry(action, clock)
    (patience,) = action.timeouts
    assert (patience.stall_s, patience.min_bytes_per_s) == (OPTIONS.stall_s, OPTIONS.min_bytes_per_s)  # type: ignore[attr-defined]


def test_waits_between_probes_double_whoever_probes() -> None:
    """64 shards that each fail for the first time do not begin 64 backoffs: the circuit has one of its own."""
    clock = FakeClock()
    circuit = opened(clock)
    pauses = []
    for _ in range(6):
        assert circuit.claim(8) == 0
        circuit.failed(0.5, OPTIONS)
        pauses.append(circuit.claim(8))
        clock.advance(pauses[-1])
    assert pauses == [1, 2, 4, 8, 8, 8]


def test_a_late_failure_is_not_the_probes() -> None:
    """Requests that were under way when the circuit opened neither end the probe nor call the next one forward."""
    clock = FakeClock()
    circuit = opened(clock)
    assert circuit.claim(8) == 0
    for end in (lambda: circuit.failed(0, OPTIONS), circuit.left):
        in_thread(end)
        assert circuit.claim(8) == 8, "the probe is still under way"
    circuit.failed(5, OPTIONS)
    in_thread(lambda: circuit.failed(0, OPTIONS))
    assert circuit.claim(8) == 5


class CommonClock:
    """Time that passes once all of some threads wait: then the first of them wakes. Every jitter is its limit."""

    def __init__(self, threads: int) -> None:
        self._now = 0.0
        self._running = threads
        self._wakes: list[float] = []
        self._changed = threading.Condition()

    def now(self) -> float:
        return self._now

    def jitter(self, limit_s: float) -> float:
        return limit_s

    def wait(self, cancelled: threading.Event, seconds: float) -> bool:
        with self._changed:
            wake = self._now + seconds
            heapq.heappush(self._wakes, wake)
            self._stop_running()
            self._changed.wait_for(lambda: self._now >= wake)
        return cancelled.is_set()

    def leave(self) -> None:
        """The calling thread ends."""
        with self._changed:
            self._stop_running()

    def _stop_running(self) -> None:
        self._running -= 1
        if self._running or not self._wakes:
            return
        self._now = self._wakes[0]
        while self._wakes and self._wakes[0] <= self._now:
            heapq.heappop(self._wakes)
            self._running += 1
        self._changed.notify_all()


def test_an_outage_costs_one_request_for_each_step_of_one_backoff() -> None:
    """Ten minutes, 8 sources with 8 threads: after the requests under way each step of one backoff sees one request.

    The first wave is 64 requests at most; from then on it is as if one client asked.
    """
    options = RetryOptions(deadline_s=600, base_s=0.1, max_wait_s=10)
    clock: Any = CommonClock(64)
    sources = [Site(f"s3://bucket/{number}") for number in range(8)]
    asked: list[float] = []

    def read(store: Site) -> None:
        def fail(_: float) -> None:
            asked.append(clock.now())
            raise StoreUnavailable("down")

        try:
            with pytest.raises(StoreUnavailable):
                _retry(fail, clock, options=options, deadline_s=600, circuit=circuit_of(store, clock))
        finally:
            clock.leave()

    threads = [threading.Thread(target=read, args=(source,), daemon=True) for source in sources for _ in range(8)]
    kept = circuit_of(sources[0], clock)
    for thread in threads:
        thread.start()
    watched(lambda: join_all(threads))
    del kept
    probes = sorted(time for time in asked if time)
    assert len(asked) - len(probes) <= 64
    steps = [backoff_limit_s(number, options) for number in range(1, len(probes))]
    assert all(later - former >= step - 1e-6 for former, later, step in zip(probes, probes[1:], steps, strict=False))
    assert 60 <= len(probes) <= 67, "0.1 + 0.2 + … + 6.4, then one every 10 s of 600"


# -- one for a process and a server ------------------------------------------------------------------------------------


class Site(MemoryStore):
    """A store that says which server it asks."""

    def __init__(self, url: str, site: str | None = "http://127.0.0.1:9000") -> None:
        super().__init__(url=url)
        self.site = site


def test_one_circuit_for_a_server() -> None:
    """Stores of one site share it, of others not; one that names no site has its own; each clock has its time."""
    clock = SystemClock()
    a, b, other = Site("s3://a"), Site("s3://b/train"), Site("s3://a", "s3://a")
    circuit = circuit_of(a, clock)
    assert circuit_of(b, SystemClock()) is circuit
    assert circuit_of(other, clock) is not circuit
    assert circuit_of(a, FakeClock()) is not circuit
    fake = MemoryStore()
    assert circuit_of(fake, clock) is circuit_of(fake, clock)
    assert circuit_of(MemoryStore(), clock) is not circuit_of(fake, clock)


def test_the_site_of_a_store_is_its_server() -> None:
    """A named endpoint is one server, whatever the bucket; without one each bucket has a host; disks say none."""
    endpoint = {"endpoint_url": "http://127.0.0.1:9000"}
    sites = [
        site_of(open_store(url, options))
        for url, options in (
            ("s3://a/train", endpoint), ("s3://b/valid", {"client_kwargs": endpoint}), ("s3://a/train", None),
            ("s3://a/valid", {"anon": True}), ("s3://b", None), ("https://user:word@host:1/x/y", None),
        )
    ]  # fmt: skip
    assert sites == [endpoint["endpoint_url"]] * 2 + ["s3://a"] * 2 + ["s3://b", "https://host:1"]
    assert site_of(open_store("/data/train")) is None


def test_a_circuit_goes_with_its_last_user() -> None:
    """Nothing is remembered of a server that nobody reads from, nor of a store that is gone."""
    store = Site("s3://a")
    circuit = opened(None, circuit_of(store, SystemClock()))
    seen = weakref.ref(circuit)
    assert circuit_of(store, SystemClock()) is circuit
    del circuit
    assert seen() is None
    assert circuit_of(store, SystemClock()).claim(8) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python ≥ 3.12 on any fork
def test_a_fork_begins_anew() -> None:
    """A child does not wait for a probe that a thread of its parent makes: who inherits a circuit goes on using it."""
    store, clock = Site("s3://a"), SystemClock()
    circuit = opened(clock, circuit_of(store, clock))
    in_thread(lambda: circuit.claim(8))
    assert circuit.claim(8) > 0
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if circuit.claim(8) == circuit_of(store, clock).claim(8) == 0 else 1)
    )
    child.start()
    child.join(HANGS_AFTER_S)
    assert child.exitcode == 0


# -- second requests ---------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["read", "hedge", "fail", "answer"]), max_size=400))
def test_second_requests_keep_their_budget(moves: list[str]) -> None:
    """Whatever happens: at most one for each twenty reads, at most eight at once, none while the store fails."""
    circuit = Circuit(FakeClock())
    reads = hedges = in_a_row = 0
    failing = False
    for move in moves:
        match move:
            case "read":
                circuit.read()
                reads, in_a_row = reads + 1, 0
            case "fail":
                circuit.failed(0, OPTIONS)
                failing = True
            case "answer":
                circuit.answered()
                failing = False
            case "hedge" if circuit.may_hedge():
                assert not failing
                hedges, in_a_row = hedges + 1, in_a_row + 1
        assert hedges <= reads * 0.05 + 1e-9
        assert in_a_row <= 8


def test_a_budget_saved_up_is_eight() -> None:
    """After a thousand quick reads a store that slows down altogether sees eight second requests, not fifty."""
    circuit = Circuit(FakeClock())
    for _ in range(1000):
        circuit.read()
    assert [circuit.may_hedge() for _ in range(9)] == [True] * 8 + [False]


def opened(clock: Any, circuit: Circuit | None = None) -> Circuit:
    """Return a circuit after 16 failures whose waits are over."""
    circuit = circuit or Circuit(clock)
    for _ in range(16):
        circuit.failed(0, OPTIONS)
    return circuit


def in_thread(action: Callable[[], Any]) -> None:
    """Do it on another thread."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    join_all([thread])
