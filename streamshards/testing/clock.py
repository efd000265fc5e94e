"""Time that a test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable


class FakeClock:
    """A :class:`~streamshards.clock.Clock` in which waiting takes no time.

    Args:
        chance: The fraction of its limit that every jitter is; 1.0 makes waits the longest they can be.
        on_wait: Called before each wait with its seconds; a test sets events here, or moves the clock further.

    Attributes:
        waits: The seconds of each wait so far, in order.
    """

    def __init__(self, *, chance: float = 1.0, on_wait: Callable[[float], None] | None = None) -> None:
        self.waits: list[float] = []
        self._chance = chance
        self._on_wait = on_wait
        self._now = 0.0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"FakeClock(now={self._now:g} s, waits={len(self.waits)})"

    def now(self) -> float:
        return self._now

    def wait(self, cancelled: threading.Event, seconds: float) -> bool:
        if self._on_wait is not None:
            self._on_wait(seconds)
        self.waits.append(seconds)
        if not cancelled.is_set():
            self.advance(seconds)
        return cancelled.is_set()

    def jitter(self, limit_s: float) -> float:
        return limit_s * self._chance

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass."""
        with self._lock:
            self._now += seconds
