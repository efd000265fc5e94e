"""Which epoch an iteration is, under real worker processes: every start method, workers that persist and that do not.

Here two kinds of loader pass the same tests: torch's own DataLoader, whose workers find their epoch in the dataset's
shared memory, and StreamingDataLoader, which tells them.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import pickle
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from typing import Any, Final

import pytest
import torch
from torch.utils.data import DataLoader

from streamshards import OrderOptions, StreamingDataLoader, StreamingDataset, StreamShardsError
from tests.datasets import ids, write

NUM_SAMPLES: Final = 23
BATCH: Final = 3
NUM_BATCHES: Final = 8
Batches = list[list[int]]

loaders = pytest.mark.parametrize("kind", ["plain", "streaming"])
persistence = pytest.mark.parametrize("persistent", [False, True], ids=["anew", "persistent"])
contexts = pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
workers = pytest.mark.parametrize(
    ("context", "persistent"),
    [("fork", False), ("fork", True), ("forkserver", False), ("forkserver", True), ("spawn", True)],
    ids=["fork-anew", "fork-persistent", "forkserver-anew", "forkserver-persistent", "spawn-persistent"],
)
"""Without those that start two interpreters in each pass."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("dataset") / "train")
    write(folder, range(NUM_SAMPLES), shard_bytes=600)
    return folder


@pytest.fixture(scope="module")
def epochs(url: str) -> list[Batches]:
    """The batches of the first epochs, read without any loader; all different."""
    dataset = make_dataset(url)
    read = [ids(dataset) for _ in range(9)]
    assert len({str(epoch) for epoch in read}) == 9
    assert {len(epoch) for epoch in read} == {NUM_BATCHES}
    return read


def make_dataset(url: str) -> StreamingDataset:
    order = OrderOptions(lanes=2, chunk=2, shuffle_block=6)
    return StreamingDataset(url, batch_size=BATCH, shuffle=True, seed=11, columns=["id"], order=order)


def make(
    kind: str,
    dataset: StreamingDataset,
    *,
    context: str | BaseContext = "fork",
    num_workers: int = 2,
    persistent: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    if num_workers:
        options |= {"multiprocessing_context": context, "persistent_workers": persistent}
    if kind == "streaming":
        return StreamingDataLoader(dataset, num_workers=num_workers, **options)
    return DataLoader(dataset, batch_size=None, collate_fn=same, num_workers=num_workers, **options)


def same(batch: Any) -> Any:
    return batch


# -- automatic epochs and set_epoch ------------------------------------------------------------------------------------


@loaders
@persistence
@contexts
def test_epochs_follow_and_set_epoch_goes_anywhere(
    url: str, epochs: list[Batches], kind: str, persistent: bool, context: str
) -> None:
    """0, 1; forward to 5, then 6; the same one again; back to 0, then 1: each whole, in every kind of worker."""
    dataset = make_dataset(url)
    loader = make(kind, dataset, context=context, persistent=persistent)
    plan = [(None, 0), (None, 1), (5, 5), (None, 6), (6, 6), (0, 0), (None, 1)]
    if context == "spawn" and not persistent:  # each pass starts two interpreters
        plan = [(5, 5), (None, 6)]
    for said, expected in plan:
        if said is not None:
            dataset.set_epoch(said)
        assert ids(loader) == epochs[expected]


@loaders
@persistence
def test_leaving_an_epoch_early_ends_it(url: str, epochs: list[Batches], kind: str, persistent: bool) -> None:
    """break, at the first batch or later, and iterate again: the next epoch, from its beginning."""
    loader = make(kind, make_dataset(url), persistent=persistent)
    for epoch, taken in enumerate((1, 3, NUM_BATCHES)):
        assert ids(itertools.islice(loader, taken)) == epochs[epoch][:taken]
    assert ids(loader) == epochs[3]


@loaders
@persistence
def test_set_epoch_while_an_epoch_runs(url: str, epochs: list[Batches], kind: str, persistent: bool) -> None:
    """What has begun goes on to its end; the next pass is what was said, and the last word counts."""
    dataset = make_dataset(url)
    loader = make(kind, dataset, persistent=persistent)
    running = iter(loader)
    seen = ids(itertools.islice(running, 2))  # one of each worker: both have begun
    dataset.set_epoch(7)
    seen += ids(itertools.islice(running, 2))
    dataset.set_epoch(4)
    assert seen + ids(running) == epochs[0]
    assert ids(loader) == epochs[4]
    assert ids(loader) == epochs[5]


class _Late:
    """Keeps worker 1 from beginning until it is let go."""

    def __init__(self, go: Event) -> None:
        self.go = go

    def __call__(self, worker: int) -> None:
        if worker == 1:
            self.go.wait()


@loaders
def test_set_epoch_before_the_last_worker_has_begun(url: str, epochs: list[Batches], kind: str) -> None:
    """A late worker begins the iteration it was made for, whatever has been said since."""
    context = multiprocessing.get_context("fork")
    go = context.Event()
    dataset = make_dataset(url)
    loader = make(kind, dataset, context=context, worker_init_fn=_Late(go))
    running = iter(loader)
    seen = ids([next(running)])
    dataset.set_epoch(5)
    go.set()
    assert seen + ids(running) == epochs[0]
    assert ids(loader) == epochs[5]


@persistence
def test_set_epoch_of_an_epoch_that_workers_went_on_in(url: str, epochs: list[Batches], persistent: bool) -> None:
    """A place in the dataset that workers have used is used: set_epoch of its epoch begins that epoch anew."""
    dataset = make_dataset(url)
    dataset.load_state_dict(place(url, epoch=0, taken=2))
    loader = make("plain", dataset, persistent=persistent)
    assert ids(loader) == epochs[0][2:]
    dataset.set_epoch(0)
    assert ids(loader) == epochs[0]
    assert ids(loader) == epochs[1]


def test_set_epoch_in_the_loop_is_what_the_state_says(url: str, epochs: list[Batches]) -> None:
    """From set_epoch on, a loader's state is the begin of that epoch, however often it is read and whatever the
    running pass still gives; so the state is the same as the dataset's own would be."""
    for reads in range(3):
        loader = StreamingDataLoader(make_dataset(url))
        running = iter(loader)
        next(running)
        loader.set_epoch(5)
        for _ in range(3):
            next(running)
            for _ in range(reads):
                assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (5, 0)
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (5, 0)
        assert len(ids(running)) == NUM_BATCHES - 4
        assert ids(loader) == epochs[5]


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("speaker", ["loader", "dataset"])
def test_set_epoch_of_a_loaded_epoch_as_often_as_you_like(
    url: str, epochs: list[Batches], times: int, speaker: str
) -> None:
    """A training loop and a framework may both say it: the loaded place is kept, and after it set_epoch goes back."""
    dataset = make_dataset(url)
    loader = StreamingDataLoader(dataset)
    for epoch in (0, 1):
        loader.load_state_dict(place(url, epoch=epoch, taken=2))
        for _ in range(times):
            (loader if speaker == "loader" else dataset).set_epoch(epoch)
        assert ids(loader) == epochs[epoch][2:]
    for _ in range(times):
        loader.set_epoch(0)
    assert ids(loader) == epochs[0]
    assert ids(loader) == epochs[1]


def copied(dataset: StreamingDataset) -> Iterator[StreamingDataset]:
    yield copy.copy(dataset)
    yield copy.deepcopy(dataset)
    yield pickle.loads(pickle.dumps(dataset))


@loaders
def test_copies_have_epochs_of_their_own(url: str, epochs: list[Batches], kind: str) -> None:
    """A copy, however it was made, begins where the original stood, tells its workers, and moves nobody else."""
    dataset = make_dataset(url)
    dataset.set_epoch(1)
    for other in copied(dataset):
        loader = make(kind, other)
        assert [ids(loader), ids(loader)] == epochs[1:3]
        other.set_epoch(0)
        assert ids(loader) == epochs[0]
        assert other.stats()["samples"] >= 3 * NUM_SAMPLES
    assert dataset.stats()["samples"] == 0
    assert ids(make(kind, dataset)) == epochs[1]


@pytest.mark.parametrize("looks", [False, True])
def test_set_epoch_away_and_back_gives_up_a_loaded_place(url: str, epochs: list[Batches], looks: bool) -> None:
    """set_epoch to another epoch and back begins that epoch anew, whether or not anybody looked in between."""
    loader = StreamingDataLoader(make_dataset(url))
    loader.load_state_dict(place(url, epoch=0, taken=2))
    loader.set_epoch(3)
    if looks:
        assert len(loader) == NUM_BATCHES
    loader.set_epoch(0)
    assert ids(loader) == epochs[0]


def test_only_its_own_loader_iterates_a_view(url: str) -> None:
    """What stands as ``loader.dataset`` cannot be iterated by another loader, which would not know the place."""
    loader = StreamingDataLoader(make_dataset(url))
    next(iter(loader))
    with pytest.raises(StreamShardsError, match="only that loader can iterate it"):
        iter(DataLoader(loader.dataset, batch_size=None))
    with pytest.raises(StreamShardsError, match="only that loader can iterate it"):
        iter(loader.dataset)


def test_one_seed_for_every_epoch(url: str, epochs: list[Batches]) -> None:
    """torch.manual_seed before each pass gives workers the same seed each time, and yet they are new epochs."""
    loader = make("plain", make_dataset(url))
    for epoch in range(3):
        torch.manual_seed(0)
        assert ids(loader) == epochs[epoch]


# -- several loaders over one dataset ----------------------------------------------------------------------------------


@persistence
def test_plain_loaders_share_the_epochs_of_their_dataset(url: str, epochs: list[Batches], persistent: bool) -> None:
    """Read in turns, each gets a whole epoch: the one that begins first gets the first."""
    dataset = make_dataset(url)
    one = make("plain", dataset, persistent=persistent)
    two = make("plain", dataset, num_workers=3, persistent=persistent)
    first = iter(one)
    seen = ids(itertools.islice(first, 2))
    second = iter(two)
    pairs = [(a, ids([next(second)])[0]) for a in seen] + [
        (ids([a])[0], ids([b])[0]) for a, b in zip(first, second, strict=False)
    ]
    assert [pair[0] for pair in pairs] == epochs[0]
    assert [pair[1] for pair in pairs] == epochs[1]
    dataset.set_epoch(4)
    assert ids(two) == epochs[4]


@persistence
def test_streaming_loaders_have_epochs_of_their_own(url: str, epochs: list[Batches], persistent: bool) -> None:
    """Read in turns, each goes through the epochs as if it were alone; set_epoch on the dataset is heard by both."""
    dataset = make_dataset(url)
    one = make("streaming", dataset, persistent=persistent)
    two = make("streaming", dataset, persistent=persistent, num_workers=1)
    assert ids(one) == epochs[0]
    pairs = [(ids([a])[0], ids([b])[0]) for a, b in zip(one, two, strict=True)]
    assert [pair[0] for pair in pairs] == epochs[1]
    assert [pair[1] for pair in pairs] == epochs[0]
    dataset.set_epoch(6)
    assert ids(two) == epochs[6]
    assert ids(one) == epochs[6]


def test_a_place_loaded_into_the_dataset_goes_to_whoever_iterates_first(url: str, epochs: list[Batches]) -> None:
    """A load is used by one pass: the loader that comes second begins the following epoch."""
    state = place(url, epoch=2, taken=3)
    dataset = make_dataset(url)
    one, two = make("streaming", dataset), make("streaming", dataset, num_workers=0)
    dataset.load_state_dict(state)
    assert ids(two) == epochs[2][3:]
    assert ids(one) == epochs[3]
    assert ids(two) == epochs[3]


# -- resuming ----------------------------------------------------------------------------------------------------------


def place(url: str, *, epoch: int, taken: int) -> dict[str, Any]:
    """Return the state after *taken* batches of *epoch*."""
    dataset = make_dataset(url)
    dataset.set_epoch(epoch)
    iterator = iter(dataset)
    for _ in range(taken):
        next(iterator)
    return dataset.state_dict()


@loaders
@workers
def test_workers_go_on_from_a_place_in_the_dataset(
    url: str, epochs: list[Batches], kind: str, persistent: bool, context: str
) -> None:
    """Loaded into the dataset in the main process: its workers deliver the rest, then the following epoch."""
    state = place(url, epoch=2, taken=3)
    dataset = make_dataset(url)
    loader = make(kind, dataset, context=context, persistent=persistent)
    dataset.load_state_dict(state)
    assert dataset.state_dict() == state
    dataset.set_epoch(2)
    assert dataset.state_dict() == state
    assert ids(loader) == epochs[2][3:]
    assert ids(loader) == epochs[3]


@loaders
@persistence
def test_resume_twice_and_go_back(url: str, epochs: list[Batches], kind: str, persistent: bool) -> None:
    """The same state loaded again gives the same rest again, also from a later epoch and in workers that persist."""
    state = place(url, epoch=1, taken=5)
    dataset = make_dataset(url)
    loader = make(kind, dataset, persistent=persistent)
    for _ in range(2):
        dataset.load_state_dict(state)
        assert ids(loader) == epochs[1][5:]
    assert [ids(loader) for _ in range(2)] == epochs[2:4]
    dataset.load_state_dict(state)
    assert ids(loader) == epochs[1][5:]
    assert ids(loader) == epochs[2]


@loaders
@persistence
@pytest.mark.parametrize("num_workers", [1, 3])
def test_resume_at_either_end_of_an_epoch(
    url: str, epochs: list[Batches], kind: str, persistent: bool, num_workers: int
) -> None:
    """After its last batch nothing is left of an epoch, before its first batch all of it; then the next one follows."""
    for taken in (0, NUM_BATCHES - 1, NUM_BATCHES):
        dataset = make_dataset(url)
        dataset.load_state_dict(place(url, epoch=3, taken=taken))
        loader = make(kind, dataset, persistent=persistent, num_workers=num_workers)
        assert ids(loader) == epochs[3][taken:]
        assert ids(loader) == epochs[4]


@workers
def test_resume_of_a_loader_in_every_kind_of_worker(
    url: str, epochs: list[Batches], persistent: bool, context: str
) -> None:
    """What a StreamingDataLoader loads goes to its workers, twice, and in workers that have run before."""
    state = place(url, epoch=2, taken=3)
    loader = StreamingDataLoader(
        make_dataset(url), num_workers=2, multiprocessing_context=context, persistent_workers=persistent
    )
    for _ in range(2):
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert ids(itertools.islice(loader, 2)) == epochs[2][3:5]
        assert loader.state_dict()["position"] == 5 * BATCH
    again = loader.state_dict()
    loader.load_state_dict(again)
    assert ids(loader) == epochs[2][5:]
    assert ids(loader) == epochs[3]
