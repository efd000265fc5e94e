"""The public fakes do what they say."""

from __future__ import annotations

import pickle
import threading

import pytest

from streamshards.errors import (
    AccessDenied,
    ObjectExists,
    ObjectMissing,
    ObjectTooLarge,
    OptionInvalid,
    StoreError,
    StoreUnavailable,
)
from streamshards.storage import Store
from streamshards.testing import (
    DENIED,
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


def _get(store: Store, key: str = "a", timeout_s: float = 10.0) -> bytes:
    return store.get(key, timeout_s=timeout_s, max_bytes=100)


def test_memory_store() -> None:
    """It keeps the contract: replace, exclusive create, delete, sorted listing, limits and keys."""
    store = MemoryStore({"b": b"1"})
    store.put("a/x", memoryview(b"22"), timeout_s=1)
    assert store.list() == [("a/x", 2), ("b", 1)]
    assert store.list("a/") == [("a/x", 2)]
    with pytest.raises(ObjectExists):
        store.put("b", b"2", timeout_s=1, if_absent=True)
    store.delete("b")
    store.delete("b")
    with pytest.raises(ObjectMissing):
        _get(store, "b")
    with pytest.raises(ObjectTooLarge, match="2 bytes"):
        store.get("a/x", timeout_s=1, max_bytes=1)
    with pytest.raises(OptionInvalid):
        store.put("../x", b"", timeout_s=1)


def test_faults_come_in_the_order_of_the_script() -> None:
    """One entry per get; after the last one all is well."""
    store = FaultyStore(
        MemoryStore({"a": b"\x00\x01\x02", "b": b"other"}),
        [UNAVAILABLE, MISSING, DENIED, Fail(StoreError, "odd"), Truncate(), Truncate(1), FlipBit(8), Swap("b"), None],
    )
    for kind in (StoreUnavailable, ObjectMissing, AccessDenied, StoreError):
        with pytest.raises(kind):
            _get(store)
    got = [_get(store) for _ in range(6)]
    assert got == [b"\x00\x01", b"\x00", b"\x00\x00\x02", b"other", b"\x00\x01\x02", b"\x00\x01\x02"]
    assert store.gets == ["a"] * 10


def test_a_function_may_be_the_script() -> None:
    """It is asked with the key and how often that key was asked for before."""

    def script(key: str, turn: int) -> Fault | None:
        return UNAVAILABLE if key == "a" and turn == 1 else None

    store = FaultyStore(MemoryStore({"a": b"1", "b": b"2"}), script)
    assert [_get(store, key) for key in "abb"] == [b"1", b"2", b"2"]
    with pytest.raises(StoreUnavailable):
        _get(store)
    assert _get(store) == b"1"


def test_block() -> None:
    """A blocked get tells that it has begun, waits for its event, and then answers as usual."""
    until, entered = threading.Event(), threading.Event()
    store = FaultyStore(MemoryStore({"a": b"1"}), [Block(until, entered), Block(threading.Event())])
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(_get(store)), daemon=True)
    reader.start()
    assert entered.wait(10)
    assert got == []
    until.set()
    reader.join(10)
    assert got == [b"1"]
    with pytest.raises(StoreUnavailable, match="no answer"):
        _get(store, timeout_s=0.01)


def test_the_rest_goes_through() -> None:
    """Only gets are scripted."""
    store = FaultyStore(MemoryStore(), [UNAVAILABLE])
    store.put("a", b"1", timeout_s=1)
    assert store.list() == [("a", 1)]
    store.delete("a")
    assert store.list() == []


def test_fakes_pickle() -> None:
    """They travel to spawned workers, as copies."""
    store = FaultyStore(MemoryStore({"a": b"1"}), [UNAVAILABLE])
    copy: FaultyStore = pickle.loads(pickle.dumps(store))
    with pytest.raises(StoreUnavailable):
        _get(copy)
    assert _get(copy) == b"1"
    assert store.gets == []


def test_fake_clock() -> None:
    """Waiting moves it, unless cancelled; jitter is the fraction asked for."""
    clock, cancelled = FakeClock(chance=0.5), threading.Event()
    assert clock.jitter(4) == 2
    assert not clock.wait(cancelled, 3)
    clock.advance(1)
    cancelled.set()
    assert clock.wait(cancelled, 10)
    assert clock.now() == 4
    assert clock.waits == [3, 10]
