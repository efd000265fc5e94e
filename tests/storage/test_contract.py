"""What every store keeps, whatever it stands on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from streamshards.errors import ObjectExists, ObjectMissing, ObjectTooLarge, OptionInvalid, StoreError, StoreUnavailable
from streamshards.storage import Store, open_store
from streamshards.storage.local import LocalStore

if TYPE_CHECKING:
    from conftest import StoreUrl

TIMEOUT_S = 20.0
BAD_KEYS = ("", "/a", "a//b", "../a", "a/../b", "./a", "a/", "a\\b", "a\0b", "a\nb")


def _get(store: Store, key: str, max_bytes: int = 1 << 30) -> bytes:
    return store.get(key, timeout_s=TIMEOUT_S, max_bytes=max_bytes)


def _put(store: Store, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> None:
    store.put(key, data, timeout_s=TIMEOUT_S, if_absent=if_absent)


def _get_in_child(store: Store, answer: Connection) -> None:
    try:
        answer.send(_get(store, "a"))
    except BaseException as error:  # noqa: BLE001 - the parent asserts on it
        answer.send(repr(error))


def _ask_child(method: str, store: Store) -> object:
    """Return what a child process, started by *method*, gets from *store*."""
    context = multiprocessing.get_context(method)
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_get_in_child, args=(store, theirs))
    child.start()
    theirs.close()
    try:
        return mine.recv() if mine.poll(120) else "no answer"
    finally:
        child.kill()
        child.join()
        child.close()
        mine.close()


@pytest.fixture
def store(store_url: StoreUrl) -> Store:
    return open_store(store_url.url, store_url.storage_options)


class TestStore:
    def test_gives_back_what_was_put(self, store: Store) -> None:
        """Bytes come back as they went in, whatever the key's depth and the length."""
        for key, data in {"a": b"", "b/c.pt.zst": bytes(range(256)), "b/d e+é": b"x" * 3_000_000}.items():
            _put(store, key, data)
            assert _get(store, key) == data

    def test_takes_views(self, store: Store) -> None:
        """A memoryview of anything contiguous is as good as bytes."""
        _put(store, "a", memoryview(b"0123456789")[2:5])
        assert _get(store, "a") == b"234"

    def test_put_replaces(self, store: Store) -> None:
        """A second put is what is read from then on, shorter or longer."""
        for data in (b"long" * 1000, b"short", b"longer" * 1000):
            _put(store, "a/b", data)
            assert _get(store, "a/b") == data
        assert store.list() == [("a/b", 6000)]

    def test_list_is_recursive_sorted_and_fresh(self, store: Store) -> None:
        """Every object below is listed with its size, also one that came or went after the last listing."""
        assert store.list() == []
        _put(store, "b", b"22")
        _put(store, "parts/y/1", b"1")
        assert store.list() == [("b", 2), ("parts/y/1", 1)]
        _put(store, "a", b"333")
        _put(store, "parts/x", b"4444")
        assert store.list() == [("a", 3), ("b", 2), ("parts/x", 4), ("parts/y/1", 1)]
        store.delete("b")
        assert [key for key, _ in store.list()] == ["a", "parts/x", "parts/y/1"]

    def test_list_takes_a_prefix(self, store: Store) -> None:
        """A prefix is the beginning of the key, folder or not."""
        for key in ("parts/1", "parts/12", "parts2/1", "index.json"):
            _put(store, key, b"x")
        assert [key for key, _ in store.list("parts/")] == ["parts/1", "parts/12"]
        assert [key for key, _ in store.list("parts/1")] == ["parts/1", "parts/12"]
        assert [key for key, _ in store.list("part")] == ["parts/1", "parts/12", "parts2/1"]
        assert store.list("none/") == []

    def test_list_does_not_see_its_neighbours(self, store_url: StoreUrl) -> None:
        """A store whose url merely starts with ours is another store."""
        _put(open_store(f"{store_url.url}/train", store_url.storage_options), "a", b"1")
        _put(open_store(f"{store_url.url}/train2", store_url.storage_options), "b", b"1")
        assert open_store(f"{store_url.url}/train", store_url.storage_options).list() == [("a", 1)]

    def test_more_than_a_page(self, store: Store) -> None:
        """A listing goes on after the 1,000 keys that S3 puts in one answer."""
        keys = [f"{number:04d}" for number in range(1_010)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: _put(store, key, b""), keys))
        assert [key for key, _ in store.list()] == keys

    def test_delete(self, store: Store) -> None:
        """A deleted object is missing; deleting it again is no error."""
        _put(store, "a", b"1")
        store.delete("a")
        store.delete("a")
        store.delete("never/was")
        with pytest.raises(ObjectMissing, match="a: get failed"):
            _get(store, "a")

    def test_missing(self, store: Store) -> None:
        """What is not there is missing, and so are folders and what would lie below an object."""
        _put(store, "folder/a", b"1")
        for key in ("b", "folder", "folder/b", "folder/a/b"):
            with pytest.raises(ObjectMissing) as caught:
                _get(store, key)
            assert store.url in str(caught.value)
            assert key in str(caught.value)

    def test_max_bytes(self, store: Store) -> None:
        """An object longer than expected is refused, and the error is not one to be retried."""
        _put(store, "a", b"12345")
        assert _get(store, "a", max_bytes=5) == b"12345"
        with pytest.raises(ObjectTooLarge, match="5 bytes") as caught:
            _get(store, "a", max_bytes=4)
        assert not caught.value.transient

    def test_a_range(self, store: Store) -> None:
        """The bytes from start to stop, small or large; what lies beyond the end is left out."""
        data = bytes(range(256)) * 20_000
        _put(store, "a", data)
        for start, stop in (
            (0, 1),
            (7, 300),
            (1_000, 4_000_000),
            (len(data) - 5, len(data)),
            (len(data) - 5, len(data) + 9),
        ):
            assert store.get_range("a", start, stop, timeout_s=TIMEOUT_S) == data[start:stop]
        for key in ("b", "a/b"):
            with pytest.raises(ObjectMissing, match=f"{key}: get failed"):
                store.get_range(key, 0, 1, timeout_s=TIMEOUT_S)
        with pytest.raises(OptionInvalid, match="is not a key"):
            store.get_range("../a", 0, 1, timeout_s=TIMEOUT_S)

    def test_a_range_beyond_the_end_is_nothing_or_an_error(self, store: Store) -> None:
        """And never other bytes; none that would be worth a retry."""
        _put(store, "a", b"12345")
        try:
            data = store.get_range("a", 5, 9, timeout_s=TIMEOUT_S)
        except StoreError as error:
            data = b"worth a retry" if error.transient else b""
        assert data == b""

    def test_if_absent(self, store: Store) -> None:
        """Of two puts that want to be first, the second is told so, and the first one's object stays."""
        _put(store, "a", b"first", if_absent=True)
        with pytest.raises(ObjectExists):
            _put(store, "a", b"second", if_absent=True)
        assert _get(store, "a") == b"first"
        assert store.list() == [("a", 5)]

    def test_if_absent_has_one_winner(self, store: Store, request: pytest.FixtureRequest) -> None:
        """Of many at once exactly one is first, on every store that can tell."""
        if "juicefs" in request.node.name:
            pytest.skip("JuiceFS ignores If-None-Match, so two writers at the same instant both win")
        together = threading.Barrier(8)

        def is_first(number: int) -> bool:
            together.wait()
            try:
                _put(store, "a", str(number).encode(), if_absent=True)
            except ObjectExists:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            wins = list(pool.map(is_first, range(8)))
        assert wins.count(True) == 1
        assert _get(store, "a") == str(wins.index(True)).encode()

    def test_readers_see_whole_objects(self, store: Store) -> None:
        """While an object is replaced again and again, every read is one version, whole, or a "try again"."""
        versions = [bytes([number]) * 200_000 for number in range(4)]
        _put(store, "a", versions[0])
        done = threading.Event()

        def read() -> set[bytes]:
            seen = {_get(store, "a")}
            while not done.is_set():
                with contextlib.suppress(StoreUnavailable):  # JuiceFS: a 500 for what was replaced while being read
                    seen.add(_get(store, "a"))
            return seen

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                for number in range(20):
                    _put(store, "a", versions[number % 4])
            finally:
                done.set()
            assert all(reader.result() <= set(versions) for reader in readers)

    def test_concurrent_gets(self, store: Store) -> None:
        """Threads share a store, also for its very first request."""
        objects = {f"{number}": os.urandom(10_000) for number in range(16)}
        for key, data in objects.items():
            _put(store, key, data)
        fresh: Store = pickle.loads(pickle.dumps(store))
        with ThreadPoolExecutor(8) as pool:
            assert dict(zip(objects, pool.map(lambda key: _get(fresh, key), objects), strict=True)) == objects

    def test_pickles(self, store: Store) -> None:
        """A pickled store that was in use opens what it needs anew."""
        _put(store, "a", b"1")
        copy: Store = pickle.loads(pickle.dumps(store))
        assert copy.url == store.url
        assert _get(copy, "a") == b"1"

    @pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python ≥ 3.12 on any fork
    def test_children(self, store: Store, method: str, request: pytest.FixtureRequest) -> None:
        """A store that was used in the parent works in its children, and then again in the parent."""
        if method not in multiprocessing.get_all_start_methods():
            pytest.skip(f"this system has no {method}")
        if method != "fork" and "memory" in request.node.name:
            pytest.skip("memory:// is the memory of one process and its forks")
        _put(store, "a", b"from the parent")
        assert _ask_child(method, store) == b"from the parent"
        assert _get(store, "a") == b"from the parent"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python ≥ 3.12 on any fork
    def test_forks_in_the_middle_of_reads(self, store: Store) -> None:
        """Children forked while the parent's threads are opening and reading never hang."""
        _put(store, "a", b"from the parent" * 10_000)
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                _get(pickle.loads(pickle.dumps(store)), "a")
                _get(store, "a")

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                answers = [_ask_child("fork", store) for _ in range(5)]
            finally:
                done.set()
            for reader in readers:
                reader.result()
        assert answers == [b"from the parent" * 10_000] * 5

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_keys_stay_inside(self, store: Store, key: str) -> None:
        """A key that is absolute, climbs or is otherwise odd is refused by every method."""
        for action in (lambda: _get(store, key), lambda: _put(store, key, b""), lambda: store.delete(key)):
            with pytest.raises(OptionInvalid, match="is not a key"):
                action()

    def test_repr_is_the_url(self, store: Store) -> None:
        """A store shows where it is."""
        assert store.url in repr(store)


class TestLocalStore:
    def test_a_failed_put_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the disk fails in the middle of a put, the old object stays and no temporary file remains."""
        store = LocalStore(tmp_path)
        _put(store, "a", b"old")

        def fail(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError, match="make room"):
            _put(store, "a", b"new")
        with pytest.raises(StoreError, match="make room"):
            _put(store, "b", b"new", if_absent=True)
        assert os.listdir(tmp_path) == ["a"]
        assert _get(store, "a") == b"old"

    def test_unfinished_files_are_not_objects(self, tmp_path: Path) -> None:
        """What a killed writer leaves behind is not listed."""
        _put(LocalStore(tmp_path), "a", b"1")
        (tmp_path / ".streamshards-abc.unfinished").write_bytes(b"1")
        assert LocalStore(tmp_path).list() == [("a", 1)]

    def test_is_readable_for_others(self, tmp_path: Path) -> None:
        """Objects have the mode that the umask gives to ordinary files."""
        (tmp_path / "ordinary").write_bytes(b"")
        _put(LocalStore(tmp_path), "a", b"1")
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode

    def test_means_the_same_place_after_chdir(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A relative path is made absolute at once."""
        monkeypatch.chdir(tmp_path)
        store = open_store("data")
        _put(store, "a", b"1")
        monkeypatch.chdir("/")
        assert store.url == str(tmp_path / "data")
        assert _get(store, "a") == b"1"

    def test_urls_of_one_place(self, tmp_path: Path) -> None:
        """A path, the same path as ``file://`` and a PathLike are one store."""
        urls = {open_store(url).url for url in (tmp_path, str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}")}
        assert urls == {str(tmp_path)}

    def test_a_pipe_is_no_object(self, tmp_path: Path) -> None:
        """A named pipe is missing, and reading it does not hang."""
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ObjectMissing):
            _get(LocalStore(tmp_path), "pipe")
        assert LocalStore(tmp_path).list() == []
