"""A worker that is killed: an error that says which, by what and what to do, soon; never a hang; an exact resume."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.synchronize
import os
import random
import signal
import threading
from typing import Any

import pytest
import torch

from streamshards import CacheOptions, StreamShardsError
from tests.datasets import flat, ids
from tests.processes.sessions import make, session


class DiesAt:
    """A transform in which the worker that gets to batch *number* of its own ends itself, as *how* says."""

    def __init__(self, number: int, how: str) -> None:
        self.number = number
        self.how = how
        self.seen = 0

    def __call__(self, batch: Any) -> Any:
        self.seen += 1
        if self.seen == self.number and batch["id"][0] >= 0:
            if self.how == "holding":
                hold_all_locks()
            elif self.how == "sending":
                send_in_part()
            if self.how == "exit":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGSEGV if self.how == "crash" else signal.SIGKILL)
        return batch


def hold_all_locks() -> None:
    """Take every lock that this process shares with others, as far as they are free."""
    for thing in gc.get_objects():
        if type(thing) is multiprocessing.synchronize.Event:
            thing._cond.acquire(timeout=1)
        elif type(thing) is multiprocessing.queues.Queue:
            for lock in (thing._wlock, thing._rlock):
                if lock is not None:
                    lock.acquire(timeout=1)


def send_in_part() -> None:
    """Send the first bytes of a long message to the trainer."""
    for thing in gc.get_objects():
        if type(thing) is multiprocessing.queues.Queue and thing._writer is not None and not thing._writer.closed:
            thing._wlock.acquire()
            os.write(thing._writer.fileno(), (1 << 20).to_bytes(4, "big") + b"begun")


def _train_to_the_death(channel: Any, url: str, context: str, persistent: bool, how: str) -> None:
    dies = DiesAt(6, how)
    loader = make(url, 2, context, persistent_workers=persistent, dataset={"batch_transform": dies})
    iterator = iter(loader)
    seen, errors = [], []
    while len(errors) < 3:
        batch = None
        try:
            for batch in iterator:
                seen.append(batch["id"].tolist())
        except (RuntimeError, StreamShardsError) as error:
            errors.append((type(error).__name__, str(error)))
            if batch is not None and seen[-1:] != [batch["id"].tolist()]:
                seen.append(batch["id"].tolist())  # torch's signal handler raised in the body of the loop
    dies.number = 0
    state = loader.state_dict()
    loader.load_state_dict(state)
    resumed = make(url, 1)
    resumed.load_state_dict(state)
    channel.send((seen, errors, ids(resumed), ids(loader)))


@pytest.mark.parametrize(
    ("context", "persistent", "how"),
    [
        ("fork", False, "killed"),
        ("fork", True, "holding"),
        ("fork", False, "holding"),
        ("fork", False, "sending"),
        ("spawn", False, "killed"),
        ("forkserver", False, "holding"),
        ("forkserver", True, "sending"),
        ("fork", False, "crash"),
        ("fork", False, "exit"),
    ],
)
def test_the_error_says_which_worker_died_and_of_what(
    url: str, epochs: list[list[list[int]]], context: str, persistent: bool, how: str
) -> None:
    """It dies between batches, with all locks, or in the middle of a message: one clear error, again at each next."""
    with session(_train_to_the_death, url, context, persistent, how) as trainer:
        seen, errors, rest, again = trainer.receive()
        assert trainer.end() == 0
    end = {"crash": "was killed by SIGSEGV", "exit": "ended with exit code 3"}.get(how, "was killed by SIGKILL")
    assert len(errors) == 3
    assert errors[1] == errors[2]
    assert errors[0] == errors[1] or errors[0][1].startswith("DataLoader worker (pid"), errors  # torch's, in the body
    assert errors[1][0] == "StreamShardsError", errors
    assert "DataLoader worker" in errors[1][1]
    assert end in errors[1][1]
    assert "memory_bytes" in errors[1][1]
    assert seen + rest == epochs[0]
    assert seen + again == epochs[0]


class DiesLate(DiesAt):
    """Dies when all that it has sent before has been received."""

    def __call__(self, batch: Any) -> Any:
        if self.seen + 1 == self.number:
            threading.Event().wait(1)
        return super().__call__(batch)


def _die_while_batches_are_pinned(channel: Any, url: str) -> None:
    pinning: Any = torch.utils.data._utils.pin_memory
    pinning.pin_memory = lambda data, _=None: data
    accelerator: Any = torch.accelerator  # torch starts the thread that pins only where there is one
    accelerator.is_available = lambda: True
    accelerator.current_accelerator = lambda: torch.device("cpu")
    accelerator.current_device_index = lambda: 0
    accelerator.set_device_index = lambda _: None
    loader = make(url, 2, "fork", pin_memory=True, dataset={"batch_transform": DiesLate(6, "sending")})
    iterator: Any = iter(loader)
    assert iterator._batches._pin_memory_thread.is_alive()
    seen = []
    try:
        seen.extend(batch["id"].tolist() for batch in iterator)
    except StreamShardsError as error:
        channel.send((str(error), seen, loader.state_dict()))


@pytest.mark.skipif(
    not hasattr(torch, "accelerator") or not hasattr(torch.accelerator, "current_device_index"),
    reason="this torch pins memory without torch.accelerator",
)
def test_a_death_is_told_where_a_thread_pins_batches(url: str, epochs: list[list[list[int]]]) -> None:
    """It has read a message in part that will never be whole: nobody waits for it."""
    with session(_die_while_batches_are_pinned, url) as trainer:
        error, seen, state = trainer.receive()
        assert trainer.end() == 0
    assert "was killed by SIGKILL" in error
    resumed = make(url, 0)
    resumed.load_state_dict(state)
    assert seen + ids(resumed) == epochs[0]


def kill_at_random(url: str, kills: int, folder: str, seed: int, expected: list[int]) -> dict[str, int]:
    """Kill workers at random instants of as many passes, and check that each pass ends in an error or at its end.

    What was handed out, and the rest after a resume, must be the epoch. Return what happened, counted.
    """
    rng = random.Random(seed)
    found = {"told": 0, "told elsewhere": 0, "not noticed": 0, "wrong": 0}
    for number in range(kills):
        persistent = number % 2 == 0
        cache = CacheOptions(directory=folder, budget_bytes="64MiB", keep_free_bytes=0) if number % 3 else None
        loader = make(url, 2, "fork", persistent_workers=persistent, dataset={"cache": cache})
        epoch = _pass_with_a_kill(loader, rng, found)
        resumed = make(url, 0)
        resumed.load_state_dict(epoch[1])
        whole = epoch[0] + ids(resumed)
        assert [row for batch in whole for row in batch] == expected, f"kill {number}"
        if persistent:  # the same loader goes on with new workers
            loader.load_state_dict(epoch[1])
            assert epoch[0] + ids(loader) == whole
    return found


def _pass_with_a_kill(loader: Any, rng: random.Random, found: dict[str, int]) -> tuple[list[list[int]], dict[str, Any]]:
    seen: list[list[int]] = []
    after = rng.randrange(60)
    killer: threading.Timer | None = None
    try:
        for batch in loader:
            seen.append(batch["id"].tolist())
            if len(seen) == 1 + after:
                victim = rng.choice(loader_workers())
                killer = threading.Timer(rng.random() * 0.02, os.kill, (victim, signal.SIGKILL))
                killer.start()
        found["not noticed"] += 1
    except StreamShardsError as error:
        found["told" if "was killed by SIGKILL" in str(error) else "wrong"] += 1
    except RuntimeError as error:  # by torch, in the body of the loop
        found["told elsewhere" if "is killed by signal: Killed" in str(error) else "wrong"] += 1
    finally:
        if killer is not None:
            killer.join()
    return seen, loader.state_dict()


def loader_workers() -> list[int]:
    """Return the pids of the worker processes of this one."""
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None and child.daemon]


def _kill_often(channel: Any, url: str, folder: str, kills: int, expected: list[int]) -> None:
    channel.send(kill_at_random(url, kills, folder, seed=kills, expected=expected))


def test_kills_at_random_instants_lose_nothing(url: str, epochs: list[list[list[int]]], tmp_path: Any) -> None:
    """Workers killed at 20 random instants, with and without a cache, persistent or not: an exact resume each time."""
    kills = 20
    with session(_kill_often, url, str(tmp_path), kills, flat(epochs[0])) as trainer:
        found = trainer.receive()
        assert trainer.end() == 0
    assert found["wrong"] == 0
    assert sum(found.values()) == kills
    assert found["not noticed"] < kills
