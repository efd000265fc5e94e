"""StreamingDataLoader: exact length, exact state, every way to stop and go on; and SIGKILL at random points."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import select
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch.utils.data import DataLoader

from streamshards import (
    OptionInvalid,
    OrderOptions,
    ResumeMismatch,
    StreamingDataLoader,
    StreamingDataset,
    StreamShardsError,
    Topology,
)
from tests.datasets import ids, write

NUM_SAMPLES = 2345
BATCH = 32
NUM_BATCHES = 74
LANES = OrderOptions(lanes=4, shuffle_block=300)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset") / "train"
    write(str(folder), range(NUM_SAMPLES))
    return str(folder)


@pytest.fixture(scope="module")
def epochs(url: str) -> list[list[list[int]]]:
    """The ids of each batch of the first four epochs, read without any loader."""
    dataset = make_dataset(url)
    return [ids(dataset) for _ in range(4)]


def make_dataset(url: str) -> StreamingDataset:
    return StreamingDataset(url, batch_size=BATCH, shuffle=True, seed=9, columns=["id", "tokens"], order=LANES)


def make(url: str, num_workers: int = 0, **options: Any) -> StreamingDataLoader:
    return StreamingDataLoader(make_dataset(url), num_workers=num_workers, **options)


workers = pytest.mark.parametrize("num_workers", [0, 1, 2, 3])


@workers
def test_epochs_follow_each_other(url: str, epochs: list[list[list[int]]], num_workers: int) -> None:
    """Each iteration is the next epoch, of exactly len(loader) batches."""
    loader = make(url, num_workers)
    assert isinstance(loader, DataLoader)
    for epoch in epochs[:2]:
        assert len(loader) == NUM_BATCHES
        assert ids(loader) == epoch


@workers
@pytest.mark.parametrize("persistent_workers", [False, True])
def test_state_counts_what_was_received(
    url: str, epochs: list[list[list[int]]], num_workers: int, persistent_workers: bool
) -> None:
    """However far the workers ran ahead, the state after k batches resumes at batch k, on another number of workers."""
    if persistent_workers and not num_workers:
        persistent_workers = False
    loader = make(url, num_workers, persistent_workers=persistent_workers)
    assert ids(loader) == epochs[0]
    iterator = iter(loader)
    for step in range(1, 6):
        next(iterator)
        assert loader.state_dict()["position"] == step * BATCH
    state = json.loads(json.dumps(loader.state_dict()))
    assert ids(iterator) == epochs[1][5:]
    resumed = make(url, (num_workers + 1) % 4)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert len(resumed) == NUM_BATCHES - 5
    assert ids(resumed) == epochs[1][5:]
    assert len(resumed) == NUM_BATCHES
    assert ids(resumed) == epochs[2]


@workers
def test_load_into_a_loader_that_is_running(url: str, epochs: list[list[list[int]]], num_workers: int) -> None:
    """Going back with load_state_dict works on the same loader, with persistent workers too."""
    loader = make(url, num_workers, persistent_workers=num_workers > 0)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    for _ in range(4):
        next(iterator)
    loader.load_state_dict(state)
    assert ids(loader) == epochs[0][3:]
    assert ids(loader) == epochs[1]


@workers
def test_break_and_iterate_again_is_the_next_epoch(url: str, epochs: list[list[list[int]]], num_workers: int) -> None:
    """Leaving early abandons the epoch; the state stays where the loop left until the next one begins."""
    loader = make(url, num_workers)
    for _ in loader:
        break
    assert loader.state_dict()["position"] == BATCH
    assert ids(loader) == epochs[1]


@workers
def test_resume_at_the_end_of_an_epoch(url: str, epochs: list[list[list[int]]], num_workers: int) -> None:
    """A state taken after the last batch gives an empty rest of that epoch, then the next epoch."""
    loader = make(url, num_workers)
    assert ids(loader) == epochs[0]
    state = loader.state_dict()
    resumed = make(url, num_workers)
    resumed.load_state_dict(state)
    assert len(resumed) == 0
    assert ids(resumed) == []
    assert ids(resumed) == epochs[1]


def test_uneven_ranks_agree_on_where_the_epoch_stands(url: str) -> None:
    """A rank without a part of the last, short batch does not call the epoch over before it has seen its end."""
    loaders = [
        StreamingDataLoader(
            StreamingDataset(url, batch_size=115, tail="uneven", topology=Topology(rank=rank, world_size=4))
        )
        for rank in range(4)
    ]
    assert [len(loader) for loader in loaders] == [6, 5, 5, 5]
    iterators = [iter(loader) for loader in loaders]
    for step in range(1, 6):
        for iterator in iterators:
            next(iterator)
        assert {loader.state_dict()["position"] for loader in loaders} == {step * 460}
    rest = [len(batch["id"]) for iterator in iterators for batch in iterator]
    assert rest == [45]
    assert {loader.state_dict()["position"] for loader in loaders} == {NUM_SAMPLES}


def test_a_load_is_used_once_and_may_be_repeated(url: str, epochs: list[list[list[int]]]) -> None:
    """Resume twice from one state: twice the same rest; without a load the next epoch follows."""
    loader = make(url)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    for _ in range(2):
        loader.load_state_dict(state)
        assert ids(loader) == epochs[0][1:]
    assert ids(loader) == epochs[1]


@workers
def test_set_epoch_on_the_dataset_reaches_the_loader(url: str, epochs: list[list[list[int]]], num_workers: int) -> None:
    """dataset.set_epoch and loader.dataset.set_epoch both say where the next iteration begins."""
    dataset = make_dataset(url)
    loader = StreamingDataLoader(dataset, num_workers=num_workers)
    dataset.set_epoch(2)
    assert loader.state_dict()["epoch"] == 2
    assert ids(loader) == epochs[2]
    loader.dataset.set_epoch(1)
    assert ids(loader) == epochs[1]


def test_set_epoch_of_the_loaded_epoch_keeps_the_place(url: str, epochs: list[list[list[int]]]) -> None:
    """The usual loop calls set_epoch(e) before it iterates: a place inside epoch e is not lost by it."""
    dataset = make_dataset(url)
    loader = StreamingDataLoader(dataset)
    iterator = iter(loader)
    for _ in range(7):
        next(iterator)
    state = loader.state_dict()
    resumed_dataset = make_dataset(url)
    resumed = StreamingDataLoader(resumed_dataset)
    resumed.load_state_dict(state)
    resumed_dataset.set_epoch(0)
    assert ids(resumed) == epochs[0][7:]
    resumed_dataset.set_epoch(1)
    assert ids(resumed) == epochs[1]


def test_two_loaders_over_one_dataset_do_not_disturb_each_other(url: str, epochs: list[list[list[int]]]) -> None:
    """Each loader has its own epoch and its own place, even when they are read in turns."""
    dataset = make_dataset(url)
    one, two = StreamingDataLoader(dataset), StreamingDataLoader(dataset, num_workers=2)
    first, second = iter(one), iter(two)
    turns = [(next(first)["id"].tolist(), next(second)["id"].tolist()) for _ in range(NUM_BATCHES)]
    assert [turn[0] for turn in turns] == epochs[0]
    assert [turn[1] for turn in turns] == epochs[0]
    assert ids(two) == epochs[1]
    assert one.state_dict()["epoch"] == 0


def test_the_dataset_does_not_guess_the_place_of_a_loader(url: str) -> None:
    """Saving the wrong object's state would replay the epoch: it is an error that names the right one."""
    dataset = make_dataset(url)
    loader = StreamingDataLoader(dataset)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(StreamShardsError, match=r"use loader.state_dict\(\)"):
        dataset.state_dict()
    loader.set_epoch(3)
    assert dataset.state_dict()["epoch"] == 3
    assert loader.stats()["batches"] > 0


def test_a_slow_worker_of_an_abandoned_iteration_changes_nothing(url: str, epochs: list[list[list[int]]]) -> None:
    """Each iteration's workers carry their own start: however late some of an older one get to theirs."""
    loader = make(url, 3, multiprocessing_context="fork")
    abandoned = [iter(loader) for _ in range(3)]
    assert ids(loader) == epochs[3]
    del abandoned


def test_batches_out_of_order_are_refused(url: str) -> None:
    """What torch calls in_order=False cannot be resumed exactly."""
    with pytest.raises(OptionInvalid, match="in_order"):
        make(url, 2, in_order=False)


def _rank(rank: int, dataset: StreamingDataset, num_workers: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    loader = StreamingDataLoader(dataset, num_workers=num_workers)
    seen = [ids(loader) for _ in range(2)]
    Path(folder, f"{rank}.json").write_text(json.dumps([len(loader), seen]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_made_before_its_ranks(url: str, tmp_path: Path, context: str, num_workers: int) -> None:
    """Handed to processes that only then become ranks (mp.spawn): each takes its own part of the same epochs."""
    reference = make_dataset(url)
    whole = [ids(reference), ids(reference)]
    dataset = StreamingDataset(url, batch_size=BATCH // 2, shuffle=True, seed=9, columns=["id", "tokens"], order=LANES)
    next(iter(dataset))
    dataset.set_epoch(0)
    processes = [
        multiprocessing.get_context(context).Process(
            target=_rank, args=(rank, dataset, num_workers, str(tmp_path)), daemon=False
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [part[0] for part in parts] == [NUM_BATCHES, NUM_BATCHES]
    for epoch in range(2):
        steps = zip(parts[0][1][epoch], parts[1][1][epoch], strict=True)
        assert [left + right for left, right in steps] == whole[epoch]


def test_what_the_dataset_decides_is_refused(url: str) -> None:
    """Batching by the DataLoader would break exactness: the error says where it belongs."""
    with pytest.raises(OptionInvalid, match=r"batch_size, shuffle: say it to the StreamingDataset"):
        StreamingDataLoader(make_dataset(url), batch_size=4, shuffle=True)
    with pytest.raises(OptionInvalid, match="not a list"):
        StreamingDataLoader([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ResumeMismatch, match="lacks"):
        make(url).load_state_dict({"version": 1})


def test_repr(url: str) -> None:
    """The loader says what it iterates and how many batches come."""
    assert "batches=74" in repr(make(url))


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


def _train(url: str, num_workers: int, state: dict[str, Any] | None, results: Connection) -> None:
    """One life of a training process: tell the parent each batch with the state after it, epoch after epoch."""
    # Forked workers notice that their parent is gone; a fork server's would outlive it.
    loader = make(url, num_workers, multiprocessing_context="fork" if num_workers else None)
    if state is not None:
        loader.load_state_dict(state)
    while True:
        for batch in loader:
            results.send((batch["id"].tolist(), json.dumps(loader.state_dict())))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_sigkill_anywhere_and_resume(
    url: str, epochs: list[list[list[int]]], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at 20 random points over three epochs, the batches received are those of a run that never stopped."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    rng = random.Random(20 + num_workers)
    expected = epochs[0] + epochs[1] + epochs[2]
    context = multiprocessing.get_context("forkserver")
    lives = []
    received: list[list[int]] = []
    state: dict[str, Any] | None = None
    for _ in range(20):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_train, args=(url, num_workers, state, theirs))
        process.start()
        theirs.close()
        for _ in range(rng.randint(1, 20)):
            batch, text = ours.recv()
            received.append(batch)
            state = json.loads(text)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        lives.append(process)
        ours.close()
    for process in lives:  # only now: a life counts as over when its orphaned workers have noticed, seconds later
        process.join()
    assert received == expected[: len(received)]
    assert len(received) > 60


def _hang(url: str, results: Connection) -> None:
    """Begin to train with workers of a fork server, tell their pids, and wait to be killed."""
    loader = make(url, 2, multiprocessing_context="forkserver")
    iterator = iter(loader)
    next(iterator)
    results.send([child.pid for child in multiprocessing.active_children()])
    signal.pause()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open (Linux 5.3)")
def test_workers_end_when_the_trainer_is_killed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL of the training process ends its workers too, even those whose parent is a fork server."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_hang, args=(url, theirs))
    process.start()
    theirs.close()
    handles = [os.pidfd_open(pid) for pid in ours.recv()]
    assert len(handles) == 2
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    for handle in handles:
        assert select.select([handle], [], [], 60)[0], "a worker outlived its trainer"
        os.close(handle)
    ours.close()
    process.join()
