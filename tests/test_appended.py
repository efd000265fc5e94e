"""strict=False: a state goes on although shards were appended since, or, between two epochs, whatever has changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from streamshards import (
    OrderOptions,
    ResumeMismatch,
    ShardWriter,
    StreamingDataLoader,
    StreamingDataset,
    StreamShardsError,
    Topology,
)
from tests.datasets import flat, ids, write

OLD, NEW = 151, 90
"""Samples before and after the append: 0 to 150, and 151 to 240."""
ALL = OLD + NEW
BATCH_SIZE = 8
LANES = OrderOptions(lanes=4, shuffle_block=40)
State: TypeAlias = dict[str, Any]
Choose: TypeAlias = Callable[[StreamingDataset], StreamingDataset]


@pytest.fixture
def url(tmp_path: Path) -> str:
    folder = str(tmp_path / "train")
    write(folder, range(OLD), shard_bytes=1_500)
    return folder


def append(url: str, start: int = OLD, stop: int = ALL) -> None:
    write(url, range(start, stop), shard_bytes=1_500, mode="append")


def opened(url: str, **options: Any) -> StreamingDataset:
    defaults: dict[str, Any] = {
        "batch_size": BATCH_SIZE, "shuffle": True, "seed": 4, "order": LANES, "columns": ["id"],
    }  # fmt: skip
    return StreamingDataset(url, **defaults | options)


def orders(url: str, **options: Any) -> list[list[int]]:
    """Return the ids of epochs 0, 1 and 2 of what is at *url* now."""
    dataset = opened(url, **options)
    return [flat(ids(dataset))[: dataset.num_samples] for _ in range(3)]


def state_after(url: str, batches: int, *, epoch: int = 0, **options: Any) -> State:
    """Return the state of what is at *url* now after that many batches of *epoch*, as a file would keep it."""
    dataset = opened(url, **options)
    dataset.set_epoch(epoch)
    iterator = iter(dataset)
    for _ in range(batches):
        next(iterator)
    state: State = json.loads(json.dumps(dataset.state_dict()))
    return state


MIDDLE = 9
BATCHES = -(-OLD // BATCH_SIZE)


# -- appended ----------------------------------------------------------------------------------------------------------


def test_a_strict_load_refuses_and_says_what_would_do(url: str) -> None:
    """By default a state from before an append is refused: each difference is listed, and what strict=False does."""
    before = opened(url)
    state = state_after(url, MIDDLE)
    append(url)
    for target in (opened(url), StreamingDataLoader(opened(url))):
        for strict in ({}, {"strict": True}):
            with pytest.raises(ResumeMismatch, match="Shards have been appended since: strict=False ends") as refused:
                target.load_state_dict(state, **strict)
            text = str(refused.value)
            assert f"num_samples is {ALL} here and {OLD} in the state" in text
            assert f"and {before.index.num_shards} in the state" in text
            assert before.index.fingerprint in text
    assert flat(ids(opened(url)))[:ALL] == orders(url)[0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["streaming", "plain"])
def test_the_epoch_ends_as_it_began_and_the_next_has_all(
    url: str, kind: str, num_workers: int, persistent: bool
) -> None:
    """The rest of the epoch is exactly the old samples that were missing, in the old order; the next epochs are those
    of a dataset that was opened anew."""
    (old, *_), state = orders(url), state_after(url, MIDDLE)
    append(url)
    _, second, third = orders(url)
    dataset = opened(url)
    workers: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": persistent and num_workers > 0}
    loader: Any
    if kind == "streaming":
        loader = StreamingDataLoader(dataset, **workers)
        loader.load_state_dict(state, strict=False)
        assert len(loader) == BATCHES - MIDDLE
    else:
        loader = DataLoader(dataset, batch_size=None, collate_fn=_same, **workers)
        dataset.load_state_dict(state, strict=False)
    rest = flat(ids(loader))
    assert rest[: OLD - MIDDLE * BATCH_SIZE] == old[MIDDLE * BATCH_SIZE :]
    assert len(rest) == (BATCHES - MIDDLE) * BATCH_SIZE
    assert rest[OLD - MIDDLE * BATCH_SIZE :] == old[: BATCHES * BATCH_SIZE - OLD]
    assert flat(ids(loader))[:ALL] == second
    assert flat(ids(loader))[:ALL] == third


def _same(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (3, 5), (1, 20)])
def test_another_cluster_ends_the_epoch(url: str, world_size: int, batch_size: int) -> None:
    """On other ranks with another batch size, too, the epoch ends with each old sample once."""
    (old, *_), state = orders(url), state_after(url, MIDDLE)
    append(url)
    parts, following = [], []
    for rank in range(world_size):
        topology = Topology(rank=rank, world_size=world_size)
        reader = opened(url, batch_size=batch_size, topology=topology, tail="uneven")
        reader.load_state_dict(state, strict=False)
        parts.append(ids(reader))
        following += flat(ids(reader))
    steps = range(max(map(len, parts)))
    assert flat(flat(part[step] for part in parts if step < len(part)) for step in steps) == old[MIDDLE * BATCH_SIZE :]
    assert sorted(following) == list(range(ALL))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_states_of_that_epoch_are_those_of_the_old_dataset(url: str, num_workers: int) -> None:
    """While the old epoch goes on its states are what they would have been without the append; they load again, with
    strict=False; those of the next epoch load strictly."""
    expected = {batches: state_after(url, batches) for batches in (MIDDLE, MIDDLE + 2, MIDDLE + 5)}
    (old, *_), state = orders(url), expected[MIDDLE]
    append(url)
    for more in (2, 3):
        loader = StreamingDataLoader(opened(url), num_workers=num_workers)
        loader.load_state_dict(state, strict=False)
        assert loader.state_dict() == state
        at = state["position"]
        iterator = iter(loader)
        assert loader.state_dict() == state
        assert flat(next(iterator)["id"].tolist() for _ in range(more)) == old[at : at + more * BATCH_SIZE]
        state = json.loads(json.dumps(loader.state_dict()))
        assert state == expected[(at // BATCH_SIZE) + more]
        with pytest.raises(ResumeMismatch, match="appended"):
            opened(url).load_state_dict(state)
    assert len(list(iterator)) == BATCHES - MIDDLE - 5
    assert loader.state_dict()["position"] == OLD
    iterator = iter(loader)
    first = next(iterator)["id"].tolist()
    later = loader.state_dict()
    assert (later["epoch"], later["position"], later["num_samples"]) == (1, BATCH_SIZE, ALL)
    strict = opened(url)
    strict.load_state_dict(later)
    assert first + flat(ids(strict)) == flat(ids(again(url, 1)))


def again(url: str, epoch: int, **options: Any) -> StreamingDataset:
    dataset = opened(url, **options)
    dataset.set_epoch(epoch)
    return dataset


def test_a_dataset_says_where_the_old_epoch_is(url: str) -> None:
    """Without a loader, too: right after the load, while iterating, and at the end of the epoch."""
    state, end = state_after(url, MIDDLE), state_after(url, BATCHES)
    append(url)
    dataset = opened(url)
    dataset.load_state_dict(state, strict=False)
    assert dataset.state_dict() == state
    iterator = iter(dataset)
    next(iterator)
    assert dataset.state_dict()["position"] == (MIDDLE + 1) * BATCH_SIZE
    assert dataset.state_dict()["fingerprint"] == state["fingerprint"]
    list(iterator)
    assert dataset.state_dict() == end
    dataset.set_epoch(0)
    assert sorted(flat(ids(dataset))[:ALL]) == list(range(ALL))


def test_set_epoch_keeps_the_place_of_the_old_epoch(url: str) -> None:
    """A training loop that calls set_epoch(e) at the start of each epoch ends the old one first."""
    (old, *_), state = orders(url), state_after(url, MIDDLE)
    append(url)
    for loader in (opened(url), StreamingDataLoader(opened(url))):
        loader.load_state_dict(state, strict=False)
        loader.set_epoch(0)
        assert flat(ids(loader))[: OLD - MIDDLE * BATCH_SIZE] == old[MIDDLE * BATCH_SIZE :]
        loader.set_epoch(1)
        assert sorted(flat(ids(loader))[:ALL]) == list(range(ALL))


@pytest.mark.parametrize("at", [0, BATCHES], ids=["start", "end"])
def test_a_state_at_either_end_of_an_epoch(url: str, at: int) -> None:
    """At the end nothing is left of the old epoch; at its start all old samples are. Then come all."""
    (old, *_), state = orders(url), state_after(url, at)
    append(url)
    _, second, _ = orders(url)
    dataset = opened(url)
    dataset.load_state_dict(state, strict=False)
    assert flat(ids(dataset))[:OLD] == ([] if at else old)
    assert flat(ids(dataset))[:ALL] == second


def test_two_appends_in_a_row(url: str) -> None:
    """An epoch begun with the first samples ends with them after two appends, resumed in between."""
    (old, *_), state = orders(url), state_after(url, 4)
    append(url)
    dataset = opened(url)
    dataset.load_state_dict(state, strict=False)
    iterator = iter(dataset)
    got = flat(next(iterator)["id"].tolist() for _ in range(3))
    state = dataset.state_dict()
    of_second = state_after(url, 5, epoch=1)
    second = orders(url)[1]
    append(url, ALL, ALL + 40)
    dataset = opened(url)
    dataset.load_state_dict(state, strict=False)
    got += flat(ids(dataset))
    assert got[: OLD - 32] == old[32:]
    assert sorted(flat(ids(dataset))[: ALL + 40]) == list(range(ALL + 40))
    dataset.load_state_dict(of_second, strict=False)
    assert flat(ids(dataset))[: ALL - 40] == second[40:]


CHOICES: dict[str, Choose] = {
    "take": lambda ds: ds.take(120),
    "skip": lambda ds: ds.skip(30),
    "split by sample": lambda ds: ds.split(0.7, seed=1)[0],
    "split by shard": lambda ds: ds.split(0.7, seed=1, by="shard")[1],
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_a_subset_is_that_of_the_old_dataset_until_the_epoch_ends(url: str, choose: Choose) -> None:
    """The cuts hold for the samples that the epoch began with; from the next epoch on for all."""
    before = choose(opened(url))
    whole = flat(ids(choose(opened(url))))[: before.num_samples]
    iterator = iter(before)
    got = flat(next(iterator)["id"].tolist() for _ in range(2))
    append(url)
    after = choose(opened(url))
    with pytest.raises(ResumeMismatch, match="appended"):
        after.load_state_dict(before.state_dict())
    after.load_state_dict(before.state_dict(), strict=False)
    got += flat(ids(after))
    assert got[: before.num_samples] == whole
    everything = sorted(each["id"] for each in choose(opened(url, batch_size=None)))
    assert sorted(flat(ids(after))[: after.num_samples]) == everything


def test_keys_of_the_old_epoch_hold(url: str) -> None:
    """Shard and row are the same numbers before and after an append."""
    state = state_after(url, MIDDLE)
    append(url)
    dataset = opened(url, with_keys=True)
    dataset.load_state_dict(state, strict=False)
    first = np.concatenate([[0], np.cumsum(dataset.index.rows)])
    for _ in range(2):
        for batch in dataset:
            key = batch["key"]
            assert (first[key["shard"].numpy()] + key["row"].numpy()).tolist() == batch["id"].tolist()


# -- what strict=False does not forgive --------------------------------------------------------------------------------


def replaced(url: str) -> None:
    write(url, reversed(range(ALL)), shard_bytes=1_500, mode="replace")


def shortened(url: str) -> None:
    write(url, range(OLD - 40), shard_bytes=1_500, mode="replace")


def widened(url: str) -> None:
    """Append samples of which ``id`` may be None: from then on the schema has it optional."""
    with ShardWriter(url, mode="append") as out:
        out.write({**StreamingDataset(url)[0], "id": None})


CHANGES = {"replaced": replaced, "shortened": shortened, "appended with a wider field": widened}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("strict", [True, False])
def test_another_dataset_is_refused_in_the_middle(url: str, change: Callable[[str], None], strict: bool) -> None:
    """Other samples, or the old ones in another schema: the text lists what differs and says why not."""
    state = state_after(url, MIDDLE)
    change(url)
    for target in (opened(url), StreamingDataLoader(opened(url))):
        with pytest.raises(ResumeMismatch, match="fingerprint is") as refused:
            target.load_state_dict(state, strict=strict)
        text = str(refused.value)
        assert "Shards have been appended" not in text
        if not strict:
            assert "no field" in text
            assert f"in the middle of epoch 0, at {MIDDLE * BATCH_SIZE} of {OLD}" in text
        assert target.state_dict()["position"] == 0


@pytest.mark.parametrize("change", [replaced, shortened], ids=["replaced", "shortened"])
@pytest.mark.parametrize(("at", "epoch"), [(0, 1), (BATCHES, 2)], ids=["start", "end"])
def test_between_epochs_any_dataset_goes(url: str, change: Callable[[str], None], at: int, epoch: int) -> None:
    """Before the first sample of epoch 1 the dataset begins with epoch 1, after the last one with epoch 2."""
    state = state_after(url, at, epoch=1)
    change(url)
    expected = orders(url)
    with pytest.raises(ResumeMismatch, match="Open the dataset as it was then"):
        opened(url).load_state_dict(state)
    for loader in (opened(url), StreamingDataLoader(opened(url))):
        loader.load_state_dict(state, strict=False)
        assert loader.state_dict()["epoch"] == epoch
        assert flat(ids(loader))[: len(expected[epoch])] == expected[epoch]


@pytest.mark.parametrize("options", [{"seed": 5}, {"shuffle": False}], ids=str)
@pytest.mark.parametrize("is_appended", [False, True])
def test_another_order_only_between_epochs(url: str, options: dict[str, Any], is_appended: bool) -> None:
    """Another seed, or none: refused in the middle of an epoch; between two the next epoch is one of the new order."""
    middle, start, end = (state_after(url, at) for at in (MIDDLE, 0, BATCHES))
    if is_appended:
        append(url)
    expected = orders(url, **options)
    for strict in (True, False):
        with pytest.raises(ResumeMismatch, match=f"{next(iter(options))} is"):
            opened(url, **options).load_state_dict(middle, strict=strict)
    for state, epoch in ((start, 0), (end, 1)):
        dataset = opened(url, **options)
        with pytest.raises(ResumeMismatch, match=f"{next(iter(options))} is"):
            dataset.load_state_dict(state)
        dataset.load_state_dict(state, strict=False)
        assert flat(ids(dataset))[: dataset.num_samples] == expected[epoch]


def test_a_state_of_this_very_dataset_is_exact_with_strict_false_too(url: str) -> None:
    """What needs no forgiveness gets none: the place is kept at every point of the epoch."""
    (old, *_) = orders(url)
    for batches in range(BATCHES + 1):
        dataset = opened(url)
        dataset.load_state_dict(state_after(url, batches), strict=False)
        assert flat(ids(dataset))[: max(0, OLD - batches * BATCH_SIZE)] == old[batches * BATCH_SIZE :]


@pytest.mark.parametrize("count", [-1, 0, 1, 3, 10**9, 2**62, True, "4", None, 4.0])
def test_a_wrong_number_of_shards_is_refused(url: str, count: Any) -> None:
    """A state that names another number of shards than its fingerprint has is nobody's."""
    state = {**state_after(url, MIDDLE), "num_shards": count}
    append(url)
    with pytest.raises(StreamShardsError, match="num_shards"):
        opened(url).load_state_dict(state, strict=False)


class _States(torch.utils.data.IterableDataset[Any]):
    """Each worker's own state after some of its batches."""

    def __init__(self, dataset: StreamingDataset, batches: int) -> None:
        self.dataset = dataset
        self.batches = batches

    def __iter__(self) -> Iterator[State]:
        iterator = iter(self.dataset)
        for _ in range(self.batches):
            next(iterator)
        yield self.dataset.state_dict()


class _Rest(torch.utils.data.IterableDataset[Any]):
    """What each worker delivers from its own state on."""

    def __init__(self, dataset: StreamingDataset, states: list[State]) -> None:
        self.dataset = dataset
        self.states = states

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        self.dataset.load_state_dict(self.states[info.id], strict=False)
        yield from self.dataset


def test_workers_that_load_their_own_states(url: str) -> None:
    """As torchdata's loader does it: each worker goes on with its own part of the old epoch."""
    (old, *_) = orders(url)
    states = list(DataLoader(_States(opened(url), 3), batch_size=None, num_workers=2, collate_fn=_same))
    append(url)
    got = flat(ids(DataLoader(_Rest(opened(url), states), batch_size=None, num_workers=2, collate_fn=_same)))
    assert got[: OLD - 6 * BATCH_SIZE] == old[6 * BATCH_SIZE :]
