"""Ctrl-C in the middle of ``next``: the process ends with it, or goes on; nothing is left, and nothing is lost."""

from __future__ import annotations

import contextlib
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
def test_ctrl_c_ends_the_trainer_and_all_it_started(url: str, num_workers: int, scratch: Path) -> None:
    """SIGINT to the group, and nobody catches it: a KeyboardInterrupt ends the trainer; no process, no file is left."""
    told, tell = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    before = set(os.listdir("/dev/shm"))
    with session(_interrupted_to_death, url, num_workers, str(scratch), tell) as trainer:
        for _ in range(max(1, num_workers)):
            assert told.poll(60)
            told.recv()
        pids = members(trainer.pid)
        assert len(pids) >= 1 + num_workers
        trainer.signal_group(signal.SIGINT)
        assert trainer.receive() == "interrupted"
        assert trainer.end() == 1
    assert list(scratch.iterdir()) == []
    ours = [name for name in set(os.listdir("/dev/shm")) - before if any(f"_{pid}_" in name for pid in pids)]
    assert ours == []


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _hang_in_worker(batch: Any) -> Any:
    if multiprocessing.parent_process() is not None:
        threading.Event().wait()
    raise KeyboardInterrupt


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_iterator_does_not_go_on(url: str, num_workers: int) -> None:
    """A batch may be lost in the middle of ``next``: later ones raise, and say how to go on."""
    loader = make(url, num_workers, dataset={"batch_transform": _hang_in_worker})
    iterator = iter(loader)
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5 if num_workers else 0)  # ``next`` waits for ever
        with pytest.raises(KeyboardInterrupt):
            next(iterator)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for _ in range(2):
        with pytest.raises(StreamShardsError, match=r"KeyboardInterrupt interrupted this pass\. Begin the next one"):
            next(iterator)
    assert loader.state_dict()["position"] == 0


class InterruptsItsTrainer:
    """A transform that is Ctrl-C to the process that sends it to a second worker."""

    sent = 0

    def __call__(self, batch: Any) -> Any:
        return batch

    def __reduce__(self) -> Any:
        self.sent += 1
        if self.sent == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return InterruptsItsTrainer, ()


def _interrupted_start(channel: Connection, url: str, context: str, persistent: bool) -> None:
    forks = 0

    def interrupt() -> None:
        nonlocal forks
        forks += 1
        if forks == 2:
            os.kill(os.getpid(), signal.SIGINT)

    dataset = {"batch_transform": InterruptsItsTrainer()} if context != "fork" else {}
    if context == "fork":
        os.register_at_fork(after_in_parent=interrupt)
    loader = make(url, 2, context, persistent_workers=persistent, dataset=dataset)
    before = len(multiprocessing.active_children())
    try:
        iter(loader)
    except KeyboardInterrupt as error:
        kept = error  # as a notebook keeps it, with all frames
        left = [child for child in multiprocessing.active_children() if child.is_alive()]
        channel.send((len(left) - before, ids(loader)))
        raise kept from None


@pytest.mark.parametrize(
    ("context", "persistent"), [("fork", False), ("fork", True), ("spawn", False), ("forkserver", False)]
)
def test_ctrl_c_while_workers_are_started_leaves_none(
    url: str, epochs: list[list[list[int]]], context: str, persistent: bool
) -> None:
    """It comes out of ``iter``: no worker lives on, the next ``iter`` is whole, and the trainer can end."""
    with session(_interrupted_start, url, context, persistent) as trainer:
        left, following = trainer.receive()
        assert trainer.end() == 1
    assert left == 0
    assert following == epochs[0]


class _InterruptedResume(Exception):
    """What a handler raises while persistent workers begin their next pass."""


def test_an_iter_of_persistent_workers_that_was_interrupted_is_forgotten(
    url: str, epochs: list[list[list[int]]]
) -> None:
    """Answers of workers that were about to begin are not taken for those of the pass that follows."""

    def stop(*_: object) -> None:
        raise _InterruptedResume

    loader = make(url, 2, persistent_workers=True)
    assert ids(loader) == epochs[0]
    state = loader.state_dict()
    workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # none answers
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(_InterruptedResume):
            iter(loader)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert loader.state_dict() == state
    assert ids(loader) == epochs[1]


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
    assert interruptions > 10
