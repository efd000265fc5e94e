"""torchdata's StatefulDataLoader over a StreamingDataset: a state of every point resumes exactly, with its workers.

Worker w of n delivers the rank's batches w, w + n, w + 2n, …, and the loader asks its workers in turn: so the order is
that of no workers at all, which is the reference everywhere here.
"""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any, Final

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from streamshards import OrderOptions, ResumeMismatch, StreamingDataset, Topology
from tests.datasets import write

NUM_SAMPLES: Final = 7
BATCH: Final = 2
"""Four batches, the last one padded with one sample."""

modes = pytest.mark.parametrize("batch_size", [BATCH, None], ids=["batches", "samples"])
all_workers = pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
some_workers = pytest.mark.parametrize("num_workers", [0, 2])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("dataset") / "train")
    write(folder, range(NUM_SAMPLES), shard_bytes=300)
    assert StreamingDataset(folder).index.num_shards >= 3
    return folder


def make_dataset(url: str, batch_size: int | None) -> StreamingDataset:
    order = OrderOptions(lanes=2, chunk=2, shuffle_block=4)
    return StreamingDataset(url, batch_size=batch_size, shuffle=True, seed=3, columns=["id"], order=order)


def make(url: str, batch_size: int | None, num_workers: int, **options: Any) -> StatefulDataLoader[Any]:
    if num_workers:
        options.setdefault("multiprocessing_context", "fork")
    dataset = make_dataset(url, batch_size)
    return StatefulDataLoader(dataset, batch_size=None, collate_fn=same, num_workers=num_workers, **options)


def same(item: Any) -> Any:
    return item


def ids(items: Any) -> list[Any]:
    """Return what identifies each item: a batch's ids, or a sample's id."""
    return [item["id"] if isinstance(item["id"], int) else item["id"].tolist() for item in items]


def epochs(url: str, batch_size: int | None, count: int = 4) -> list[list[Any]]:
    dataset = make_dataset(url, batch_size)
    return [ids(dataset) for _ in range(count)]


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return *state* as a checkpoint file would give it back."""
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    assert loaded == state
    return loaded


def states_of(loader: StatefulDataLoader[Any]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return the rest of an epoch and the state at its every point: before it, after each item, after its end."""
    states = [copied(loader.state_dict())]
    seen = []
    for item in loader:
        seen += ids([item])
        states.append(copied(loader.state_dict()))
    return seen, [*states, copied(loader.state_dict())]


def dataset_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what our dataset put into *state*: one dict without workers, else one of each worker."""
    if "dataset_state" in state:
        return [state["dataset_state"]]
    return [worker["dataset_state"] for worker in state["_snapshot"]["_worker_snapshots"].values()]


# -- every point -------------------------------------------------------------------------------------------------------


SETUPS: Final = [
    pytest.param(num_workers, interval, persistent, id=f"{num_workers}-every{interval}{'-persistent' * persistent}")
    for num_workers, interval, persistent in itertools.product([0, 1, 2, 3], [1, 3, 100], [False, True])
    if num_workers or not persistent
]
"""Every number of workers, interval between snapshots, and kind of workers."""


@modes
@pytest.mark.parametrize(("num_workers", "interval", "persistent"), SETUPS)
def test_resume_at_every_point(
    url: str, batch_size: int | None, num_workers: int, interval: int, persistent: bool
) -> None:
    """A new process with the state of any point gets exactly the rest, in order, and then the following epoch.

    Its state is that of the run that was never interrupted, at each later point: so a resumed run can be resumed again.
    """
    reference = epochs(url, batch_size)
    options = {"snapshot_every_n_steps": interval} | ({"persistent_workers": True} if persistent else {})
    loader = make(url, batch_size, num_workers, **options)
    assert ids(loader) == reference[0]
    seen, states = states_of(loader)
    assert seen == reference[1]
    *running, finished = states
    for taken, state in enumerate(running):
        resumed = make(url, batch_size, num_workers, **options)
        resumed.load_state_dict(state)
        rest, later = states_of(resumed)
        assert rest == reference[1][taken:]
        assert [dataset_states(s) for s in later] == [dataset_states(s) for s in states[taken:]]
        assert later[0] == state
        assert ids(resumed) == reference[2]
    resumed = make(url, batch_size, num_workers, **options)
    resumed.load_state_dict(finished)
    assert ids(resumed) == reference[2]
    assert ids(resumed) == reference[3]


@modes
@all_workers
def test_the_order_is_that_of_no_loader_at_all(url: str, batch_size: int | None, num_workers: int) -> None:
    """Whatever the number of workers, each epoch is the dataset's own, the padded tail included."""
    loader = make(url, batch_size, num_workers)
    assert [ids(loader) for _ in range(3)] == epochs(url, batch_size)[:3]


@modes
@all_workers
def test_resume_before_the_first_item_of_all(url: str, batch_size: int | None, num_workers: int) -> None:
    """A state taken before anything was iterated is that of epoch 0, and taking it costs nothing of it."""
    reference = epochs(url, batch_size)
    loader = make(url, batch_size, num_workers)
    state = copied(loader.state_dict())
    assert {(s["epoch"], s["position"]) for s in dataset_states(state)} == {(0, 0)}
    assert ids(loader) == reference[0]
    resumed = make(url, batch_size, num_workers)
    resumed.load_state_dict(state)
    assert [ids(resumed) for _ in range(2)] == reference[:2]


@modes
@some_workers
def test_a_place_loaded_into_the_dataset_itself(url: str, batch_size: int | None, num_workers: int) -> None:
    """A state of the dataset alone begins a loader's first pass, and that pass resumes like any other."""
    reference = epochs(url, batch_size)
    dataset = make_dataset(url, batch_size)
    iterator = iter(dataset)
    next(iterator)
    place = dataset.state_dict()
    loader = make(url, batch_size, num_workers)
    loader.dataset.load_state_dict(place)
    _, states = states_of(loader)
    assert len(states) == len(reference[0][1:]) + 2
    for taken, state in enumerate(states[:-1], start=1):
        resumed = make(url, batch_size, num_workers)
        resumed.load_state_dict(state)
        assert ids(resumed) == reference[0][taken:]
        assert ids(resumed) == reference[1]


# -- resuming again, at the end, and after a break ---------------------------------------------------------------------


@modes
@some_workers
@pytest.mark.parametrize("interval", [1, 3])
def test_lives_of_one_item_each(url: str, batch_size: int | None, num_workers: int, interval: int) -> None:
    """Interrupted after every single item and resumed each time by a new process, two epochs come out whole."""
    reference = epochs(url, batch_size)
    expected = reference[0] + reference[1]
    received: list[Any] = []
    state = None
    while len(received) < len(expected):
        loader = make(url, batch_size, num_workers, snapshot_every_n_steps=interval)
        if state is not None:
            loader.load_state_dict(state)
        # After an epoch's last item comes its end, before the next epoch's first.
        item = next(itertools.chain(loader, loader))
        received += ids([item])
        state = copied(loader.state_dict())
    assert received == expected


@modes
@all_workers
@pytest.mark.parametrize("persistent", [False, True])
def test_resume_at_the_end_of_an_epoch(url: str, batch_size: int | None, num_workers: int, persistent: bool) -> None:
    """After the last item, nothing is left of the epoch: the first next says so, and the next pass is the next epoch.

    If the loop had already seen the end, the resumed loader begins with the next epoch at once.
    """
    options = {"persistent_workers": True} if persistent and num_workers else {}
    reference = epochs(url, batch_size)
    *_, after_last, finished = states_of(make(url, batch_size, num_workers, **options))[1]
    resumed = make(url, batch_size, num_workers, **options)
    resumed.load_state_dict(after_last)
    with pytest.raises(StopIteration):
        next(iter(resumed))
    assert ids(resumed) == reference[1]
    resumed = make(url, batch_size, num_workers, **options)
    resumed.load_state_dict(finished)
    assert ids(resumed) == reference[1]


@modes
@some_workers
@pytest.mark.parametrize("persistent", [False, True])
def test_break_and_iterate_again(url: str, batch_size: int | None, num_workers: int, persistent: bool) -> None:
    """Leaving the loop abandons the epoch; the next loop is the next one, after a load too: a load is used once."""
    options = {"persistent_workers": True} if persistent and num_workers else {}
    reference = epochs(url, batch_size)
    loader = make(url, batch_size, num_workers, **options)
    for item in loader:
        assert ids([item]) == reference[0][:1]
        break
    state = copied(loader.state_dict())
    assert ids(loader) == reference[1]
    resumed = make(url, batch_size, num_workers, **options)
    resumed.load_state_dict(state)
    for item in resumed:
        assert ids([item]) == reference[0][1:2]
        break
    assert ids(resumed) == reference[1]
    assert ids(resumed) == reference[2]


# -- the state itself --------------------------------------------------------------------------------------------------


@modes
@all_workers
@pytest.mark.parametrize("interval", [1, 3])
def test_the_state_right_after_a_load_is_what_was_loaded(
    url: str, batch_size: int | None, num_workers: int, interval: int
) -> None:
    """At every point, the whole state and each worker's part of it; asking for it takes nothing away."""
    seen, states = states_of(make(url, batch_size, num_workers, snapshot_every_n_steps=interval))
    for taken, state in enumerate(states[:-1]):
        resumed = make(url, batch_size, num_workers, snapshot_every_n_steps=interval)
        resumed.load_state_dict(copy.deepcopy(state))
        for _ in range(2):
            assert resumed.state_dict() == state
        assert ids(resumed) == seen[taken:]


@modes
@all_workers
def test_states_are_fresh_plain_values(url: str, batch_size: int | None, num_workers: int) -> None:
    """Our part is a flat dict of numbers, strings and bools; whoever spoils one spoils no later state."""
    _, clean = states_of(make(url, batch_size, num_workers))
    loader = make(url, batch_size, num_workers)
    spoilt = 0
    for _, expected in zip(loader, clean[1:], strict=False):
        state = loader.state_dict()
        assert [dataset_states(state)] == [dataset_states(expected)]
        for ours in dataset_states(state):
            assert all(type(value) in (int, str, bool) for value in ours.values())
            assert len(json.dumps(ours)) < 1024
            ours.clear()
            ours["position"] = "spoilt"
            spoilt += 1
    assert spoilt == (len(clean) - 2) * max(1, num_workers)


@modes
@pytest.mark.parametrize(("saved", "loaded"), [(0, 2), (1, 2), (2, 0), (2, 1), (2, 3), (3, 2)])
def test_another_number_of_workers_is_refused_by_torchdata(
    url: str, batch_size: int | None, saved: int, loaded: int
) -> None:
    """Its states hold for one number of workers; StreamingDataLoader's hold for any."""
    resumed = make(url, batch_size, loaded)
    resumed.load_state_dict(make(url, batch_size, saved).state_dict())
    with pytest.raises(AssertionError):
        iter(resumed)


def test_the_place_of_one_worker_among_others_is_refused_with_the_way_out(url: str) -> None:
    """In the middle of an epoch a worker of ours speaks first, and names what loads on any number of workers."""
    *_, state, _ = states_of(make(url, BATCH, 2))[1]
    resumed = make(url, BATCH, 1)  # one: torchdata waits 5 s for each worker after one of them refused to begin
    resumed.load_state_dict(state)
    with pytest.raises(ResumeMismatch, match=r"one of 2 DataLoader workers, there are 1 here.*StreamingDataLoader"):
        iter(resumed)


def test_another_batch_size_is_refused_inside_workers(url: str) -> None:
    """A worker's place counts steps, so it holds for one size of step; silently going on would lose samples."""
    dataset = make_dataset(url, BATCH)
    state = {**dataset.state_dict(), "worker_batches": 1, "num_workers": 1, "global_batch": BATCH}
    other = make_dataset(url, BATCH + 1)
    with pytest.raises(
        ResumeMismatch, match=r"steps of 2 samples over all ranks, there are 3 here.*StreamingDataLoader"
    ):
        other.load_state_dict(state)
    ranked = StreamingDataset(url, batch_size=BATCH, topology=Topology(rank=1, world_size=2), shuffle=True, seed=3)
    with pytest.raises(ResumeMismatch, match="steps of 2 samples over all ranks, there are 4 here"):
        ranked.load_state_dict(state)
    *_, saved, _ = states_of(make(url, BATCH, 2))[1]
    assert {ours["global_batch"] for ours in dataset_states(saved)} == {BATCH}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_going_back_goes_on_from_there(url: str, num_workers: int, persistent: bool) -> None:
    """An earlier epoch's state, loaded into a loader that is epochs further: its rest, and then the epoch after it."""
    options = {"persistent_workers": True} if persistent and num_workers else {}
    reference = epochs(url, BATCH)
    loader = make(url, BATCH, num_workers, **options)
    iterator = iter(loader)
    next(iterator)
    state = copied(loader.state_dict())
    assert ids(iterator) == reference[0][1:]
    assert [ids(loader), ids(loader)] == reference[1:3]
    loader.load_state_dict(state)
    assert [ids(loader), ids(loader)] == [reference[0][1:], reference[1]]


# -- epochs that are said, and start methods ---------------------------------------------------------------------------


@some_workers
@pytest.mark.parametrize("persistent", [False, True])
def test_the_usual_loop_with_set_epoch(url: str, num_workers: int, persistent: bool) -> None:
    """set_epoch with the loaded epoch keeps the place; with later ones it goes to them, persistent workers too."""
    options = {"persistent_workers": True} if persistent and num_workers else {}
    reference = epochs(url, BATCH)
    loader = make(url, BATCH, num_workers, **options)
    loader.dataset.set_epoch(1)
    iterator = iter(loader)
    assert ids([next(iterator)]) == reference[1][:1]
    state = copied(loader.state_dict())
    resumed = make(url, BATCH, num_workers, **options)
    resumed.load_state_dict(state)
    seen = []
    for epoch in (1, 2, 0, 3):
        resumed.dataset.set_epoch(epoch)
        seen.append(ids(resumed))
    assert seen == [reference[1][1:], reference[2], reference[0], reference[3]]


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_resume_under_other_start_methods(url: str, context: str) -> None:
    """Workers that are not forked resume the same, and go on with the next epoch."""
    reference = epochs(url, BATCH)
    options = {"multiprocessing_context": context, "persistent_workers": True}
    loader = make(url, BATCH, 2, **options)
    iterator = iter(loader)
    next(iterator)
    state = copied(loader.state_dict())
    assert ids(iterator) == reference[0][1:]
    resumed = make(url, BATCH, 2, **options)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert ids(resumed) == reference[0][1:]
    assert ids(resumed) == reference[1]
