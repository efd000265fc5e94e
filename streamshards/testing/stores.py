"""A store in memory, and a wrapper that makes any store fail on a script."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from streamshards.errors import (
    AccessDenied,
    ObjectExists,
    ObjectMissing,
    ObjectTooLarge,
    StoreUnavailable,
    StreamShardsError,
)
from streamshards.storage.store import TIMEOUT_S, Blob, Store, check_key


class MemoryStore:
    """A :class:`~streamshards.storage.Store` in a dict; thread-safe. A pickled or forked one is a copy."""

    def __init__(self, objects: dict[str, bytes] | None = None, *, url: str = "fake://store") -> None:
        self.url = url
        self.objects = dict(objects or {})
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"MemoryStore({self.url!r}, {len(self.objects)} objects)"

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "objects": self.objects}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["objects"], url=state["url"])  # type: ignore[misc]  # a lock cannot be pickled

    def get(self, key: str, *, timeout_s: float, max_bytes: int) -> bytes:  # noqa: ARG002 - memory is at once
        data = self.objects.get(check_key(key))
        if data is None:
            raise ObjectMissing(f"{self.url}/{key}: get failed: no such object; check the key")
        if len(data) > max_bytes:
            raise ObjectTooLarge(f"{self.url}/{key}: get refused: {len(data):,} bytes, {max_bytes:,} were expected")
        return data

    def get_range(self, key: str, start: int, stop: int, *, timeout_s: float) -> bytes:
        return self.get(key, timeout_s=timeout_s, max_bytes=sys.maxsize)[start:stop]

    def put(self, key: str, data: bytes | memoryview, *, timeout_s: float, if_absent: bool = False) -> None:  # noqa: ARG002 - memory is at once
        whole = bytes(data)
        with self._lock:
            if check_key(key) in self.objects and if_absent:
                raise ObjectExists(f"{self.url}/{key}: put refused: the object exists; choose another key")
            self.objects[key] = whole

    def delete(self, key: str, *, timeout_s: float = TIMEOUT_S) -> None:  # noqa: ARG002 - memory is at once
        with self._lock:
            self.objects.pop(check_key(key), None)

    def list(self, prefix: str = "", *, timeout_s: float = TIMEOUT_S) -> list[tuple[str, int]]:  # noqa: ARG002 - memory is at once
        with self._lock:
            return sorted((key, len(data)) for key, data in self.objects.items() if key.startswith(prefix))


@dataclass(frozen=True, slots=True)
class Fail:
    """The get raises."""

    kind: type[StreamShardsError] = StoreUnavailable
    text: str = "scripted"


UNAVAILABLE = Fail(StoreUnavailable)
MISSING = Fail(ObjectMissing)
DENIED = Fail(AccessDenied)


@dataclass(frozen=True, slots=True)
class Truncate:
    """The get returns only the first *length* bytes; a negative one counts from the end."""

    length: int = -1


@dataclass(frozen=True, slots=True)
class FlipBit:
    """The get returns the object with one bit changed: the *bit*-th, counted from the lowest of the first byte."""

    bit: int = 0


@dataclass(frozen=True, slots=True)
class Swap:
    """The get returns another object's bytes."""

    key: str


@dataclass(frozen=True, slots=True)
class Block:
    """The get does not answer until *until* is set; then as usual. After ``timeout_s`` it is ``StoreUnavailable``."""

    until: threading.Event
    entered: threading.Event | None = None
    """Set when the get begins to wait."""


Fault = Fail | Truncate | FlipBit | Swap | Block
Script = Callable[[str, int], Fault | None] | Sequence[Fault | None]
"""Which fault for which get: a function of (key, number of that key's get, from 0), or one entry per get in the order
they come, none after the last."""


class FaultyStore:
    """A store whose gets fail on a script; everything else goes through.

    Attributes:
        gets: The keys asked for so far, in order.
    """

    def __init__(self, store: Store, script: Script) -> None:
        self.url = store.url
        self.gets: list[str] = []
        self._store = store
        self._script = script
        self._lock = threading.Lock()
        if getattr(store, "get_range", None) is None:  # then neither have we: objects are read whole
            self.get_range = None  # type: ignore[assignment, method-assign]  # as if it had none

    def __repr__(self) -> str:
        return f"FaultyStore({self._store!r}, {len(self.gets)} gets)"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def get(self, key: str, *, timeout_s: float, max_bytes: int) -> Blob:
        source, fault = self._begin(key, timeout_s)
        return _spoiled(self._store.get(source, timeout_s=timeout_s, max_bytes=max_bytes), fault)

    def get_range(self, key: str, start: int, stop: int, *, timeout_s: float) -> Blob:
        """As ``get``; a truncation or a flipped bit is one of the range."""
        source, fault = self._begin(key, timeout_s)
        return _spoiled(self._store.get_range(source, start, stop, timeout_s=timeout_s), fault)

    def _begin(self, key: str, timeout_s: float) -> tuple[str, Fault | None]:
        """Let the script have its way before the store is asked; return which key to ask for, and what to do after."""
        fault = self._next_fault(key)
        match fault:
            case Fail(kind, text):
                raise kind(f"{self.url}/{key}: get failed: {text}")
            case Block(until, entered):
                if entered is not None:
                    entered.set()
                if not until.wait(timeout_s):
                    raise StoreUnavailable(f"{self.url}/{key}: get failed: no answer in {timeout_s:g} s; try again")
        return (fault.key if isinstance(fault, Swap) else key), fault

    def put(self, key: str, data: bytes | memoryview, *, timeout_s: float, if_absent: bool = False) -> None:
        self._store.put(key, data, timeout_s=timeout_s, if_absent=if_absent)

    def delete(self, key: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._store.delete(key, timeout_s=timeout_s)

    def list(self, prefix: str = "", *, timeout_s: float = TIMEOUT_S) -> list[tuple[str, int]]:
        return self._store.list(prefix, timeout_s=timeout_s)

    def _next_fault(self, key: str) -> Fault | None:
        with self._lock:
            self.gets.append(key)
            if callable(self._script):
                return self._script(key, self.gets.count(key) - 1)
            turn = len(self.gets) - 1
            return self._script[turn] if turn < len(self._script) else None


def _spoiled(data: Blob, fault: Fault | None) -> Blob:
    match fault:
        case Truncate(length):
            return data[:length]
        case FlipBit(bit):
            byte, position = divmod(bit, 8)
            return b"".join((data[:byte], bytes([data[byte] ^ 1 << position]), data[byte + 1 :]))
        case _:
            return data
