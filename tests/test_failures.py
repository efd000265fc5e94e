"""What each fault of a store leads to: fault x position x policy, through a proxy in front of a real S3 server.

``FAULTS`` is the table; docs/failures.md is made from it by ``python -m tests.make_failures``. Every cell checks the
whole epoch: the rows and their places, the events, the log lines, or the error's type and text; and that nothing hangs.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from streamshards import (
    AccessDenied,
    DatasetReplaced,
    IndexInvalid,
    OrderOptions,
    PrefetchOptions,
    RetryOptions,
    ShardCorrupt,
    ShardMissing,
    StoreError,
    StoreUnavailable,
    StreamingDataset,
    StreamShardsError,
)
from streamshards.engine.retry import circuit_of
from streamshards.events import Event, FetchHedged, FetchRetried, ShardSkipped
from streamshards.storage import open_store
from streamshards.testing import (
    ACCESS_DENIED,
    BAD_GATEWAY,
    EXPIRED_TOKEN,
    INTERNAL_ERROR,
    NO_SUCH_KEY,
    SLOW_DOWN,
    TIME_SKEWED,
    TOO_MANY_REQUESTS,
    Answer,
    Block,
    Cut,
    Drip,
    FaultProxy,
    FlipBit,
    Late,
    Request,
    Reset,
    Stall,
    Swap,
    Truncate,
    by_key,
)
from streamshards.testing.proxy import Fault
from streamshards.testing.servers import S3Server
from tests.datasets import assert_same, sample, write
from tests.engine.rig import join_all, watched

BUCKET: Final = "failures"
URL: Final = f"s3://{BUCKET}/train"
NUM_SAMPLES: Final = 48
BATCH: Final = 4
RETRY: Final = RetryOptions(deadline_s=20, first_contact_s=20, base_s=0.01, max_wait_s=0.05)
WATCHFUL: Final = replace(RETRY, stall_s=0.3, min_bytes_per_s=100_000)
"""For faults that stall."""
IMPATIENT: Final = replace(WATCHFUL, deadline_s=0.5, first_contact_s=0.5)
"""For faults that never pass."""
OPTIONS: Final = {"client_kwargs": {"verify": False}}
"""The endpoint is plain http; reading the system's certificates anyway would be half the time of many cells."""
ORDER: Final = OrderOptions(lanes=1, shuffle_block=20)


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Right:
    """Exactly the right samples, after so many retries, each an event that names the cause."""

    retries: int
    cause: str = ""


@dataclass(frozen=True)
class Lost:
    """The shard is given up: "skip" refills its places and tells once, "raise" raises."""

    error: type[StreamShardsError]
    retries: int
    cause: str


@dataclass(frozen=True)
class Ends:
    """An error with the url in its text, whatever the policy."""

    error: type[StreamShardsError]
    cause: str


Outcome = Right | Lost | Ends


@dataclass(frozen=True)
class Row:
    """One fault."""

    name: str
    kind: str
    """Its class in the policy: transient, corrupt, missing, denied, redirect."""
    fault: Fault
    times: int | None
    """How many requests in a row it meets; None: all."""
    shard: Outcome
    index: Outcome
    retry: RetryOptions = field(default=RETRY)
    is_exact: bool = True
    """Whether as many retries are ours as faults were met: aiohttp itself asks again on a connection that it reuses,
    and on a loaded machine a good answer may stall, too."""


def _transient(name: str, fault: Fault, cause: str, times: int = 2) -> Row:
    return Row(name, "transient", fault, times, Right(times, cause), Right(times, cause))


def _stalled(name: str, fault: Fault) -> Row:
    return replace(_transient(name, fault, "stalled", times=1), retry=WATCHFUL, is_exact=False)


def _outage(name: str, fault: Fault, cause: str) -> Row:
    """The same fault for ever."""
    gave_up = Ends(StoreUnavailable, f"gave up after.*{cause}")
    return Row(f"{name}, for ever", "transient", fault, None, gave_up, gave_up, IMPATIENT)


def _denied(name: str, fault: Fault, cause: str) -> Row:
    return Row(name, "denied", fault, None, Ends(AccessDenied, cause), Ends(AccessDenied, cause))


def _corrupt(name: str, fault: Fault, cause: str) -> Row:
    return Row(name, "corrupt", fault, None, Lost(ShardCorrupt, 2, cause), Ends(IndexInvalid, ""))


FAULTS: Final = (
    _transient("503 SlowDown, a burst of 5", SLOW_DOWN, "SlowDown", times=5),
    _transient("500 InternalError", INTERNAL_ERROR, "InternalError"),
    _transient("502 from a load balancer", BAD_GATEWAY, "502"),
    _transient("504 from a gateway", Answer(504), "504"),
    _transient("400 RequestTimeout", Answer(400, "RequestTimeout"), "RequestTimeout"),
    _transient("429", TOO_MANY_REQUESTS, "TooManyRequests"),
    _transient("429 with Retry-After", replace(TOO_MANY_REQUESTS, retry_after_s=1), "TooManyRequests"),
    _transient("503 with Retry-After", replace(SLOW_DOWN, retry_after_s=1), "SlowDown"),
    replace(_transient("reset before any byte", Reset(), ""), is_exact=False),
    _transient("reset in the middle of the body", Reset(200), ""),
    _transient("body cut, right Content-Length", Cut(200), ""),
    _stalled("no answer at all", Stall()),
    _stalled("200 bytes, then nothing", Stall(200)),
    _stalled("a drip of 1,000 bytes a second", Drip(1000)),
    _outage("503 SlowDown", SLOW_DOWN, ""),
    _outage("reset before any byte", Reset(), ""),
    _outage("200 bytes, then nothing", Stall(200), ""),
    Row("a wrong bit, once", "corrupt", FlipBit(8 * 300), 1, Right(1, "digest"), Right(1)),
    Row("shorter, once", "corrupt", Truncate(300), 1, Right(1, "300 received"), Right(1, "not JSON")),
    Row(
        "another object's bytes, once", "corrupt", Swap(f"{BUCKET}/stranger"), 1,
        Right(1, "bytes promised by the index"), Right(1, "not JSON"),
    ),
    Row(
        "200 with a page of HTML, once", "corrupt", Answer(200), 1,
        Right(1, "bytes promised by the index"), Right(1, "not JSON"),
    ),
    _corrupt("a wrong bit", FlipBit(8 * 300), "digest"),
    _corrupt("shorter, with a Content-Length to match", Truncate(300), "bytes promised by the index, 300 received"),
    _corrupt("an empty body", Truncate(0), "bytes promised by the index, 0 received"),
    _corrupt("200 with a page of HTML", Answer(200), "bytes promised by the index"),
    _corrupt("another object's bytes", Swap(f"{BUCKET}/stranger"), "bytes promised by the index"),
    Row(
        "404 NoSuchKey", "missing", NO_SUCH_KEY, None,
        Lost(ShardMissing, 1, "the store does not have it"), Ends(IndexInvalid, "no dataset|no index"),
    ),
    _denied("403 AccessDenied", ACCESS_DENIED, "AccessDenied"),
    _denied("403 SignatureDoesNotMatch", Answer(403, "SignatureDoesNotMatch"), "SignatureDoesNotMatch"),
    _denied("401", Answer(401), "401"),
    _denied("ExpiredToken", EXPIRED_TOKEN, "ExpiredToken"),
    _denied("RequestTimeTooSkewed", TIME_SKEWED, "RequestTimeTooSkewed.*clock"),
    Row(
        "307 to another host", "redirect", Answer(307, "TemporaryRedirect", location="http://localhost:9"), None,
        Ends(StoreError, "redirect"), Ends(StoreError, "redirect"),
    ),
)  # fmt: skip
POSITIONS: Final = ("index", "first", "middle", "last")
POLICIES: Final = ("skip", "raise")


# -- what the cells have in common -------------------------------------------------------------------------------------


class World:
    """A dataset in a real server, behind a proxy, and what reading it should give."""

    caplog: pytest.LogCaptureFixture
    """The running test's."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.events: list[Event] = []
        self._opened: dict[tuple[str, RetryOptions], StreamingDataset] = {}
        clean = self.open("raise", RETRY)
        self.shards = clean.index.names
        assert len(self.shards) >= 4
        self.expected = [s["id"] for s in clean]
        starts = np.concatenate([[0], np.cumsum(clean.index.rows)]).tolist()
        self.ids_of = [set(range(low, high)) for low, high in pairwise(starts)]

    def open(self, policy: Any, retry: RetryOptions) -> StreamingDataset:
        return StreamingDataset(
            URL, shuffle=True, seed=3, order=ORDER, on_corrupt=policy, max_corrupt=0.5, retry=retry,
            storage_options=OPTIONS | self.proxy.server.storage_options, observer=self.events.append,
        )  # fmt: skip

    def opened(self, policy: str, retry: RetryOptions) -> StreamingDataset:
        """Return a dataset whose index was read before the fault, at the start of epoch 0."""
        if (policy, retry) not in self._opened:
            self._opened[policy, retry] = self.open(policy, replace(retry, first_contact_s=60))
        dataset = self._opened[policy, retry]
        dataset.set_epoch(0)
        return dataset

    def shard_at(self, position: str) -> int:
        return {"first": 0, "middle": len(self.shards) // 2, "last": len(self.shards) - 1}[position]

    def key_at(self, position: str) -> str:
        return "index.json" if position == "index" else self.shards[self.shard_at(position)]

    @property
    def retried(self) -> list[FetchRetried]:
        return [event for event in self.events if isinstance(event, FetchRetried)]

    @property
    def skipped(self) -> list[ShardSkipped]:
        return [event for event in self.events if isinstance(event, ShardSkipped)]


@pytest.fixture(scope="module")
def proxy(seaweedfs_server: S3Server) -> Iterator[FaultProxy]:
    seaweedfs_server.create_bucket(BUCKET)
    write(URL, range(NUM_SAMPLES), shard_bytes=2_000, storage_options=seaweedfs_server.storage_options)
    write(f"s3://{BUCKET}/other", range(1000, 1010), storage_options=seaweedfs_server.storage_options)
    with FaultProxy(seaweedfs_server) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def shared(proxy: FaultProxy) -> World:
    world = World(proxy)
    data = open_store(f"s3://{BUCKET}/other", proxy.server.storage_options)
    (name,) = (key for key, _ in data.list() if key.endswith(".pt.zst"))
    whole = data.get(name, timeout_s=20, max_bytes=1 << 20)
    open_store(f"s3://{BUCKET}", proxy.server.storage_options).put("stranger", whole, timeout_s=20)
    return world


@pytest.fixture
def world(shared: World, caplog: pytest.LogCaptureFixture) -> Iterator[World]:
    caplog.set_level(logging.WARNING, logger="streamshards")
    shared.caplog = caplog
    yield shared
    shared.proxy.script = by_key("", ())


def begin(world: World) -> None:
    world.proxy.forget()
    world.events.clear()
    world.caplog.clear()


def check_samples(world: World, samples: list[dict[str, Any]], *, lost: int | None = None) -> None:
    """Check every sample, bit for bit, and its place; those of shard *lost* are refilled with others."""
    got = [s["id"] for s in samples]
    assert len(got) == NUM_SAMPLES
    for number, s in zip(got, samples, strict=True):
        assert_same(s, sample(number))
    gone = set() if lost is None else world.ids_of[lost]
    assert not gone & set(got)
    assert [a for a, b in zip(got, world.expected, strict=True) if b not in gone] == [
        b for b in world.expected if b not in gone
    ]


def check_retries(world: World, key: str, retries: int, cause: str) -> None:
    """Check that the failed attempts on *key*, and they alone, were told, in order, with their cause."""
    assert [event.url for event in world.retried] == [f"{URL}/{key}"] * retries
    assert [event.attempt for event in world.retried] == list(range(1, retries + 1))
    assert all(cause in event.cause for event in world.retried), world.retried


def set_chance_stalls_aside(world: World, key: str) -> int:
    """Return the retries on *key*; those on others must be stalls, which a busy machine has by itself at 0.3 s."""
    others = [event for event in world.retried if event.url != f"{URL}/{key}"]
    assert all("stalled" in event.cause for event in others), others
    world.events[:] = [event for event in world.events if event not in others]
    return len(world.retried)


def run(world: World, row: Row, position: str, policy: str) -> list[dict[str, Any]]:
    if position != "index":
        world.opened(policy, row.retry)  # before the fault
    begin(world)
    faults = row.fault if row.times is None else [row.fault] * row.times
    world.proxy.script = by_key(f"*/{world.key_at(position)}", faults)

    def read() -> list[dict[str, Any]]:
        return list(world.open(policy, row.retry) if position == "index" else world.opened(policy, row.retry))

    return watched(read)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row.name)
def test_fault(world: World, caplog: pytest.LogCaptureFixture, row: Row, position: str, policy: str) -> None:
    """Each cell of the table: exactly the right samples, one shard refilled and told of, or a typed error with url."""
    outcome = row.index if position == "index" else row.shard
    key = world.key_at(position)
    if isinstance(outcome, Right):
        check_samples(world, run(world, row, position, policy))
        told = len(world.retried)
        retries = outcome.retries if row.is_exact else set_chance_stalls_aside(world, key)
        assert retries >= 1
        check_retries(world, key, retries, outcome.cause)
        assert sum(request.fault is not None for request in world.proxy.requests) == row.times
        assert world.skipped == []
        assert len(caplog.records) == told
    elif isinstance(outcome, Lost) and policy == "skip":
        shard = world.shard_at(position)
        check_samples(world, run(world, row, position, policy), lost=shard)
        check_retries(world, key, outcome.retries, "")
        (event,) = world.skipped
        assert (event.url, event.shard, event.rows) == (f"{URL}/{key}", shard, len(world.ids_of[shard]))
        assert outcome.cause in event.cause
        (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert f"{URL}/{key}" in line
        assert outcome.cause in line
    else:
        with pytest.raises(StreamShardsError, match=rf"(?s){outcome.cause}") as caught:
            run(world, row, position, policy)
        assert type(caught.value) is outcome.error
        assert URL in str(caught.value)
        assert position == "index" or key in str(caught.value)
        assert world.skipped == []
        if isinstance(outcome, Lost):
            check_retries(world, key, outcome.retries, "")


# -- what takes more than one fault ------------------------------------------------------------------------------------


def test_an_outage_is_waited_out(world: World) -> None:
    """The endpoint is gone for a second from the middle shard's request on: no sample is lost, skipped or moved."""
    dataset = world.opened("skip", RETRY)
    begin(world)
    outages: list[threading.Thread] = []

    def script(request: Request) -> None:
        if request.key.endswith(world.key_at("middle")) and not outages:
            outages.append(world.proxy.down_for(1.0))

    world.proxy.script = script
    check_samples(world, watched(lambda: list(dataset)))
    assert world.retried
    assert world.skipped == []
    watched(outages[0].join)


def test_a_dying_store_is_not_hammered(world: World) -> None:
    """From 16 failures in a row on one thread asks at a time; once the store is back all shards come, none skipped."""
    dataset = world.opened("skip", RETRY)
    begin(world)
    asked = itertools.count()
    world.proxy.script = lambda _: SLOW_DOWN if next(asked) < 40 else None
    check_samples(world, watched(lambda: list(dataset)))
    assert world.skipped == []
    assert len(world.retried) == 40


def test_expired_credentials_are_read_anew(
    world: World, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They expire in the middle of an epoch: the credential process is asked once more, and no sample is lost."""
    server = world.proxy.server
    calls, answer, program = tmp_path / "calls", tmp_path / "answer", tmp_path / "program"
    answer.write_text(
        json.dumps({"Version": 1, "AccessKeyId": server.access_key, "SecretAccessKey": server.secret_key})
    )
    program.write_text(f"#!/bin/sh\necho called >> {calls}\ncat {answer}\n")
    program.chmod(0o700)
    config = tmp_path / "config"
    config.write_text(f"[profile rotating]\ncredential_process = {program}\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    options = {"profile": "rotating", "endpoint_url": server.endpoint_url}
    dataset = StreamingDataset(URL, shuffle=True, seed=3, order=ORDER, storage_options=options)
    first_calls = calls.read_text().count("called")
    begin(world)
    world.proxy.script = lambda _: EXPIRED_TOKEN if calls.read_text().count("called") == first_calls else None
    check_samples(world, watched(lambda: list(dataset)))
    assert any("credentials have expired" in line for line in caplog.messages)


def test_credentials_that_we_were_given_are_not_tried_twice(world: World) -> None:
    """A key in storage_options stays the same however often it is read: one request, then AccessDenied."""
    begin(world)
    world.proxy.script = by_key("*", EXPIRED_TOKEN)
    with pytest.raises(AccessDenied):
        watched(lambda: world.open("skip", RETRY))
    assert world.proxy.gets() == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replaced_dataset_is_noticed(world: World, policy: str) -> None:
    """Under either policy the epoch ends with the word "replaced" and both fingerprints; no shard counts as skipped."""
    url, options = f"s3://{BUCKET}/replaced-{policy}", world.proxy.server.storage_options
    write(url, range(NUM_SAMPLES), shard_bytes=2_000, storage_options=options)
    begin(world)
    dataset = StreamingDataset(
        url, on_corrupt=policy, max_corrupt=1.0, retry=RETRY, storage_options=options, observer=world.events.append
    )
    write(url, range(1000, 1030), shard_bytes=2_000, mode="replace", storage_options=options)
    store = open_store(url, options)
    for name in dataset.index.names:
        store.delete(name)
    with pytest.raises(DatasetReplaced, match=f"{url}/.*replaced.*{dataset.index.fingerprint}"):
        watched(lambda: list(dataset))
    assert world.skipped == []


@pytest.mark.parametrize("policy", POLICIES)
def test_a_deleted_dataset_is_noticed(world: World, policy: str) -> None:
    """Shards and index are gone: under either policy the epoch ends with the words "is gone"; nothing is skipped."""
    url, options = f"s3://{BUCKET}/deleted-{policy}", world.proxy.server.storage_options
    write(url, range(NUM_SAMPLES), shard_bytes=2_000, storage_options=options)
    begin(world)
    dataset = StreamingDataset(
        url, on_corrupt=policy, max_corrupt=1.0, retry=RETRY, storage_options=options, observer=world.events.append
    )
    store = open_store(url, options)
    for name, _ in store.list():
        store.delete(name)
    with pytest.raises(StoreError, match=f"{url}/.*: the dataset is gone: index.json is no longer there") as caught:
        watched(lambda: list(dataset))
    assert type(caught.value) is StoreError
    assert world.skipped == []


# -- nobody answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options"),
    [
        (URL, {"key": "a", "secret": "b", "endpoint_url": "http://nowhere.invalid:9000"}),
        (URL, {"key": "a", "secret": "b", "endpoint_url": "http://127.0.0.1:1"}),
        ("http://nowhere.invalid/train", None),
        ("http://127.0.0.1:1/train", None),
    ],
    ids=["S3, no such host", "S3, refused", "http, no such host", "http, refused"],
)
def test_an_endpoint_that_is_not_there(world: World, url: str, options: dict[str, Any] | None) -> None:
    """No such host, or nobody who listens: retries, then StoreUnavailable, not "no dataset"."""
    retry = RetryOptions(first_contact_s=3)
    with pytest.raises(StoreUnavailable, match=f"{url}/index.json: gave up after [0-9]+ attempts") as caught:
        watched(lambda: StreamingDataset(url, retry=retry, storage_options=options, observer=world.events.append))
    assert "onnect" in str(caught.value)


def test_eight_sources_ask_a_dead_endpoint_like_one(world: World) -> None:
    """8 datasets of 8 threads each in one process: past the requests under way, one backoff is all that the store sees.

    64 requests may be under way when it dies, 16 more fail before that counts, and 2.5 s of waits of up to 0.5 s are
    ten probes or so: 79 requests were seen. With a circuit for each reader it were 189.
    """
    url, options = f"s3://{BUCKET}/eight", OPTIONS | world.proxy.server.storage_options
    write(url, range(160), shard_bytes=2_000, storage_options=options)
    retry = replace(RETRY, deadline_s=2.5, base_s=0.05, max_wait_s=0.5)
    prefetch = PrefetchOptions(threads=8)
    datasets = [StreamingDataset(url, retry=retry, storage_options=options, prefetch=prefetch) for _ in range(8)]
    assert all(len(dataset.index.names) >= 8 for dataset in datasets)
    begin(world)
    world.proxy.script = by_key("*.pt.zst", SLOW_DOWN)
    errors: list[BaseException] = []

    def read(dataset: StreamingDataset) -> None:
        try:
            list(dataset)
        except StoreUnavailable as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(dataset,), daemon=True) for dataset in datasets]
    for thread in threads:
        thread.start()
    watched(lambda: join_all(threads))
    assert len(errors) == 8
    assert world.proxy.gets() <= 64 + 16 + 40


# -- a second request --------------------------------------------------------------------------------------------------


def hedged(world: World) -> StreamingDataset:
    """Return a dataset that may make second requests, its budget earned in an epoch without faults."""
    dataset = world.open("raise", replace(RETRY, hedge_s=0.2))
    dataset._kept_circuit = circuit_of(dataset._store, dataset._clock)  # type: ignore[attr-defined]  # the budget is kept with it
    while dataset._kept_circuit._saved_hedges < 1:  # type: ignore[attr-defined]  # ours
        check_samples(world, watched(lambda: list(dataset)))
        dataset.set_epoch(0)
    return dataset


def test_a_late_shard_is_brought_by_a_second_request(world: World) -> None:
    """The first request for a shard never ends; the second, on another connection, brings it; one event, no retry."""
    dataset = hedged(world)
    begin(world)
    before = dataset.stats()["hedges"]
    key = world.key_at("middle")
    until = threading.Event()
    world.proxy.script = by_key(f"*/{key}", [Block(until)])
    try:
        check_samples(world, watched(lambda: list(dataset)))
    finally:
        until.set()
    assert FetchHedged(f"{URL}/{key}", 0.2, is_won=True) in world.events
    assert world.retried == []
    assert world.proxy.gets(f"*/{key}") == 2
    assert dataset.stats()["hedges"] > before


@pytest.mark.parametrize("second", [SLOW_DOWN, Stall()], ids=["fails", "hangs"])
def test_a_second_request_that_comes_to_nothing_does_no_harm(world: World, second: Fault) -> None:
    """The first one's answer counts, however late it is; the second is called off."""
    dataset = hedged(world)
    begin(world)
    key = world.key_at("middle")
    world.proxy.script = by_key(f"*/{key}", [Late(1.0), second])
    check_samples(world, watched(lambda: list(dataset)))
    assert FetchHedged(f"{URL}/{key}", 0.2, is_won=False) in world.events
    assert world.retried == []


def test_an_appended_dataset_is_not_replaced(world: World) -> None:
    """A shard lost after others were appended is a lost shard: refilled, told once."""
    url, options = f"s3://{BUCKET}/appended", world.proxy.server.storage_options
    write(url, range(NUM_SAMPLES), shard_bytes=2_000, storage_options=options)
    begin(world)
    dataset = StreamingDataset(url, max_corrupt=0.5, retry=RETRY, storage_options=options, observer=world.events.append)
    write(url, range(NUM_SAMPLES, 60), mode="append", storage_options=options)
    open_store(url, options).delete(dataset.index.names[1])
    got = [s["id"] for s in watched(lambda: list(dataset))]
    assert len(got) == NUM_SAMPLES
    assert [event.shard for event in world.skipped] == [1]


# -- the document ------------------------------------------------------------------------------------------------------


def test_the_document_is_up_to_date() -> None:
    """docs/failures.md is what ``python -m tests.make_failures`` writes."""
    from tests.make_failures import PLACE, document

    assert Path(PLACE).read_text(encoding="utf-8") == document()
