"""The one owner of retries: exponential backoff with full jitter, under a deadline, cancellable at once.

tenacity decides and loops; time, waiting and chance come from the caller's clock. Source of the backoff: M. Brooker,
"Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), "full jitter".

All readers of one process that ask the same server share one ``Circuit``: a dying server sees one probe at a time from
a process, and the waits between probes double, however many datasets, threads and shards want something of it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Final, NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception

from streamshards.clock import Clock, SystemClock
from streamshards.errors import StoreUnavailable, StreamShardsError
from streamshards.events import FetchRetried
from streamshards.options import RetryOptions
from streamshards.storage.store import Patience, Store, site_of

T = TypeVar("T")


_OPENS_AFTER: Final = 16
"""Failures in a row, of all threads together: each of the default's 8 may meet a burst twice before it counts."""
_HEDGED_SHARE: Final = 0.05
"""Second requests for each first one, at most."""
_MAX_SAVED_HEDGES: Final = 8.0
"""Second requests that may follow each other at once: a server that slows down altogether must not see all doubled."""


class Circuit:
    """Whether a server answers at all, as all threads of this process that ask it see it together.

    Closed, at first: everyone may ask. Open, after 16 failures in a row: one probes at a time, and not before the wait
    after the probe before is over. That wait doubles from probe to probe, whoever probes, so a dying server sees one
    client with exponential backoff instead of one for each thread. Any answer, also "no such object", closes it.

    It also keeps the budget of second requests (``RetryOptions.hedge_s``): one for each twenty reads, saved up to
    eight, and none while the server fails.

    Args:
        clock: Time.
        owner: Kept as long as the circuit is.
    """

    def __init__(self, clock: Clock, owner: object = None) -> None:
        self._clock = clock
        self._owner = owner
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget everything, in a child that was forked: a thread of the parent may have held the lock, or probe."""
        self._lock = threading.Lock()
        self._failures = 0
        self._probes = 0
        self._prober: int | None = None
        self._not_before = 0.0
        self._saved_hedges = 0.0

    def claim(self, limit_s: float) -> float:
        """Return 0 if the caller may ask now, else after how many seconds, at most about *limit_s*, to claim again."""
        with self._lock:
            if self._failures < _OPENS_AFTER:
                return 0.0
            early_s = self._not_before - self._clock.now()
            if early_s <= 0 and self._prober is None:
                self._prober = threading.get_ident()
                return 0.0
        return early_s if early_s > 0 else max(self._clock.jitter(limit_s), limit_s / 8)

    def answered(self) -> None:
        """The server answered."""
        with self._lock:
            self._failures = self._probes = 0
            self._prober = None

    def failed(self, wait_s: float, options: RetryOptions) -> None:
        """It did not; the caller will wait *wait_s*, and whoever probes next at least as long."""
        with self._lock:
            self._failures += 1
            if self._is_mine():
                self._prober = None
                self._probes += 1
                wait_s = max(wait_s, self._clock.jitter(backoff_limit_s(self._probes, options)))
            # Requests that were under way when it opened fail later, and must not call the next probe forward.
            self._not_before = max(self._not_before, self._clock.now() + wait_s)

    def left(self) -> None:
        """The caller went without having learnt anything."""
        with self._lock:
            if self._is_mine():
                self._prober = None

    def read(self) -> None:
        """A shard, or a part of one, was asked for: that earns a twentieth of a second request."""
        with self._lock:
            self._saved_hedges = min(_MAX_SAVED_HEDGES, self._saved_hedges + _HEDGED_SHARE)

    def may_hedge(self) -> bool:
        """Return whether a second request may be made now, and take it off the budget."""
        with self._lock:
            if self._failures or self._saved_hedges < 1.0:
                return False
            self._saved_hedges -= 1.0
            return True

    def _is_mine(self) -> bool:
        """Whether the calling thread is the one that probes."""
        return self._prober == threading.get_ident()


_circuits: weakref.WeakValueDictionary[Hashable, Circuit] = weakref.WeakValueDictionary()
_finding = threading.Lock()


def _after_fork() -> None:
    """Begin anew in the child, also with the circuits that it inherits: who has one goes on using it."""
    global _finding
    _finding = threading.Lock()
    for circuit in list(_circuits.values()):
        circuit.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def circuit_of(store: Store, clock: Clock) -> Circuit:
    """Return what this process knows about the server behind *store*: one object as long as anyone has it.

    A store that does not say which server it asks (a local disk, a fake) has a circuit of its own.
    """
    site = site_of(store)
    time = "system" if isinstance(clock, SystemClock) else id(clock)
    key = (id(store) if site is None else site, time)
    with _finding:
        circuit = _circuits.get(key)
        if circuit is None:
            circuit = _circuits[key] = Circuit(clock, owner=store if site is None else None)
        return circuit


class Cancelled(Exception):
    """The reader was stopped while it was about to try, or waiting to try again. Never reaches the user."""


def with_retries(
    action: Callable[[Patience], T],
    *,
    what: str,
    options: RetryOptions,
    deadline_s: float,
    clock: Clock,
    cancelled: threading.Event,
    on_retry: Callable[[FetchRetried], None],
    circuit: Circuit | None = None,
) -> T:
    """Return what *action* returns, trying again as long as its errors are transient.

    Args:
        action: One attempt; called with the seconds it may take: ``attempt_timeout_s``, or what is left if less,
            as a ``Patience`` that has ``stall_s`` and ``min_bytes_per_s``, too.
        what: Url and key, for messages and events.
        options: The waits: drawn from ``[0, base_s · 2ⁿ)``, capped at ``max_wait_s``; as long as the
            store asks for (``Retry-After``) if that is longer, under the same cap.
        deadline_s: Seconds from now. No attempt begins later; when the next wait would end later, we give up.
        clock: Tells the time, waits and draws.
        cancelled: Ends a wait at once.
        circuit: Of the store that is asked (``circuit_of``); None: nobody else asks it.
        on_retry: Told of every failed attempt that will be followed by another, before the wait.

    Raises:
        StoreUnavailable: Transient errors until the deadline; the last one is its cause.
        Cancelled: *cancelled* was set before an attempt or during a wait.
        Exception: Whatever else *action* raises, at once and unchanged.
    """
    started = clock.now()
    shared = circuit or Circuit(clock)
    earlier: list[str] = []  # the last attempt but one

    def wait_for_turn() -> None:
        while True:
            left_s = started + deadline_s - clock.now()
            if left_s <= 0:  # looked at before a turn is claimed: whoever has it must ask, and a timeout of 0 is none
                raise StoreUnavailable(f"{what}: not asked: the store does not answer other requests either")
            pause_s = shared.claim(options.max_wait_s)
            if not pause_s:
                return
            sleep(min(pause_s, left_s))

    def attempt() -> T:
        if cancelled.is_set():
            raise Cancelled(what)
        wait_for_turn()
        try:
            result = ask()
        except StreamShardsError as error:
            if not error.transient:
                shared.answered()
            raise
        except BaseException:
            shared.left()
            raise
        shared.answered()
        return result

    def ask() -> T:
        left_s = min(options.attempt_timeout_s, started + deadline_s - clock.now())
        return action(Patience(left_s, stall_s=options.stall_s, min_bytes_per_s=options.min_bytes_per_s))

    def wait(state: RetryCallState) -> float:
        asked_s = min(getattr(_failure(state), "retry_after_s", 0.0), options.max_wait_s)
        return max(asked_s, clock.jitter(backoff_limit_s(state.attempt_number, options)))

    def is_over(state: RetryCallState) -> bool:
        return clock.now() + state.upcoming_sleep >= started + deadline_s

    def report(state: RetryCallState) -> None:
        shared.failed(state.upcoming_sleep, options)
        earlier[:] = [str(_failure(state))]
        on_retry(FetchRetried(what, state.attempt_number, state.upcoming_sleep, str(_failure(state))))

    def sleep(seconds: float) -> None:
        if clock.wait(cancelled, seconds):
            raise Cancelled(what)

    def give_up(state: RetryCallState) -> NoReturn:
        shared.failed(0.0, options)
        last = _failure(state)
        before = f"; before: {earlier[0]}" if earlier and earlier[0] != str(last) else ""
        raise StoreUnavailable(
            f"{what}: gave up after {state.attempt_number} attempts in {clock.now() - started:.1f} s "
            f"(deadline {deadline_s:g} s); last: {last}{before}; check the store, or allow more time with RetryOptions"
        ) from last

    return Retrying(
        sleep=sleep,
        stop=is_over,
        wait=wait,
        retry=retry_if_exception(_is_transient),
        before_sleep=report,
        retry_error_callback=give_up,
    )(attempt)


def backoff_limit_s(attempt: int, options: RetryOptions) -> float:
    """Return the upper end of the wait after failed attempt number *attempt* (the first is 1)."""
    doublings = min(attempt - 1, 60)  # beyond that every cap is reached, and floats would overflow in the end
    return min(options.max_wait_s, options.base_s * 2.0**doublings)


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, StreamShardsError) and error.transient


def _failure(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()
