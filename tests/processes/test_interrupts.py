"""Ctrl-C in the middle of ``next``: the process ends with it, or goes on; nothing is left, and nothing is lost."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from streamshards import StreamShardsError
from tests.datasets import ids
from tests.processes.sessions import make, members, session

HELD_FROM = 5
"""Batches before the one that is never ready."""


class Held:
    """A transform that lets some batches through, and then holds one for ever, having told its pid."""

    def __init__(self, told: Connection) -> None:
        self.told = told
        self.is_open = False
        self.seen = 0

    def __call__(self, batch: Any) -> Any:
        self.seen += 1
        if self.seen > HELD_FROM and not self.is_open:
            self.told.send(os.getpid())
            threading.Event().wait()
        return batch


def _left() -> dict[str, Any]:
    """Return what a pass may leave behind in this process and in its session."""
    gc.collect()
    threads = [t.name for t in threading.enumerate() if t.name.startswith("streamshards")]
    return {
        "threads": sorted(threads),
        "children": len(multiprocessing.active_children()),
        "shared": sorted(name for name in os.listdir("/dev/shm") if f"_{os.getpid()}_" in name),
    }


def _interrupted_session(channel: Connection, url: str, num_workers: int, persistent: bool, told: Connection) -> None:
    """A notebook: a cell is interrupted, the loader is looked at and used again."""
    held = Held(told)
    loader = make(
        url, num_workers, persistent_workers=persistent, dataset={"batch_transform": held if num_workers < 3 else None}
    )
    seen = []
    try:
        seen.extend(batch["id"].tolist() for batch in loader)
        channel.send("not interrupted")
    except KeyboardInterrupt:
        pass
    state = loader.state_dict()
    until_none_of_ours()
    left = _left()
    held.is_open = True
    after = loader.state_dict()
    loader.load_state_dict(state)
    channel.send((seen, state == after, left, ids(loader), ids(loader)))


def until_none_of_ours() -> None:
    """Wait for the threads of a pass that is over: they end on their own, soon."""
    for thread in threading.enumerate():
        if thread.name.startswith("streamshards"):
            thread.join(60)


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_loader_is_used_again_after_ctrl_c(
    url: str, epochs: list[list[list[int]]], num_workers: int, persistent: bool
) -> None:
    """SIGINT to the group while ``next`` waits: no thread, worker or shared memory is left; the rest comes exactly."""
    told, tell = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    with session(_interrupted_session, url, num_workers, persistent, tell) as trainer:
        for _ in range(max(1, num_workers)):
            assert told.poll(60)
            told.recv()
        trainer.signal_group(signal.SIGINT)
        seen, is_same, left, rest, following = trainer.receive()
        assert trainer.end() == 0
    assert left == {"threads": [], "children": 0, "shared": []}
    assert is_same
    assert seen + rest == epochs[0]
    assert following == epochs[1]


def _interrupted_to_death(channel: Connection, url: str, num_workers: int, folder: str, told: Connection) -> None:
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    held = Held(told)
    try:
        for _ in make(url, num_workers, dataset={"batch_transform": held}):
            pass
    except KeyboardInterrupt:
        channel.send("interrupted")
        raise


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ctrl_c_ends_the_trainer_and_all_it_started(url: str, num_workers: int, tmp_path: Path) -> None:
    """SIGINT to the group, and nobody catches it: a KeyboardInterrupt ends the trainer; no process, no file is left."""
    told, tell = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    before = set(os.listdir("/dev/shm"))
    with session(_interrupted_to_death, url, num_workers, str(tmp_path), tell) as trainer:
        for _ in range(max(1, num_workers)):
            assert told.poll(60)
            told.recv()
        pids = members(trainer.pid)
        assert len(pids) >= 1 + num_workers
        trainer.signal_group(signal.SIGINT)
        assert trainer.receive() == "interrupted"
        assert trainer.end() == 1
    assert list(tmp_path.iterdir()) == []
    ours = [name for name in set(os.listdir("/dev/shm")) - before if any(f"_{pid}_" in name for pid in pids)]
    assert ours == []


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_iterator_does_not_go_on(url: str, num_workers: int) -> None:
    """A batch may be lost in the middle of ``next``: later ones raise, and say how to go on."""
    held = [1]

    def interrupt_once(batch: Any) -> Any:
        if held and not num_workers:
            held.clear()
            raise KeyboardInterrupt
        return batch

    loader = make(url, num_workers, dataset={"batch_transform": interrupt_once})
    iterator = iter(loader)
    if num_workers:
        before = signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(KeyboardInterrupt):
                while True:  # the timer comes in some ``next``, or between two
                    next(iterator, None)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    for _ in range(2):
        with pytest.raises(StreamShardsError, match=r"KeyboardInterrupt interrupted this pass\. Begin the next one"):
            next(iterator)
    assert loader.state_dict()["position"] == 0


def test_signal_handlers_that_raise_lose_no_batch(url: str, epochs: list[list[list[int]]]) -> None:
    """Exceptions at many instants of a ``for`` loop: what came until then, and what comes after a load, is all."""

    class Enough(BaseException): ...

    def enough(*_: object) -> None:
        raise Enough

    loader = make(url, 0)
    expected = [batch for epoch in epochs for batch in epoch]
    seen: list[list[int]] = []
    before = signal.signal(signal.SIGALRM, enough)
    interruptions = 0
    try:
        while len(seen) < len(expected):
            batch = None
            try:
                for batch in loader:
                    seen.append(batch["id"].tolist())
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 + interruptions % 30 * 1e-4)
                    if len(seen) == len(expected):
                        break
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (Enough, RuntimeError):  # a lock's own code may turn it into "release unlocked lock"
                signal.setitimer(signal.ITIMER_REAL, 0)
                interruptions += 1
                if batch is not None and seen[-1:] != [batch["id"].tolist()]:
                    seen.append(batch["id"].tolist())  # it came in the body of the loop
                loader.load_state_dict(loader.state_dict())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen == expected
    assert interruptions > 30
