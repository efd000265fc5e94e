"""What a forked child inherits of a running dataset: refused with a clear error, or made right; never rows of both."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamshards import CacheOptions, StreamShardsError
from tests.datasets import ids
from tests.processes.sessions import HANGS_AFTER_S, make, make_dataset

pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")

HALF = 30


def _tell(channel: Any, job: Callable[[], Any]) -> None:
    try:
        channel.send(("returned", job()))
    except StreamShardsError as error:
        channel.send(("refused", str(error)))
    except BaseException as error:  # noqa: BLE001 -- told to the parent
        channel.send(("failed", repr(error)))


def in_child(job: Callable[[], Any], how: str) -> tuple[str, Any]:
    """Return what *job* did in a child that ``os.fork`` or multiprocessing's fork made of this process."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    if how == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=_tell, args=(theirs, job))
        process.start()
    elif (pid := os.fork()) == 0:
        try:
            _tell(theirs, job)
        finally:
            os._exit(0)
    try:
        assert ours.poll(HANGS_AFTER_S), "the child hangs"
        told: tuple[str, Any] = ours.recv()
    finally:
        if how == "multiprocessing":
            process.kill()
            process.join()
        else:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        ours.close()
        theirs.close()
    return told


forks = pytest.mark.parametrize("how", ["os.fork", "multiprocessing"])


@forks
def test_an_iterator_of_a_dataset_is_refused(url: str, epochs: list[list[list[int]]], how: str) -> None:
    """A half consumed iterator: the child's next raises and says what to do; the parent's pass is not disturbed."""
    iterator = iter(make_dataset(url))
    first = [next(iterator)["id"].tolist() for _ in range(HALF)]
    what, text = in_child(lambda: next(iterator), how)
    assert what == "refused", text
    assert "call iter() on the dataset again" in text
    assert first + ids(iterator) == epochs[0]


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iterator_of_a_loader_is_refused(
    url: str, epochs: list[list[list[int]]], num_workers: int, how: str
) -> None:
    """The same with workers; and the child may drop the iterator without ending its parent's workers."""
    loader = make(url, num_workers)
    held = [iter(loader)]
    first = [next(held[0])["id"].tolist() for _ in range(HALF)]

    def look_and_drop() -> None:
        try:
            next(held[0])
        finally:
            held.clear()

    what, text = in_child(look_and_drop, how)
    assert what == "refused", text
    assert "made in process" in text
    assert "call iter()" in text
    assert first + ids(held.pop()) == epochs[0]


@forks
@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_loader_begins_anew_in_the_child(
    url: str, epochs: list[list[list[int]]], num_workers: int, persistent: bool, how: str
) -> None:
    """A loader in the middle of an epoch here: in the child its next iteration is whole, as it would be here."""
    loader = make(url, num_workers, persistent_workers=persistent)
    iterator = iter(loader)
    first = [next(iterator)["id"].tolist() for _ in range(HALF)]
    state = loader.state_dict()
    assert in_child(lambda: (loader.state_dict(), ids(loader)), how) == ("returned", (state, epochs[1]))
    assert first + ids(iterator) == epochs[0]
    assert ids(loader) == epochs[1]


@forks
def test_a_dataset_begins_anew_in_the_child(url: str, epochs: list[list[list[int]]], how: str) -> None:
    """A dataset in the middle of a pass here: the child has epochs of its own, from the one that was said last."""
    dataset = make_dataset(url)
    iterator = iter(dataset)
    first = [next(iterator)["id"].tolist() for _ in range(HALF)]
    assert in_child(lambda: ids(dataset), how) == ("returned", epochs[0])
    assert first + ids(iterator) == epochs[0]
    assert ids(dataset) == epochs[1]


@forks
@pytest.mark.parametrize("mode", ["raw", "compressed"])
def test_an_open_cache_is_opened_anew_in_the_child(
    url: str, epochs: list[list[list[int]]], tmp_path: Path, mode: Any, how: str
) -> None:
    """A cache in use here: the child and the parent both go on with it, and read the same."""
    cache = CacheOptions(directory=str(tmp_path), mode=mode, keep_free_bytes=0)
    dataset = make_dataset(url, cache=cache)
    iterator = iter(dataset)
    first = [next(iterator)["id"].tolist() for _ in range(HALF)]
    one = dataset[3]["id"]
    assert in_child(lambda: (dataset[3]["id"], ids(dataset)), how) == ("returned", (one, epochs[0]))
    assert first + ids(iterator) == epochs[0]
