"""StreamingDataset: what is delivered, in which order, and what it says of itself."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch.utils.data import DataLoader

from streamshards import (
    IndexInvalid,
    OptionInvalid,
    OrderOptions,
    PrefetchOptions,
    ResumeMismatch,
    RetryOptions,
    StoreUnavailable,
    StreamingDataLoader,
    StreamingDataset,
    StreamShardsError,
    Topology,
    UnsafePickle,
    open_shard,
)
from streamshards.convert.indexing import build_index
from tests.conftest import StoreUrl
from tests.datasets import assert_same, flat, ids, sample, write

NUM_SAMPLES = 2345
LANES = OrderOptions(lanes=4, shuffle_block=300)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset") / "train"
    write(str(folder), range(NUM_SAMPLES))
    return str(folder)


def streaming_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamshards-")]


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_samples_come_back_as_they_went_in(store_url: StoreUrl) -> None:
    """Exact round trip of every field kind on every kind of store, in the order written."""
    url, storage_options = store_url
    write(url, range(300), storage_options=storage_options)
    delivered = list(StreamingDataset(url, storage_options=storage_options))
    assert len(delivered) == 300
    for number, got in enumerate(delivered):
        assert_same(got, sample(number))


def test_batches_hold_the_same_values_as_samples(url: str) -> None:
    """A batch stacks tensors, lists what varies, and marks what is absent."""
    batch = next(iter(StreamingDataset(url, batch_size=64)))
    expected = [sample(number) for number in range(64)]
    assert batch["id"].tolist() == list(range(64))
    assert batch["id"].dtype == torch.int64
    assert torch.equal(batch["x"], torch.stack([s["x"] for s in expected]))
    assert batch["half"].dtype == torch.bfloat16
    assert all(torch.equal(got, s["tokens"]) for got, s in zip(batch["tokens"], expected, strict=True))
    assert batch["text"] == [s["text"] for s in expected]
    assert batch["blob"] == [s["blob"] for s in expected]
    assert batch["meta"]["tags"] == [s["meta"]["tags"] for s in expected]
    assert batch["meta"]["score"].dtype == torch.float64
    assert batch["maybe?"].tolist() == [s["maybe"] is not None for s in expected]
    assert batch["maybe"][batch["maybe?"]].tolist() == list(range(0, 64, 4))


@pytest.mark.parametrize("lanes", [None, 1, 3, 64])
@pytest.mark.parametrize("batch_size", [None, 1, 32, 5000])
def test_shuffled_epoch_is_a_permutation(url: str, lanes: int | None, batch_size: int | None) -> None:
    """Every sample once, whatever the lanes and the batch size; "pad" wraps to the epoch's first samples."""
    dataset = StreamingDataset(url, shuffle=True, batch_size=batch_size, order=OrderOptions(lanes=lanes))
    delivered = [s["id"] for s in dataset] if batch_size is None else flat(ids(dataset))
    assert sorted(delivered[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))
    assert delivered[:NUM_SAMPLES] != list(range(NUM_SAMPLES))
    padding = delivered[NUM_SAMPLES:]
    assert padding == (delivered[:NUM_SAMPLES] * 3)[: len(padding)]
    assert len(padding) == -NUM_SAMPLES % (batch_size or 1)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_batches_are_the_same_with_any_number_of_workers(url: str, num_workers: int) -> None:
    """2,345 odd samples in batches: with the order's lanes given, workers change nothing at all."""
    reference = ids(StreamingDataset(url, batch_size=32, shuffle=True, seed=5, order=LANES))
    dataset = StreamingDataset(url, batch_size=32, shuffle=True, seed=5, order=LANES)
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=_identity)
    assert ids(loader) == reference


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_samples_batched_by_torch_come_once_each(url: str, num_workers: int) -> None:
    """Sample mode under a plain DataLoader with its own batch size: 2,345 odd samples, each exactly once."""
    dataset = StreamingDataset(url, shuffle=True, columns=["id", "x"])
    loader = DataLoader(dataset, batch_size=32, num_workers=num_workers)
    batches = list(loader)
    delivered = flat(ids(batches))
    assert sorted(delivered) == list(range(NUM_SAMPLES))
    assert all(torch.equal(b["x"][:, 0].long(), b["id"]) for b in batches)


def test_samples_sent_by_a_worker_own_their_memory(url: str) -> None:
    """A sample from a worker does not drag the memory of its thousand neighbours through the queue."""
    got = next(iter(DataLoader(StreamingDataset(url), batch_size=None, num_workers=1, collate_fn=_identity)))
    assert got["x"].untyped_storage().nbytes() == got["x"].nbytes


def _identity(batch: Any) -> Any:
    return batch


def test_ranks_together_deliver_every_global_batch(url: str) -> None:
    """The global batch t is the same samples in the same order on 1, 2 and 4 ranks."""
    whole = ids(StreamingDataset(url, batch_size=32, shuffle=True, order=LANES))
    for world_size in (2, 4):
        parts = [
            ids(
                StreamingDataset(
                    url,
                    batch_size=32 // world_size,
                    shuffle=True,
                    order=OrderOptions(lanes=4, shuffle_block=300),
                    topology=Topology(rank=rank, world_size=world_size),
                )
            )
            for rank in range(world_size)
        ]
        assert [flat(step) for step in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("tail", ["pad", "drop", "uneven"])
def test_tails(url: str, tail: Any) -> None:
    """Over 3 ranks: pad and drop give equal counts, uneven gives every sample exactly once; len is exact."""
    datasets = [
        StreamingDataset(url, batch_size=32, tail=tail, topology=Topology(rank=rank, world_size=3)) for rank in range(3)
    ]
    parts = [ids(dataset) for dataset in datasets]
    assert [len(part) for part in parts] == [len(dataset) for dataset in datasets]
    delivered = flat(flat(parts))
    if tail == "uneven":
        assert sorted(delivered) == list(range(NUM_SAMPLES))
    else:
        assert len({len(part) for part in parts}) == 1
        assert len(delivered) == (25 if tail == "pad" else 24) * 96


def test_columns_selects_fields_and_whole_structs(url: str) -> None:
    """Only the named fields are read and delivered, in the dataset's own order."""
    dataset = StreamingDataset(url, columns=["text", "meta.score"])
    assert next(iter(dataset)) == {"text": sample(0)["text"], "meta": {"score": 0.0}}
    assert [field.name for field in dataset.schema.fields] == ["text", "meta.score"]
    assert list(StreamingDataset(url, columns=["meta"])[3]["meta"]) == ["tags", "score", "flag"]


def test_transforms(url: str) -> None:
    """transform sees samples, batch_transform batches; with both, transformed samples are collated by torch."""
    assert next(iter(StreamingDataset(url, transform=lambda s: s["id"] * 10))) == 0
    batch = next(iter(StreamingDataset(url, batch_size=4, transform=lambda s: {"double": s["x"] * 2})))
    assert torch.equal(batch["double"], torch.stack([sample(i)["x"] * 2 for i in range(4)]))
    total = next(iter(StreamingDataset(url, batch_size=4, batch_transform=lambda b: int(b["id"].sum()))))
    assert total == 6
    assert StreamingDataset(url, transform=lambda s: s["id"])[7] == 7


def test_an_error_in_a_transform_is_the_users_own_and_loses_nothing(url: str) -> None:
    """The exception arrives as raised; the iterator goes on with the next sample."""

    def picky(s: dict[str, Any]) -> int:
        if s["id"] == 3:
            raise ZeroDivisionError("three")
        return int(s["id"])

    iterator = iter(StreamingDataset(url, transform=picky))
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="three"):
        next(iterator)
    assert next(iterator) == 4


def test_stop_iteration_in_a_transform_does_not_end_the_epoch(url: str) -> None:
    """A next() on an exhausted helper inside a transform is an error, not the end of the data."""

    def exhausted(s: dict[str, Any]) -> Any:
        return next(iter(())) if s["id"] == 37 else s["id"]

    for batch_size in (None, 10):
        with pytest.raises(RuntimeError, match="StopIteration"):
            list(StreamingDataset(url, batch_size=batch_size, transform=exhausted))


def test_what_a_transform_failed_on_has_not_been_received(url: str) -> None:
    """A state saved in the exception handler resumes with the batch that failed; going on counts it as passed."""

    def picky(batch: dict[str, Any]) -> list[int]:
        if 40 in batch["id"]:
            raise ZeroDivisionError
        return batch["id"].tolist()

    dataset = StreamingDataset(url, batch_size=10, batch_transform=picky)
    loader = StreamingDataLoader(StreamingDataset(url, batch_size=10, batch_transform=picky))
    for source in (dataset, loader):
        iterator = iter(source)
        for _ in range(4):
            next(iterator)
        with pytest.raises(ZeroDivisionError):
            next(iterator)
        assert source.state_dict()["position"] == 40
        assert next(iterator) == list(range(50, 60))
        assert source.state_dict()["position"] == 60


# -- random access and what the dataset says of itself -----------------------------------------------------------------


def test_random_access(url: str) -> None:
    """ds[i] is sample i of the index, from either end."""
    dataset = StreamingDataset(url, shuffle=True)
    for number in (0, 1, 1000, NUM_SAMPLES - 1):
        assert_same(dataset[number], sample(number))
    assert dataset[-1]["id"] == NUM_SAMPLES - 1
    for number in (NUM_SAMPLES, -NUM_SAMPLES - 1):
        with pytest.raises(IndexError, match=r"2,345"):
            dataset[number]


def test_only_whole_numbers_find_samples(url: str) -> None:
    """Anything with an index works, slices and names are refused in words."""
    dataset = StreamingDataset(url)
    assert dataset[torch.tensor(3)]["id"] == 3
    for wrong in (slice(0, 3), "id", 1.5):
        with pytest.raises(TypeError, match=r"ds\[i\] takes a whole number"):
            dataset[wrong]  # type: ignore[index]


def test_what_the_dataset_says(url: str) -> None:
    """len, num_samples, schema, repr and stats."""
    dataset = StreamingDataset(url, batch_size=32)
    assert dataset.num_samples == NUM_SAMPLES
    assert len(dataset) == 74
    assert "samples=2,345" in repr(dataset)
    assert "float32 (3,)" in dataset.schema.describe()
    list(dataset)
    stats = dataset.stats()
    assert stats["batches"] == 74
    assert stats["samples"] == 74 * 32
    assert stats["shards_read"] == dataset.index.num_shards
    assert stats["bytes_read"] == int(dataset.index.sizes.sum())
    assert stats["shards_skipped"] == stats["retries"] == 0


def test_workers_count_into_the_same_stats(url: str) -> None:
    """What workers count is seen in the main process, after they are gone."""
    dataset = StreamingDataset(url, batch_size=32)
    list(DataLoader(dataset, batch_size=None, num_workers=2, collate_fn=_identity))
    assert dataset.stats()["batches"] == 74


def test_open_shard(url: str) -> None:
    """A single shard opens without its index."""
    dataset = StreamingDataset(url)
    shard = open_shard(f"{url}/{dataset.index.names[0]}")
    assert shard.num_rows == int(dataset.index.rows[0])
    assert shard.columns().data[("id",)].values.tolist() == list(range(shard.num_rows))


# -- epochs and state --------------------------------------------------------------------------------------------------


def first_ids(dataset: StreamingDataset) -> list[int]:
    return next(iter(dataset))["id"].tolist()


def epoch_start(url: str, epoch: int) -> list[int]:
    dataset = StreamingDataset(url, batch_size=32, shuffle=True)
    dataset.set_epoch(epoch)
    return first_ids(dataset)


def test_each_iteration_is_the_next_epoch(url: str) -> None:
    """Epochs advance by themselves, each in an order of its own, and set_epoch goes to any of them."""
    dataset = StreamingDataset(url, batch_size=32, shuffle=True)
    starts = [first_ids(dataset) for _ in range(3)]
    assert len({tuple(start) for start in starts}) == 3
    assert starts == [epoch_start(url, epoch) for epoch in range(3)]
    dataset.set_epoch(1)
    assert first_ids(dataset) == starts[1]
    assert first_ids(dataset) == starts[2]


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_epochs_advance_and_set_epoch_reaches_workers(url: str, persistent_workers: bool) -> None:
    """A plain DataLoader's workers, made anew or persistent, all see the same epoch, also after set_epoch."""
    dataset = StreamingDataset(url, batch_size=32, shuffle=True, order=LANES)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=persistent_workers, collate_fn=_identity
    )
    reference = StreamingDataset(url, batch_size=32, shuffle=True, order=LANES)
    epochs = [ids(reference) for _ in range(3)]
    assert ids(loader) == epochs[0]
    assert ids(loader) == epochs[1]
    dataset.set_epoch(0)
    assert ids(loader) == epochs[0]
    dataset.set_epoch(2)
    assert ids(loader) == epochs[2]


def test_workers_of_one_iteration_agree_on_its_epoch(url: str) -> None:
    """More workers in the next epoch, an iteration left at once, a seed that comes again: always whole epochs."""
    dataset = StreamingDataset(url, batch_size=32, shuffle=True, order=LANES)
    reference = StreamingDataset(url, batch_size=32, shuffle=True, order=LANES)
    epochs = [ids(reference) for _ in range(6)]
    for num_workers in (1, 3, 2):
        torch.manual_seed(0)
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=_identity)
        delivered = ids(loader)
        assert delivered in epochs
        epochs.remove(delivered)


@pytest.mark.parametrize("batch_size", [None, 32])
def test_resume_at_every_kind_of_point(url: str, batch_size: int | None) -> None:
    """From the state after any number of items the rest follows exactly; the state is what was loaded, until next."""

    def make() -> StreamingDataset:
        return StreamingDataset(url, batch_size=batch_size, shuffle=True, columns=["id"], order=LANES)

    def plain(item: dict[str, Any]) -> Any:
        return item["id"] if batch_size is None else item["id"].tolist()

    reference = [plain(item) for item in make()]
    for taken in (0, 1, 2, 37, len(reference) - 1, len(reference)):
        dataset = make()
        iterator = iter(dataset)
        for _ in range(taken):
            next(iterator)
        state = json.loads(json.dumps(dataset.state_dict()))
        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert [plain(item) for item in resumed] == reference[taken:]
        assert resumed.state_dict()["position"] == NUM_SAMPLES
        assert plain(next(iter(resumed))) == plain(next(iter(_at_epoch(make(), 1))))


def _at_epoch(dataset: StreamingDataset, epoch: int) -> StreamingDataset:
    dataset.set_epoch(epoch)
    return dataset


def test_state_is_small_fresh_and_plain(url: str) -> None:
    """Under 1 KiB of JSON, a new dict every time, and valid before the first item and after the last."""
    dataset = StreamingDataset(url, batch_size=32)
    before = dataset.state_dict()
    assert before["position"] == 0
    assert dataset.state_dict() is not before
    for _ in dataset:
        pass
    after = dataset.state_dict()
    assert (after["epoch"], after["position"]) == (0, NUM_SAMPLES)
    assert len(json.dumps(after)) < 1024


def test_a_state_that_only_workers_know_is_refused_not_guessed(url: str) -> None:
    """With a plain DataLoader's workers the main process does not know the place, and says so."""
    dataset = StreamingDataset(url, batch_size=32)
    list(DataLoader(dataset, batch_size=None, num_workers=1, collate_fn=_identity))
    with pytest.raises(StreamShardsError, match="StreamingDataLoader"):
        dataset.state_dict()


def test_the_state_outlives_a_set_epoch_of_the_same_epoch(url: str) -> None:
    """The usual loop calls set_epoch(e) first: that must not throw away a place inside epoch e."""
    dataset = StreamingDataset(url, batch_size=32, shuffle=True)
    iterator = iter(dataset)
    next(iterator)
    state = dataset.state_dict()
    second = ids([next(iterator)])
    resumed = StreamingDataset(url, batch_size=32, shuffle=True)
    resumed.load_state_dict(state)
    resumed.set_epoch(0)
    assert ids([next(iter(resumed))]) == second
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    assert first_ids(resumed) == epoch_start(url, 4)


def test_another_batch_size_goes_on_at_the_same_sample(url: str) -> None:
    """The state counts samples: a resume with another batch size continues the same order."""
    dataset = StreamingDataset(url, batch_size=32, shuffle=True)
    order = flat(ids(StreamingDataset(url, batch_size=32, shuffle=True)))
    iterator = iter(dataset)
    for _ in range(5):
        next(iterator)
    resumed = StreamingDataset(url, batch_size=48, shuffle=True)
    resumed.load_state_dict(dataset.state_dict())
    assert flat(ids(resumed))[: NUM_SAMPLES - 160] == order[160:NUM_SAMPLES]


def test_another_dataset_or_seed_is_refused(url: str, tmp_path: Path) -> None:
    """ResumeMismatch names what differs."""
    state = StreamingDataset(url, batch_size=32, shuffle=True, seed=1).state_dict()
    with pytest.raises(ResumeMismatch, match="seed is 2 here and 1 in the state"):
        StreamingDataset(url, batch_size=32, shuffle=True, seed=2).load_state_dict(state)
    write(str(tmp_path / "other"), range(10))
    with pytest.raises(ResumeMismatch, match=r"num_samples is 10 here and 2345.*fingerprint"):
        StreamingDataset(str(tmp_path / "other"), shuffle=True, seed=1).load_state_dict(state)


# -- processes and threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_of_every_start_method(url: str, context: str) -> None:
    """The dataset is safe to fork and to pickle, also while its own threads are running."""
    dataset = StreamingDataset(url, batch_size=32, shuffle=True, order=LANES)
    running = iter(dataset)
    reference = ids([next(running)])
    dataset.set_epoch(0)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context, collate_fn=_identity)
    delivered = ids(loader)
    assert delivered[:1] == reference
    assert len(delivered) == 74
    assert len(ids(running)) == 73


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda ds: pickle.loads(pickle.dumps(ds))])
def test_copies_iterate_on_their_own(url: str, duplicate: Callable[[StreamingDataset], StreamingDataset]) -> None:
    """A copied or pickled dataset delivers the same epoch."""
    dataset = StreamingDataset(url, batch_size=32, shuffle=True)
    assert ids(duplicate(dataset)) == ids(StreamingDataset(url, batch_size=32, shuffle=True))


def test_leaving_the_loop_leaves_no_thread(url: str) -> None:
    """break, an exception in the body, and a forgotten iterator each end all threads."""
    dataset = StreamingDataset(url, batch_size=32)
    for _ in dataset:
        break
    with pytest.raises(ZeroDivisionError):
        for _ in dataset:
            raise ZeroDivisionError
    next(iter(dataset))
    gc.collect()
    assert streaming_threads() == []


def test_ranks_come_from_the_environment_or_the_process_group(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """RANK and WORLD_SIZE, then an initialised process group, decide at iteration, not at construction."""
    dataset = StreamingDataset(url, batch_size=8, order=OrderOptions(lanes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionInvalid, match="RANK is not set"):
        iter(dataset)
    monkeypatch.setenv("RANK", "1")
    assert next(iter(dataset))["id"].tolist() == list(range(8, 16))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert next(iter(dataset))["id"].tolist() == list(range(8))
    finally:
        torch.distributed.destroy_process_group()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_memory_that_cannot_hold_one_block_of_each_lane_is_refused_at_the_start(url: str) -> None:
    """The error says how much is needed, and that much is enough."""
    order = OrderOptions(lanes=16)
    dataset = StreamingDataset(url, batch_size=32, order=order, prefetch=PrefetchOptions(memory_bytes="100KiB"))
    with pytest.raises(OptionInvalid, match=r"interleaves 16 lanes.*Set memory_bytes=") as refused:
        iter(dataset)
    needed = str(refused.value).split('memory_bytes="')[1].split('"')[0]
    enough = StreamingDataset(url, batch_size=32, order=order, prefetch=PrefetchOptions(memory_bytes=needed))
    assert len(ids(enough)) == 74


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"seed": -1}, "seed=-1"),
        ({"tail": "wrap"}, "tail='wrap'"),
        ({"on_corrupt": "ignore"}, "on_corrupt='ignore'"),
        ({"max_corrupt": 2}, "max_corrupt=2"),
        ({"columns": ["nope"]}, "no 'nope'"),
        ({"columns": "id"}, "must be a list"),
        ({"columns": []}, "selects nothing"),
        ({"order": OrderOptions(lanes=5000)}, r"lanes=5,000 is more than the 2,345 samples"),
        ({"batch_transform": print}, "needs a batch_size"),
        ({"order": {"lanes": 2}}, r"must be OrderOptions"),
        ({"retry": 5}, r"retry=5 must be RetryOptions"),
        ({"prefetch": "1GiB"}, r"must be PrefetchOptions"),
        ({"topology": (0, 2)}, r"must be Topology"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_value(url: str, options: dict[str, Any], text: str) -> None:
    """One line, naming the option and what it was."""
    with pytest.raises(OptionInvalid, match=text):
        StreamingDataset(url, **options)


def test_drop_that_leaves_nothing_is_an_error_not_an_empty_epoch(url: str) -> None:
    """tail="drop" with a global batch larger than the dataset would silently train on nothing."""
    with pytest.raises(OptionInvalid, match=r"leaves nothing of 2,345 samples"):
        iter(StreamingDataset(url, batch_size=4000, tail="drop"))


def test_not_a_dataset(tmp_path: Path) -> None:
    """The error says what was found and which command makes a dataset of it."""
    torch.save(torch.zeros(3), tmp_path / "a.pt")
    with pytest.raises(IndexInvalid, match="streamshards index"):
        StreamingDataset(str(tmp_path))


def test_a_foreign_pickle_that_needs_code_is_never_skipped(tmp_path: Path) -> None:
    """Nothing is broken there, a flag is missing: the error comes at once and names it."""
    for number in range(20):
        torch.save({"x": np.zeros(2) if number == 13 else torch.zeros(2).double()}, tmp_path / f"{number:02d}.pt")
    build_index(str(tmp_path), layout="sample", trust_pickle=True)
    with pytest.raises(UnsafePickle, match=r"numpy.*trust_pickle=True"):
        list(StreamingDataset(str(tmp_path), max_corrupt=1.0))


def test_an_endpoint_that_never_answered_is_given_up_early() -> None:
    """Opening has its own, short deadline."""
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9"):
        StreamingDataset(
            "s3://bucket/x",
            storage_options={"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"},
            retry=RetryOptions(first_contact_s=3.0),
        )


def test_an_empty_dataset_yields_nothing(tmp_path: Path) -> None:
    """No samples, no batches, no error."""
    write(str(tmp_path / "empty"), [])
    dataset = StreamingDataset(str(tmp_path / "empty"), batch_size=4, shuffle=True)
    assert (len(dataset), list(dataset)) == (0, [])
    assert list(StreamingDataset(str(tmp_path / "empty"))) == []


def test_nothing_is_logged_when_nothing_went_wrong(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A clean epoch is silent."""
    with caplog.at_level(logging.DEBUG, logger="streamshards"):
        list(StreamingDataset(url, batch_size=64))
    assert caplog.records == []
