"""The fault proxy: what goes through is untouched, and each fault is what it says, seen by a plain socket client."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from streamshards.errors import StoreUnavailable
from streamshards.storage import Store, open_store
from streamshards.testing import (
    SLOW_DOWN,
    Answer,
    Block,
    Cut,
    Drip,
    FaultProxy,
    FlipBit,
    Request,
    Reset,
    Stall,
    Swap,
    Truncate,
    at_random,
    by_key,
)
from streamshards.testing.proxy import Fault
from streamshards.testing.servers import S3Server
from tests.engine.rig import watched

BUCKET = "proxied"
DATA = bytes(range(256)) * 40
OTHER = b"other"


@pytest.fixture(scope="module", params=["seaweedfs", "juicefs"])
def real(request: pytest.FixtureRequest) -> S3Server:
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    server.create_bucket(BUCKET)
    store = open_store(f"s3://{BUCKET}", server.storage_options)
    store.put("d/b c+é", DATA, timeout_s=20)
    store.put("a", DATA, timeout_s=20)
    store.put("other", OTHER, timeout_s=20)
    return server


@pytest.fixture
def proxy(real: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(real) as proxy:
        yield proxy


def store_at(proxy: FaultProxy) -> Store:
    return open_store(f"s3://{BUCKET}", proxy.server.storage_options)


def get(proxy: FaultProxy, key: str = "a") -> bytes:
    return bytes(store_at(proxy).get(key, timeout_s=20, max_bytes=1 << 20))


def test_what_has_no_fault_goes_through(proxy: FaultProxy) -> None:
    """Puts, gets of odd keys, listings and deletes work as without it; the real server verifies the signatures."""
    store = store_at(proxy)
    store.put("new/é x", DATA, timeout_s=20)
    assert bytes(store.get("new/é x", timeout_s=20, max_bytes=1 << 20)) == DATA
    assert ("new/é x", len(DATA)) in store.list()
    store.delete("new/é x")
    assert "new/é x" not in dict(store.list())
    assert get(proxy, "d/b c+é") == DATA
    assert {r.access_key for r in proxy.requests} == {proxy.server.access_key}
    assert Request("GET", f"{BUCKET}/d/b c+é", 0, proxy.server.access_key) in proxy.requests


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (FlipBit(9), DATA[:1] + bytes([DATA[1] ^ 2]) + DATA[2:]),
        (Truncate(10), DATA[:10]),
        (Truncate(), DATA[:-1]),
        (Swap(f"{BUCKET}/other"), OTHER),
        (Drip(200_000), DATA),
    ],
    ids=["bit", "ten bytes", "one less", "another", "drip"],
)
def test_whole_answers_with_other_bytes(proxy: FaultProxy, fault: Fault, expected: bytes) -> None:
    """A healthy answer whose body is not the object's; the next request goes through."""
    proxy.script = by_key(f"{BUCKET}/a", [fault])
    assert get(proxy) == expected
    assert get(proxy) == DATA
    assert [r.fault for r in proxy.requests] == [fault, None]


@pytest.mark.parametrize("fault", [Reset(), Reset(100), Cut(100), SLOW_DOWN, Answer(502)], ids=str)
def test_broken_answers(proxy: FaultProxy, fault: Fault) -> None:
    """The store sees no whole answer."""
    proxy.script = by_key(f"{BUCKET}/a", fault)
    with pytest.raises(StoreUnavailable):
        get(proxy)


def test_on_the_wire(proxy: FaultProxy) -> None:
    """Status, ``Retry-After`` and ``Location`` are sent as scripted; a reset is a reset, not an end."""
    address = urlsplit(proxy.server.endpoint_url)
    client = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
    expected = {
        Answer(429, "TooManyRequests", retry_after_s=7): (429, "7", None),
        Answer(307, "Redirect", location="http://a.b:1"): (307, None, f"http://a.b:1/{BUCKET}/a"),
    }
    for fault, head in expected.items():
        proxy.script = by_key("*", fault)
        client.request("GET", f"/{BUCKET}/a")
        answer = client.getresponse()
        answer.read()
        assert (answer.status, answer.headers["Retry-After"], answer.headers["Location"]) == head
    proxy.script = by_key("*", Reset())
    client.request("GET", f"/{BUCKET}/a")
    with pytest.raises(ConnectionResetError):
        client.getresponse()
    client.close()


def test_stalls_end_when_the_client_hangs_up(proxy: FaultProxy) -> None:
    """A client that gives up is let go; closing the proxy ends every stall, too."""
    for fault in (Stall(), Stall(100)):
        proxy.script = by_key("*", fault)
        with pytest.raises(StoreUnavailable):
            store_at(proxy).get("a", timeout_s=0.2, max_bytes=1 << 20)


def test_held_back(proxy: FaultProxy) -> None:
    """``Block`` answers once its event is set."""
    until, entered = threading.Event(), threading.Event()
    proxy.script = by_key("*", Block(until, entered))
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(get(proxy)), daemon=True)
    thread.start()
    assert entered.wait(20)
    assert got == []
    until.set()
    watched(thread.join)
    assert got == [DATA]


def test_down_and_up_again(proxy: FaultProxy) -> None:
    """While it is down, connections are refused, also those that were open; then it is there again, same port."""
    store = store_at(proxy)
    assert bytes(store.get("a", timeout_s=20, max_bytes=1 << 20)) == DATA
    with proxy.down(), pytest.raises(StoreUnavailable):
        store.get("a", timeout_s=20, max_bytes=1 << 20)
    assert bytes(store.get("a", timeout_s=20, max_bytes=1 << 20)) == DATA
    watched(proxy.down_for(0.01).join)
    assert get(proxy) == DATA


def test_scripts_choose_by_key_and_attempt() -> None:
    """``by_key`` counts attempts of each key on its own; ``at_random`` depends on the seed, key and attempt alone."""
    script = by_key("*/x*", [None, SLOW_DOWN])
    asked = [(key, attempt) for key in ("b/x1", "b/x2", "b/y") for attempt in range(3)]
    assert [script(Request("GET", key, attempt, "")) for key, attempt in asked] == [
        None, SLOW_DOWN, None, None, SLOW_DOWN, None, None, None, None,
    ]  # fmt: skip
    assert script(Request("PUT", "b/x1", 1, "")) is None
    requests = [Request("GET", f"b/{number}", 0, "") for number in range(1000)]
    first, again = ([at_random(0.2, [SLOW_DOWN], seed=5)(r) for r in requests] for _ in range(2))
    assert first == again
    assert 100 < sum(fault is not None for fault in first) < 300
