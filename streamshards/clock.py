"""The one door to time, waiting and jitter, so that tests can bring their own."""

from __future__ import annotations

import random
import threading
import time
from datetime import datetime, timezone
from typing import Protocol


class Clock(Protocol):
    """What the engine asks of time."""

    def now(self) -> float:
        """Return monotonic seconds."""

    def wait(self, cancelled: threading.Event, seconds: float) -> bool:
        """Sleep up to *seconds*, or less if *cancelled* is set; return whether it is set."""

    def jitter(self, limit_s: float) -> float:
        """Return a random number of seconds from ``[0, limit_s)``."""


class SystemClock:
    """Real time."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, cancelled: threading.Event, seconds: float) -> bool:
        return cancelled.wait(seconds)

    def jitter(self, limit_s: float) -> float:
        return random.uniform(0.0, limit_s)


def unix_ns() -> int:
    """Return the nanoseconds since 1970, as file systems count them."""
    return time.time_ns()


def utc_timestamp() -> str:
    """Return the current time as ISO 8601, UTC, whole seconds: ``2026-01-31T12:00:00Z``."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
