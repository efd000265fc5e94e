"""The one owner of retries: exponential backoff with full jitter, under a deadline, cancellable at once.

tenacity decides and loops; time, waiting and chance come from the caller's clock. Source of the backoff: M. Brooker,
"Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), "full jitter".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception

from streamshards.clock import Clock
from streamshards.errors import StoreUnavailable, StreamShardsError
from streamshards.events import FetchRetried
from streamshards.options import RetryOptions
from streamshards.storage.store import Patience

T = TypeVar("T")


_OPENS_AFTER: Final = 16
"""Failures in a row, of all threads together: each of the default's 8 may meet a burst twice before it counts."""


class Circuit:
    """Whether a store answers at all, as the threads of one reader see it together.

    Closed, at first: everyone may ask. Open, after 16 failures in a row: one asks at a time, and not before the wait of
    the one before is over, so a dying store sees one client with exponential backoff instead of one for each thread.
    Any answer, also "no such object", closes it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._is_probing = False
        self._not_before = 0.0

    def claim(self, limit_s: float) -> float:
        """Return 0 if the caller may ask now, else after how many seconds, at most about *limit_s*, to claim again."""
        with self._lock:
            if self._failures < _OPENS_AFTER:
                return 0.0
            early_s = self._not_before - self._clock.now()
            if early_s <= 0 and not self._is_probing:
                self._is_probing = True
                return 0.0
        return early_s if early_s > 0 else max(self._clock.jitter(limit_s), limit_s / 8)

    def answered(self) -> None:
        """The store answered."""
        with self._lock:
            self._failures = 0
            self._is_probing = False

    def failed(self, wait_s: float) -> None:
        """It did not; the caller will wait so long."""
        with self._lock:
            self._failures += 1
            self._is_probing = False
            self._not_before = self._clock.now() + wait_s

    def left(self) -> None:
        """The caller went without having learnt anything."""
        with self._lock:
            self._is_probing = False


class Cancelled(Exception):
    """The reader was stopped while it was about to try, or waiting to try again. Never reaches the user."""


def with_retries(
    action: Callable[[float], T],
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
        circuit: Shared with the other threads that ask the same store; None: nobody else asks.
        on_retry: Told of every failed attempt that will be followed by another, before the wait.

    Raises:
        StoreUnavailable: Transient errors until the deadline; the last one is its cause.
        Cancelled: *cancelled* was set before an attempt or during a wait.
        Exception: Whatever else *action* raises, at once and unchanged.
    """
    started = clock.now()
    shared = circuit or Circuit(clock)

    def wait_for_turn() -> None:
        while pause_s := shared.claim(options.max_wait_s):
            left_s = started + deadline_s - clock.now()
            if left_s <= 0:
                raise StoreUnavailable(f"{what}: not asked: the store does not answer other requests either")
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
        shared.failed(state.upcoming_sleep)
        on_retry(FetchRetried(what, state.attempt_number, state.upcoming_sleep, str(_failure(state))))

    def sleep(seconds: float) -> None:
        if clock.wait(cancelled, seconds):
            raise Cancelled(what)

    def give_up(state: RetryCallState) -> NoReturn:
        shared.failed(0.0)
        last = _failure(state)
        raise StoreUnavailable(
            f"{what}: gave up after {state.attempt_number} attempts in {clock.now() - started:.1f} s "
            f"(deadline {deadline_s:g} s); last: {last}; check the store, or allow more time with RetryOptions"
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
