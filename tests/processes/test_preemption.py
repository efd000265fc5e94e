"""A signal to the whole process group: the trainer ends its step, saves, and resumes exactly."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader

import streamshards as ss
from tests.datasets import ids
from tests.processes.sessions import START_METHODS, make, make_dataset, session
from tests.test_docs import blocks

MORE = 20
"""Batches that a trainer takes after the signal."""
MAX_STATE_BYTES = 4096


def _same(batch: Any) -> Any:
    return batch


def _loader(url: str, kind: str, num_workers: int, context: str) -> Any:
    if kind == "streaming":
        return make(url, num_workers, context)
    options: dict[str, Any] = {"batch_size": None, "num_workers": num_workers, "collate_fn": _same}
    options["multiprocessing_context"] = context if num_workers else None
    if kind == "torch":
        return DataLoader(make_dataset(url), **options)
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(make_dataset(url), **options)


def _train(channel: Connection, url: str, kind: str, num_workers: int, context: str, number: int) -> None:
    """Take batches until the signal and then some more; tell them, and the state."""
    asked: list[int] = []
    signal.signal(number, lambda received, _: asked.append(received))
    loader = _loader(url, kind, num_workers, context)
    iterator = iter(loader)
    seen = [next(iterator)["id"].tolist() for _ in range(2 * max(1, num_workers))]  # each worker has begun
    channel.send([child.pid for child in multiprocessing.active_children()])
    channel.recv()
    seen += [next(iterator)["id"].tolist() for _ in range(MORE)]
    channel.send((asked, seen, None if kind == "torch" else loader.state_dict()))
    channel.recv()


@pytest.mark.parametrize(
    ("kind", "num_workers", "context", "number"),
    [
        ("streaming", 0, "fork", signal.SIGTERM),
        *(("streaming", 2, context, signal.SIGTERM) for context in START_METHODS),
        ("streaming", 2, "fork", signal.SIGINT),
        ("streaming", 2, "forkserver", signal.SIGINT),
        ("torch", 2, "fork", signal.SIGTERM),
        ("stateful", 2, "fork", signal.SIGTERM),
    ],
)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's
def test_a_signal_to_the_group_ends_no_worker(
    url: str, epochs: list[list[list[int]]], kind: str, num_workers: int, context: str, number: int
) -> None:
    """After SIGTERM or SIGINT to the group 20 more batches come, and the state that is saved then resumes exactly."""
    if kind == "stateful":
        pytest.importorskip("torchdata", reason="torchdata is not installed")
    with session(_train, url, kind, num_workers, context, number) as trainer:
        workers = trainer.receive()
        assert len(workers) == num_workers
        trainer.signal_group(number)
        trainer.channel.send("go on")
        asked, seen, state = trainer.receive()
        trainer.channel.send("end")
        assert trainer.end() == 0
    assert asked == [number]
    assert seen == epochs[0][: len(seen)]
    if state is not None:
        assert len(json.dumps(state)) <= MAX_STATE_BYTES
        resumed = _loader(url, kind, num_workers, "fork")
        resumed.load_state_dict(json.loads(json.dumps(state)) if kind == "streaming" else state)
        assert ids(resumed) == epochs[0][len(seen) :]


def _start_and_save(channel: Connection, url: str, context: str) -> None:
    """Begin epochs over and over, with new workers each time; at the signal, save."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda received, _: asked.append(received))
    loader = make(url, 2, context)
    channel.send("begun")
    for _ in range(100):
        batches = iter(loader)
        next(batches)
        if asked:
            next(batches)
            break
    channel.send((len(asked), loader.state_dict()["position"]))


@pytest.mark.parametrize("burst", range(5))
def test_workers_that_are_being_started_outlive_the_signal(url: str, burst: int) -> None:
    """SIGTERM to the group while an epoch's workers are forked: they read, all the same."""
    with session(_start_and_save, url, "fork") as trainer:
        assert trainer.receive() == "begun"
        trainer.signal_group(signal.SIGTERM)
        assert trainer.receive() == (1, 64)
        assert trainer.end() == 0


def _be_terminated(channel: Connection, url: str, context: str) -> None:
    """Train without a handler until the end comes."""
    iterator = iter(make(url, 2, context))
    for _ in range(4):
        next(iterator)
    channel.send("ready")
    channel.recv()


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_without_a_handler_all_end(url: str, context: str) -> None:
    """SIGTERM to the group of a trainer that does not handle it ends the trainer, and its workers with it."""
    with session(_be_terminated, url, context) as trainer:
        assert trainer.receive() == "ready"
        trainer.signal_group(signal.SIGTERM)
        assert trainer.end() == -signal.SIGTERM


def _hang_in_worker(batch: Any) -> Any:
    if multiprocessing.parent_process() is not None and batch["id"][0] >= 0:
        os.kill(os.getppid(), signal.SIGUSR1)
        signal.sigwait([signal.SIGUSR2])
    return batch


def _leave_hanging_workers(channel: Connection, url: str) -> None:
    """Leave ``next`` by an exception while workers hang in a transform, and end."""

    class Enough(Exception): ...

    def leave(*_: object) -> None:
        raise Enough

    signal.signal(signal.SIGUSR1, leave)
    try:
        next(iter(make(url, 1, "fork", dataset={"batch_transform": _hang_in_worker})))
    except Enough:
        channel.send("left")


def test_workers_that_hang_are_ended_by_their_trainer(url: str) -> None:
    """A worker in a transform that never returns still obeys its trainer: the trainer ends, and nothing is left."""
    with session(_leave_hanging_workers, url) as trainer:
        assert trainer.receive() == "left"
        assert trainer.end() == 0


class Preempts:
    """A transform in which a worker signals the whole group at its tenth batch, as a scheduler would."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, batch: Any) -> Any:
        self.seen += 1
        if self.seen == 10:
            os.killpg(os.getpgid(0), signal.SIGTERM)
        return batch


def _follow_the_recipe(channel: Connection, folder: str) -> None:
    os.chdir(folder)
    (code,) = (code for code in blocks("docs/usage.md") if "SIGTERM" in code)
    preempted = SimpleNamespace(
        StreamingDataLoader=ss.StreamingDataLoader,
        StreamingDataset=partial(ss.StreamingDataset, batch_transform=Preempts()),
    )
    names: dict[str, Any] = {"ss": preempted}
    exec(code, names)
    channel.send((names["asked"], names["loader"].state_dict()))
    names = {"ss": ss}
    exec(code, names)
    channel.send((names["asked"], names["loader"].state_dict()))


def test_the_recipe_in_the_documents(tmp_path: Path) -> None:
    """docs/usage.md's loop, preempted in the first epoch: it saves its place, and the next life goes on to the end."""
    with ss.ShardWriter(str(tmp_path / "data" / "train"), shard_bytes=100_000) as out:
        for number in range(10_000):
            out.write({"id": number})
    with session(_follow_the_recipe, str(tmp_path)) as trainer:
        asked, state = trainer.receive()
        assert set(asked) == {signal.SIGTERM}  # each worker sends it at its own tenth batch, if it gets there
        assert state == json.loads((tmp_path / "state.json").read_text())
        assert (state["epoch"], 0 < state["position"] < 10_000) == (0, True)
        asked, state = trainer.receive()
        assert (asked, state["epoch"], state["position"]) == ([], 2, 10_000)
        assert trainer.end() == 0
