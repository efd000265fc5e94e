"""Which index is current, through every crash, race and lost answer."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.engine import catalog
from streamshards.engine.catalog import HAND_MADE_KEY, INDEX_KEY, PLAIN_BYTES, Catalog, load_index, save_index
from streamshards.engine.retry import Cancelled
from streamshards.errors import AccessDenied, IndexInvalid, ObjectExists, StoreUnavailable
from streamshards.events import FetchRetried
from streamshards.options import RetryOptions
from streamshards.plan.index import Index
from streamshards.shard.frames import deflate
from streamshards.storage import Store, open_store
from streamshards.testing import FakeClock, Fault, FaultyStore, FlipBit, MemoryStore, Truncate

SMALL: Final = 3
LARGE: Final = 10
LIMIT: Final = 700
"""``PLAIN_BYTES`` of most tests: three shards stay plain, ten don't."""


def make_index(num_shards: int, tag: str) -> Index:
    numbers = np.arange(num_shards, dtype=np.int64)
    return Index(
        schema={"fields": [], "empty": []},
        names=[f"{tag}-{number:06d}.pt.zst" for number in range(num_shards)],
        rows=numbers + 1,
        sizes=numbers + 100,
        raw_sizes=numbers + 1000,
        digests=[f"{number:032x}" for number in range(num_shards)],
    )


def open_catalog(store: Store, *, deadline_s: float = 60.0) -> Catalog:
    return Catalog(
        store=store,
        retry=RetryOptions(),
        deadline_s=deadline_s,
        clock=FakeClock(),
        cancelled=threading.Event(),
        on_retry=lambda _: None,
    )


def current(store: Store) -> Index | None:
    found = open_catalog(store).find()
    return None if found is None else found.index


def fingerprint(index: Index | None) -> str | None:
    return None if index is None else index.fingerprint


class Crash(BaseException):
    """The process ends here."""


def _nothing(moment: str, key: str) -> None: ...


class HookedStore(MemoryStore):
    """Calls a hook before and after each request: ``hook("before put", key)``; it may raise, or change the store."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        super().__init__(objects)
        self.hook: Callable[[str, str], None] = _nothing
        self.gets: list[str] = []

    def get(self, key: str, *, timeout_s: float, max_bytes: int) -> bytes:
        self.gets.append(key)
        self.hook("before get", key)
        data = super().get(key, timeout_s=timeout_s, max_bytes=max_bytes)
        self.hook("after get", key)
        return data

    def put(self, key: str, data: bytes | memoryview, *, timeout_s: float, if_absent: bool = False) -> None:
        self.hook("before put", key)
        super().put(key, data, timeout_s=timeout_s, if_absent=if_absent)
        self.hook("after put", key)

    def delete(self, key: str, **how: Any) -> None:
        self.hook("before delete", key)
        super().delete(key, **how)
        self.hook("after delete", key)


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "PLAIN_BYTES", LIMIT)


def start(kind: str) -> tuple[dict[str, bytes], Index | None]:
    """Return a store's objects with an old index of some kind in it."""
    if kind == "none":
        return {}, None
    old = make_index(LARGE if kind == "large" else SMALL, "old")
    if kind == "hand-made":
        return {HAND_MADE_KEY: deflate(old.dump())}, old
    store = MemoryStore()
    open_catalog(store).replace(old, base=None)
    return store.objects, old


KINDS: Final = ("none", "small", "large", "hand-made")


@pytest.mark.parametrize(("size", "requests"), [(SMALL, 1), (LARGE, 2)])
def test_an_index_comes_back_in_one_request_or_two(size: int, requests: int) -> None:
    """A small index is one plain object and one request; a large one has a part beside it and takes two."""
    store, index = HookedStore(), make_index(size, "a")
    open_catalog(store).replace(index, base=None)
    store.gets.clear()
    assert fingerprint(current(store)) == index.fingerprint
    assert len(store.gets) == requests
    assert len(store.objects) == requests
    assert json.loads(store.objects[INDEX_KEY])["fingerprint"] == index.fingerprint


def test_it_holds_on_every_store(store_url: Any) -> None:
    """Created, replaced by a large one, replaced by a small one: on disks, in memory, on two S3 servers."""
    store = open_store(store_url.url, store_url.storage_options)
    old = None
    for size, tag in ((SMALL, "a"), (LARGE, "b"), (LARGE, "c"), (SMALL, "d")):
        new = make_index(size, tag)
        open_catalog(store).replace(new, base=old)
        assert fingerprint(current(store)) == new.fingerprint
        assert len(store.list()) == (1 if size == SMALL else 2)
        with pytest.raises(ObjectExists, match="another writer committed"):
            open_catalog(store).replace(make_index(1, "late"), base=old)
        assert fingerprint(current(store)) == new.fingerprint
        old = new


def test_a_real_large_index_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the documented threshold the JSON moves into a compressed part that is less than half as large."""
    monkeypatch.setattr(catalog, "PLAIN_BYTES", PLAIN_BYTES)
    store = MemoryStore()
    rng = np.random.Generator(np.random.Philox(1))
    index = make_index(60_000, "0123456789ab")
    index = Index(
        **{name: getattr(index, name) for name in ("schema", "names", "rows", "sizes", "raw_sizes")},
        digests=[rng.bytes(16).hex() for _ in range(60_000)],
    )
    assert len(index.dump()) > PLAIN_BYTES
    open_catalog(store).replace(index, base=None)
    assert len(store.objects[f"index-{index.fingerprint}.json.zst"]) < len(index.dump()) / 2
    assert len(store.objects[INDEX_KEY]) < 4096
    assert fingerprint(current(store)) == index.fingerprint


@pytest.mark.parametrize(("kind", "size"), list(itertools.product(KINDS, (SMALL, LARGE))))
def test_every_crash_point_leaves_the_old_or_the_new(kind: str, size: int) -> None:
    """However far a commit came, a reader sees the whole old index or the whole new one, and the next commit works."""
    _, old = start(kind)
    new, outcomes, step = make_index(size, "new"), [], 0
    while True:
        store, moments = HookedStore(start(kind)[0]), itertools.count()

        def crash(moment: str, key: str, stop: int = step, moments: Any = moments) -> None:
            if not moment.endswith("get") and next(moments) == stop:
                raise Crash(moment, key)

        store.hook = crash
        try:
            open_catalog(store).replace(new, base=old)
            is_done = True
        except Crash:
            is_done = False
        store.hook = _nothing
        outcomes.append(fingerprint(current(store)))
        again = make_index(SMALL, "again")
        open_catalog(store).replace(again, base=current(store))
        assert fingerprint(current(store)) == again.fingerprint
        if is_done:
            break
        step += 1
    turn = outcomes.index(new.fingerprint)
    assert turn > 0
    assert outcomes == [fingerprint(old)] * turn + [new.fingerprint] * (len(outcomes) - turn)


@pytest.mark.parametrize(("kind", "size"), list(itertools.product(KINDS, (SMALL, LARGE))))
def test_a_commit_leaves_nothing_of_the_old(kind: str, size: int) -> None:
    """After an undisturbed commit the store holds the new index only."""
    objects, old = start(kind)
    store, new = MemoryStore(objects), make_index(size, "new")
    open_catalog(store).replace(new, base=old)
    part = {f"index-{new.fingerprint}.json.zst"} if size == LARGE else set()
    assert set(store.objects) == {INDEX_KEY} | part


@pytest.mark.parametrize("kind", ["large", "hand-made"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("request_number", range(3))
def test_a_reader_in_the_middle_of_a_commit_finds_one(kind: str, size: int, request_number: int) -> None:
    """A commit between any two requests of a reader, clean-up included, does not confuse it."""
    objects, old = start(kind)
    store, new, requests = HookedStore(objects), make_index(size, "new"), itertools.count()

    def commit(moment: str, key: str) -> None:
        if moment == "before get" and next(requests) == request_number:
            store.hook = _nothing
            open_catalog(store).replace(new, base=old)

    store.hook = commit
    assert fingerprint(current(store)) in {fingerprint(old), new.fingerprint}


def test_a_first_commit_lost_to_another_is_refused() -> None:
    """Another writer's index that appears between our look and our put stays, and we hear of it."""
    store, other = HookedStore(), make_index(2, "other")

    def cut_in(moment: str, key: str) -> None:
        if moment == "before put" and key == INDEX_KEY:
            store.objects[INDEX_KEY] = other.dump()

    store.hook = cut_in
    with pytest.raises(ObjectExists, match=r"another writer committed in the meantime: 3 samples"):
        open_catalog(store).replace(make_index(LARGE, "ours"), base=None)
    store.hook = _nothing
    assert fingerprint(current(store)) == other.fingerprint
    assert set(store.objects) == {INDEX_KEY}


def test_a_base_that_is_gone_is_told() -> None:
    """Appending to a dataset that was deleted in between is refused."""
    with pytest.raises(ObjectExists, match="is gone"):
        open_catalog(MemoryStore()).replace(make_index(2, "new"), base=make_index(1, "old"))


@pytest.mark.parametrize("kind", ["none", "small"])
def test_a_lost_answer_is_no_failure(kind: str) -> None:
    """A put that arrived although its answer did not counts: also when trying again says that the index exists."""
    objects, old = start(kind)
    store, new, answers = HookedStore(objects), make_index(SMALL, "new"), itertools.count()

    def lose(moment: str, key: str) -> None:
        if moment == "after put" and next(answers) == 0:
            raise StoreUnavailable("the answer was lost")

    store.hook = lose
    open_catalog(store).replace(new, base=old)
    assert fingerprint(current(store)) == new.fingerprint


def test_an_unknown_outcome_is_said_to_be_unknown() -> None:
    """When no attempt was answered the error is transient, even if the last one was refused for another reason."""
    for last in (StoreUnavailable("silence"), AccessDenied("token expired")):
        store, attempts = HookedStore(), itertools.count()

        def fail(moment: str, key: str, last: Exception = last, attempts: Any = attempts) -> None:
            if moment == "before put":
                raise StoreUnavailable("silence") if next(attempts) == 0 else last

        store.hook = fail
        with pytest.raises(StoreUnavailable, match="whether the new index was stored is unknown"):
            open_catalog(store).replace(make_index(1, "new"), base=None)


def test_a_refused_commit_takes_its_part_back() -> None:
    """A large index whose pointer is refused leaves no part behind, and the old index as it was."""
    objects, old = start("small")
    store = HookedStore(objects)

    def refuse(moment: str, key: str) -> None:
        if moment == "before put" and key == INDEX_KEY:
            raise AccessDenied("read only")

    store.hook = refuse
    with pytest.raises(AccessDenied):
        open_catalog(store).replace(make_index(LARGE, "new"), base=old)
    assert set(store.objects) == {INDEX_KEY}
    assert fingerprint(current(store)) == fingerprint(old)


def test_a_clean_up_that_fails_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The commit stands when the old part cannot be deleted."""
    objects, old = start("large")
    store, new = HookedStore(objects), make_index(SMALL, "new")

    def refuse(moment: str, key: str) -> None:
        if moment == "before delete":
            raise AccessDenied("no DeleteObject for you")

    store.hook = refuse
    with caplog.at_level(logging.WARNING, "streamshards"):
        open_catalog(store).replace(new, base=old)
    assert "not deleted" in caplog.text
    assert fingerprint(current(store)) == new.fingerprint


def test_a_clean_up_waits_out_an_outage() -> None:
    """A delete is tried again like everything else, with the time that it may take."""
    objects, old = start("large")
    store, failures = HookedStore(objects), itertools.count()

    def fail(moment: str, key: str) -> None:
        if moment == "before delete" and next(failures) < 3:
            raise StoreUnavailable("down")

    store.hook = fail
    open_catalog(store).replace(make_index(SMALL, "new"), base=old)
    assert set(store.objects) == {INDEX_KEY}


def test_unchecked_replaces_what_cannot_be_read() -> None:
    """A damaged index blocks a checked commit and not an unchecked one."""
    store, new = MemoryStore({INDEX_KEY: b"{"}), make_index(1, "new")
    with pytest.raises(IndexInvalid):
        open_catalog(store).replace(new, base=None)
    open_catalog(store).replace(new, base=None, checked=False)
    assert fingerprint(current(store)) == new.fingerprint


def pointer(**changes: Any) -> bytes:
    content = {"format": "streamshards", "version": 1, "index": f"index-{'0' * 32}.json.zst", **changes}
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("objects", "match"),
    [
        ({INDEX_KEY: pointer(index="../../etc/passwd")}, "points at"),
        ({INDEX_KEY: pointer(index=7)}, "points at"),
        ({INDEX_KEY: pointer()}, "which is missing"),
        ({INDEX_KEY: pointer(version=2)}, "upgrade"),
        ({INDEX_KEY: pointer(), f"index-{'0' * 32}.json.zst": deflate(make_index(1, "a").dump())}, "promises another"),
        ({INDEX_KEY: pointer(), f"index-{'0' * 32}.json.zst": b"no zstd"}, "rebuild"),
        ({HAND_MADE_KEY: deflate(make_index(1, "a").dump())[:-9]}, "rebuild"),
        ({INDEX_KEY: b"[" * 4000}, "JSON"),
        ({INDEX_KEY: b"{}"}, "not a streamshards index"),
    ],
    ids=str,
)
def test_damaged_and_hostile_indexes_are_refused(objects: dict[str, bytes], match: str) -> None:
    """Nothing outside the dataset is asked for, and the error says what is wrong."""
    store = HookedStore(objects)
    with pytest.raises(IndexInvalid, match=match):
        open_catalog(store).find()
    assert {key for key in store.gets if ".." in key} == set()


# -- a bad index is looked at again ------------------------------------------------------------------------------------


def flips(*numbers: int) -> Callable[[str, int], FlipBit | None]:
    """Return a script that flips a bit of the first requests for the index, each another one."""
    bits = dict(enumerate(numbers))
    return lambda key, number: FlipBit(bits[number]) if key == INDEX_KEY and number in bits else None


def look(store: Store, **changes: Any) -> tuple[Index | None, list[FetchRetried], FakeClock]:
    """Return what a catalog finds, what it told, and its clock."""
    events: list[FetchRetried] = []
    retry, clock = RetryOptions(base_s=1, **changes), FakeClock()
    catalog = Catalog(store, retry, 60.0, clock, threading.Event(), events.append)
    found = catalog.find()
    return (None if found is None else found.index), events, clock


def test_a_bit_flipped_on_the_wire_costs_a_second_look() -> None:
    """The index comes in the end; each look at other wrong bytes is one event with url, number and cause."""
    index = make_index(SMALL, "a")
    store = FaultyStore(MemoryStore({INDEX_KEY: index.dump()}), flips(8 * 5, 8 * 400))
    found, events, clock = look(store)
    assert fingerprint(found) == index.fingerprint
    assert [(event.url, event.attempt, event.wait_s) for event in events] == [
        ("fake://store/index.json", 1, 1.0), ("fake://store/index.json", 2, 1.0),
    ]  # fmt: skip
    assert clock.waits == [1.0, 1.0]
    assert "not JSON" in events[0].cause or "index" in events[0].cause


def test_an_index_that_stays_bad_is_refused_after_corrupt_attempts() -> None:
    """Other wrong bytes each time: three looks, then IndexInvalid; with one attempt, one look."""
    data = make_index(SMALL, "a").dump()
    for attempts in (1, 2, 3):
        store = FaultyStore(MemoryStore({INDEX_KEY: data}), flips(*range(40, 80, 8)))
        with pytest.raises(IndexInvalid):
            look(store, corrupt_attempts=attempts)
        assert store.gets == [INDEX_KEY] * attempts


@pytest.mark.parametrize("fault", [FlipBit(40), Truncate(300), Truncate(0)], ids=str)
def test_the_same_wrong_bytes_twice_are_the_stores(fault: Fault) -> None:
    """What comes twice alike was not changed on the way: two looks, not ten."""
    store = FaultyStore(MemoryStore({INDEX_KEY: make_index(SMALL, "a").dump()}), lambda *_: fault)
    with pytest.raises(IndexInvalid):
        look(store, corrupt_attempts=10)
    assert store.gets == [INDEX_KEY] * 2


def test_a_bad_part_is_looked_at_again() -> None:
    """The compressed part of a large index, too: pointer and part are fetched anew."""
    store, index = MemoryStore(), make_index(LARGE, "a")
    open_catalog(store).replace(index, base=None)
    faulty = FaultyStore(store, lambda key, number: FlipBit(300) if key != INDEX_KEY and number == 0 else None)
    found, events, _ = look(faulty)
    assert fingerprint(found) == index.fingerprint
    assert len(events) == 1
    assert len(faulty.gets) == 4


def test_cancelling_ends_the_wait_for_a_second_look() -> None:
    """No further request once the owner has given up."""
    store, cancelled = MemoryStore({INDEX_KEY: b"{"}), threading.Event()
    clock = FakeClock(on_wait=lambda _: cancelled.set())
    with pytest.raises(Cancelled):
        Catalog(store, RetryOptions(), 60.0, clock, cancelled, lambda _: None).find()


OBJECTS: Final = {
    "small": {INDEX_KEY: make_index(SMALL, "old").dump()},
    "hand-made": {HAND_MADE_KEY: deflate(make_index(SMALL, "old").dump())},
}


@settings(deadline=None, max_examples=400)
@given(kind=st.sampled_from(["small", "large", "hand-made"]), data=st.data())
def test_no_changed_byte_makes_another_dataset(kind: str, data: st.DataObject) -> None:
    """One byte of an index replaced, left out or put in, anywhere, pointer and part included: refused, or the same."""
    objects = OBJECTS.get(kind) or large_objects()
    wanted = fingerprint(current(MemoryStore(objects)))
    key = data.draw(st.sampled_from(sorted(objects)))
    whole = objects[key]
    place, byte = data.draw(st.integers(0, len(whole) - 1)), bytes([data.draw(st.integers(0, 255))])
    change = data.draw(st.sampled_from(["replace", "leave out", "put in"]))
    rest = whole[place:] if change == "put in" else whole[place + 1 :]
    changed = whole[:place] + (b"" if change == "leave out" else byte) + rest
    try:
        found = current(MemoryStore({**objects, key: changed}))
    except IndexInvalid:
        return
    assert fingerprint(found) == wanted


@functools.cache
def large_objects() -> dict[str, bytes]:
    """Return the objects of a large index: a pointer and its part."""
    index = make_index(LARGE, "old")
    part = f"index-{index.fingerprint}.json.zst"
    return {INDEX_KEY: catalog._pointer(index, part), part: deflate(index.dump())}


def test_a_bomb_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed index is bounded by what it inflates to."""
    monkeypatch.setattr(catalog, "MAX_INDEX_BYTES", 1000)
    with pytest.raises(IndexInvalid, match="more than the 1,000 allowed"):
        open_catalog(MemoryStore({HAND_MADE_KEY: deflate(bytes(100_000))})).find()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], ["empty, or it does not exist", "streamshards pack SRC fake://store"]),
        (["a.pt", "b.pth", "c.pt.zst"], ["3 .pt files such as a.pt, b.pth", "streamshards index fake://store"]),
        (["README.md"], ["1 file such as README.md, none of them .pt"]),
        (["0123456789ab-000000.pt.zst"], ["1 shard such as 0123456789ab-000000.pt.zst", "still at work or was killed"]),
        (["train/index.json", "train/x.pt.zst", "val/index.json"], ["fake://store/train, fake://store/val"]),
    ],
)
def test_what_stands_there_instead_is_told(names: list[str], said: list[str]) -> None:
    """No dataset: the error says what was found, and the command that makes one."""
    store = MemoryStore(dict.fromkeys(names, b""))
    with pytest.raises(IndexInvalid) as caught:
        load(store)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("index.json", "this is the index of a dataset; pass the folder that it lies in: fake://store/train"),
        ("index.json.zst", "this is the index"),
        (f"index-{'0' * 32}.json.zst", "this is the index"),
        ("0123456789ab-000000.pt.zst", "this is a single file of a dataset; pass the folder .*: fake://store/train"),
        ("a.pt", "this is a single file"),
    ],
)
def test_a_url_that_names_a_file_is_told_so(name: str, said: str) -> None:
    """The url of the index or of a shard: the error names the folder, and nothing is listed."""
    with pytest.raises(IndexInvalid, match=said):
        load(MemoryStore(url=f"fake://store/train/{name}"))


def load(store: Store, clock: FakeClock | None = None) -> Index:
    return load_index(
        store,
        retry=RetryOptions(),
        clock=clock or FakeClock(),
        cancelled=threading.Event(),
        on_retry=lambda _: None,
    )


def test_a_wrong_endpoint_is_known_within_first_contact() -> None:
    """A store that never answers is given up after ``first_contact_s``, not after ``deadline_s``."""
    store, clock = HookedStore(), FakeClock()

    def fail(moment: str, key: str) -> None:
        raise StoreUnavailable("no route")

    store.hook = fail
    with pytest.raises(StoreUnavailable, match="no route"):
        load(store, clock)
    assert clock.now() <= RetryOptions().first_contact_s


def test_save_and_load(tmp_path: Path) -> None:
    """The two functions for the rest of the house."""
    store, index = open_store(tmp_path), make_index(LARGE, "a")
    save_index(
        store,
        index,
        base=None,
        retry=RetryOptions(),
        clock=FakeClock(),
        cancelled=threading.Event(),
        on_retry=lambda _: None,
    )
    assert load(store).fingerprint == index.fingerprint
