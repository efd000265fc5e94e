"""The one owner of retries: exponential backoff with full jitter, under a deadline, cancellable at once.

tenacity decides and loops; time, waiting and chance come from the caller's clock. Source of the backoff: M. Brooker,
"Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), "full jitter".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception

from streamshards.clock import Clock
from streamshards.errors import StoreUnavailable, StreamShardsError
from streamshards.events import FetchRetried
from streamshards.options import RetryOptions
from streamshards.storage.store import Patience

T = TypeVar("T")


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
) -> T:
    """Return what *action* returns, trying again as long as its errors are transient.

    Args:
        action: One attempt; called with the seconds it may take: ``attempt_timeout_s``, or what is left if less,
            as a ``Patience`` that has ``stall_s`` and ``min_bytes_per_s``, too.
        what: Url and key, for messages and events.
        options: The waits: drawn from ``[0, base_s · 2ⁿ)``, capped at ``max_wait_s``.
        deadline_s: Seconds from now. No attempt begins later; when the next wait would end later, we give up.
        clock: Tells the time, waits and draws.
        cancelled: Ends a wait at once.
        on_retry: Told of every failed attempt that will be followed by another, before the wait.

    Raises:
        StoreUnavailable: Transient errors until the deadline; the last one is its cause.
        Cancelled: *cancelled* was set before an attempt or during a wait.
        Exception: Whatever else *action* raises, at once and unchanged.
    """
    started = clock.now()

    def attempt() -> T:
        if cancelled.is_set():
            raise Cancelled(what)
        left_s = min(options.attempt_timeout_s, started + deadline_s - clock.now())
        return action(Patience(left_s, stall_s=options.stall_s, min_bytes_per_s=options.min_bytes_per_s))

    def wait(state: RetryCallState) -> float:
        return clock.jitter(backoff_limit_s(state.attempt_number, options))

    def is_over(state: RetryCallState) -> bool:
        return clock.now() + state.upcoming_sleep >= started + deadline_s

    def report(state: RetryCallState) -> None:
        on_retry(FetchRetried(what, state.attempt_number, state.upcoming_sleep, str(_failure(state))))

    def sleep(seconds: float) -> None:
        if clock.wait(cancelled, seconds):
            raise Cancelled(what)

    def give_up(state: RetryCallState) -> NoReturn:
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
