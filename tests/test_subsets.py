"""take, skip and split on real datasets: which samples come, in which order, on any cluster, and what states say."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from torch.utils.data import DataLoader

from streamshards import (
    OptionInvalid,
    OrderOptions,
    PrefetchOptions,
    ResumeMismatch,
    RetryOptions,
    StreamingDataLoader,
    StreamingDataset,
    TooManyCorrupt,
    Topology,
)
from streamshards.convert.indexing import build_index
from streamshards.engine.blocks import BlockBuffers, finish, open_piece, span_of
from streamshards.engine.labels import Labels
from streamshards.plan.order import EpochOrder, OrderSettings
from streamshards.plan.subset import Subset, require_split
from streamshards.testing import FakeClock
from tests.datasets import assert_same, flat, ids, sample, write
from tests.engine.rig import Rig, numbered
from tests.pt_files import LAYOUTS, all_expected, fill

NUM_SAMPLES = 601
LANES = OrderOptions(lanes=4, shuffle_block=100)

Choose: TypeAlias = Callable[[StreamingDataset], StreamingDataset]

CHOICES: dict[str, Choose] = {
    "take": lambda ds: ds.take(333),
    "skip": lambda ds: ds.skip(333),
    "take a part of a shard": lambda ds: ds.skip(3).take(5),
    "split by sample, first": lambda ds: ds.split(0.8, seed=2)[0],
    "split by sample, second": lambda ds: ds.split(0.8, seed=2)[1],
    "split by shard, first": lambda ds: ds.split(0.8, seed=2, by="shard")[0],
    "split by shard, second": lambda ds: ds.split(0.8, seed=2, by="shard")[1],
    "a split of a split": lambda ds: ds.split(0.9, seed=2)[0].split(0.5, seed=2)[1].skip(17).take(200),
    "a split of whole shards": lambda ds: ds.split(0.5, by="shard")[1].split(0.7)[0],
}
each_choice = pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("dataset") / "train")
    write(folder, range(NUM_SAMPLES), shard_bytes=2_000)
    return folder


def opened(url: str, choose: Choose, **options: Any) -> StreamingDataset:
    defaults: dict[str, Any] = {"shuffle": True, "seed": 4, "order": LANES}
    return choose(StreamingDataset(url, **defaults | options))


def members(dataset: StreamingDataset) -> list[int]:
    """Return the ids of *dataset*, in the order of the index, from its plan alone."""
    first = np.concatenate([[0], np.cumsum(dataset.index.rows)]).tolist()
    subset = Subset(dataset.index.rows, dataset._subset.cuts)
    return [first[shard] + int(row) for shard in subset.shards.tolist() for row in subset.rows_of(shard)]


def planned(dataset: StreamingDataset, settings: OrderSettings, epoch: int) -> list[int]:
    """Return the ids of an epoch of *dataset*, from its plan alone."""
    subset = dataset._subset
    order = EpochOrder(subset.rows, settings, epoch, shards=subset.shards)
    shards, rows = order.rows_at(np.arange(order.num_samples))
    first = np.concatenate([[0], np.cumsum(dataset.index.rows)]).tolist()
    found = {shard: np.asarray(subset.rows_of(shard)).tolist() for shard in subset.shards.tolist()}
    return [first[shard] + found[shard][row] for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]


SETTINGS = OrderSettings(shuffle=True, seed=4, lanes=4, chunk=2, shuffle_block=100)
"""Of LANES with a global batch of 8."""


# -- what comes out ----------------------------------------------------------------------------------------------------


@each_choice
def test_an_epoch_is_the_subset_in_its_own_shuffled_order(url: str, choose: Choose) -> None:
    """Each sample of the subset once, no other, whole in every field, in another order each epoch; as planned."""
    dataset = opened(url, choose, batch_size=8)
    expected = members(dataset)
    assert dataset.num_samples == len(expected)
    epochs = [flat(ids(dataset)) for _ in range(3)]
    for number, epoch in enumerate(epochs):
        assert epoch[: len(expected)] == planned(dataset, SETTINGS, number)
        assert sorted(epoch[: len(expected)]) == expected
        assert epoch[len(expected) :] == epoch[: len(epoch) - len(expected)]
    assert len({tuple(epoch) for epoch in epochs}) > 1
    in_order = list(opened(url, choose, shuffle=False, order=OrderOptions(lanes=1)))
    assert [got["id"] for got in in_order] == expected
    for got in in_order:
        assert_same(got, sample(got["id"]))


@each_choice
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_workers_change_nothing(url: str, choose: Choose, num_workers: int, batch_size: int | None) -> None:
    """Under workers a subset has the same order, in batches and in single samples."""
    order = OrderOptions(lanes=4, chunk=2, shuffle_block=100)
    dataset = opened(url, choose, batch_size=batch_size, order=order, columns=["id"])
    loader = StreamingDataLoader(dataset, num_workers=num_workers)
    for epoch in range(2):
        items = list(loader)
        got = flat(ids(items)) if batch_size else [item["id"] for item in items]
        assert len(items) == len(dataset)
        assert got[: dataset.num_samples] == planned(dataset, SETTINGS, epoch)


@each_choice
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_deliver_the_subset(url: str, choose: Choose, world_size: int) -> None:
    """Each global batch of a subset is the same on 1, 2 and 4 ranks; the ranks have as many batches."""
    whole = ids(opened(url, choose, batch_size=8))
    parts = [
        ids(opened(url, choose, batch_size=8 // world_size, topology=Topology(rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]
    assert [flat(step) for step in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("by", ["sample", "shard"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_the_sides_of_a_split_share_nothing(url: str, fraction: float, by: Any) -> None:
    """What the two sides deliver is disjoint, together everything, and the first side has exactly its part."""
    train, valid = StreamingDataset(url, shuffle=True, columns=["id"]).split(fraction, seed=9, by=by)
    first, second = [got["id"] for got in train], [got["id"] for got in valid]
    assert sorted(first + second) == list(range(NUM_SAMPLES))
    assert len(first) == train.num_samples == int(Fraction(str(fraction)) * NUM_SAMPLES)


def test_by_shard_each_side_reads_its_own_shards(url: str) -> None:
    """By shard, the two sides together fetch each shard once, and the one that both have twice."""
    whole = StreamingDataset(url, columns=["id"])
    sides = whole.split(0.8, seed=2, by="shard")
    for side in sides:
        list(side)
    fetched = [side.stats()["shards_read"] for side in sides]
    assert whole.index.num_shards <= sum(fetched) <= whole.index.num_shards + 1


@each_choice
def test_random_access_and_len(url: str, choose: Choose) -> None:
    """``ds[i]`` is the i-th sample of the subset in the order of the index; ``len`` counts its batches."""
    dataset, expected = opened(url, choose), members(opened(url, choose))
    assert len(dataset) == len(expected)
    for number in (0, 1, len(expected) // 2, -1, -len(expected)):
        assert_same(dataset[number], sample(expected[number]))
    for number in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError, match=f"of {len(expected)}"):
            dataset[number]
    assert len(opened(url, choose, batch_size=8)) == -(-len(expected) // 8)
    assert len(opened(url, choose, batch_size=8, tail="drop")) == len(expected) // 8


@pytest.mark.parametrize(
    ("num_workers", "tail", "batch_size"),
    [(0, "pad", None), (0, "pad", 8), (0, "drop", 8), (0, "uneven", 8), (2, "pad", None), (2, "drop", 8)],
)
def test_a_subset_of_nothing_is_empty(url: str, num_workers: int, tail: Any, batch_size: int | None) -> None:
    """No sample is no batch, no error and no endless loop, epoch after epoch."""
    whole = StreamingDataset(url, shuffle=True, batch_size=batch_size, tail=tail)
    for nothing in (whole.take(0), whole.skip(NUM_SAMPLES), whole.split(0.0)[0], whole.split(1.0, by="shard")[1]):
        assert nothing.num_samples == len(nothing) == 0
    for nothing in (whole.take(0), whole.split(0.0)[0]):
        loader = StreamingDataLoader(nothing, num_workers=num_workers)
        assert (list(loader), list(loader)) == ([], [])
        assert nothing.num_samples == len(nothing) == len(loader) == 0
        assert nothing.take(3).split(0.5)[0].num_samples == 0
        again = StreamingDataLoader(nothing, num_workers=num_workers)
        again.load_state_dict(loader.state_dict())
        assert list(again) == []
        with pytest.raises(IndexError):
            nothing[0]


def test_a_cut_leaves_the_dataset_it_was_cut_from(url: str) -> None:
    """A subset begins at epoch 0 and has its own place and counts, whatever has become of the whole."""
    whole = StreamingDataset(url, shuffle=True, batch_size=8)
    iterator = iter(whole)
    for _ in range(5):
        next(iterator)
    part = whole.take(16)
    assert part.stats()["batches"] == 0
    assert part.state_dict()["epoch"] == part.state_dict()["position"] == 0
    list(part)
    assert part.state_dict()["position"] == 16
    assert whole.state_dict()["position"] == 40
    assert len(list(iterator)) == len(whole) - 5


def test_a_subset_knows_its_name(url: str) -> None:
    """The repr says how it was cut."""
    part = StreamingDataset(url).split(0.8, seed=2)[0].take(100)
    assert repr(part).endswith(").split(0.8, seed=2, by='sample')[0].take(100)")
    assert "samples=100" in repr(part)


@pytest.mark.parametrize("num", [-1, 1.5, "3", None, True, 2**63])
def test_counts_are_whole_numbers(url: str, num: Any) -> None:
    """Anything else is refused, with its value."""
    dataset = StreamingDataset(url)
    for cut in (dataset.take, dataset.skip):
        with pytest.raises(OptionInvalid, match="must be a whole number"):
            cut(num)
    assert dataset.take(2**63 - 1).num_samples == NUM_SAMPLES


def test_a_part_too_small_for_the_lanes_has_as_many_as_it_can(url: str) -> None:
    """The small side of a split need not be told other lanes than the large one."""
    dataset = StreamingDataset(url, columns=["id"], shuffle=True, order=OrderOptions(lanes=8))
    assert dataset.take(8).state_dict()["lanes"] == 8
    assert dataset.take(7).state_dict()["lanes"] == 7
    assert sorted(sample["id"] for sample in dataset.take(3)) == [0, 1, 2]


def test_columns_and_transforms_hold_for_subsets(url: str) -> None:
    """A subset reads the selected fields alone and applies the transform."""
    whole = StreamingDataset(url, columns=["id", "meta.score"], transform=lambda got: (got["id"], got["meta"]["score"]))
    part = whole.split(0.5, seed=1)[1]
    assert list(part) == [(number, number / 8) for number in members(part)]
    assert part[3] == (members(part)[3], members(part)[3] / 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by", ["sample", "shard"])
def test_subsets_of_files_in_place(tmp_path: Path, layout: str, by: Any) -> None:
    """Foreign files that an index names are cut like shards: each sample is on one side, whole."""
    src = fill(tmp_path, layout)
    build_index(src)
    wanted = all_expected(layout)
    whole = StreamingDataset(str(src))
    train, valid = whole.split(0.7, seed=5, by=by)
    for part in (train, valid, whole.skip(3).take(len(wanted) // 2), train.split(0.5)[0]):
        numbers = members(part)
        got = list(part)
        assert len(got) == len(numbers)
        for actual, number in zip(got, numbers, strict=True):
            assert_same(actual, wanted[number])
    assert sorted(members(train) + members(valid)) == list(range(len(wanted)))


def test_subsets_in_spawned_workers(url: str) -> None:
    """A subset is carried to a process that starts from nothing, and it can be copied."""
    dataset = opened(url, CHOICES["a split of a split"], batch_size=8, columns=["id"])
    expected = planned(dataset, SETTINGS, 0)
    assert flat(ids(copy.deepcopy(dataset))) == expected
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="forkserver", collate_fn=_same)
    assert flat(ids(loader)) == expected


def _same(batch: Any) -> Any:
    return batch


# -- states ------------------------------------------------------------------------------------------------------------


@each_choice
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_in_the_middle_goes_on_anywhere(url: str, choose: Choose, num_workers: int) -> None:
    """One rank writes a state; three others of another batch size go on with the next sample, then the next epoch."""
    context = {"multiprocessing_context": "fork"} if num_workers else {}
    dataset = opened(url, choose, batch_size=8)
    writer = StreamingDataLoader(dataset, num_workers=num_workers, **context)
    steps = len(writer) // 2
    iterator = iter(writer)
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(writer.state_dict()))
    assert state["subset"] == dataset._subset.name
    readers = []
    for rank in range(3):
        reader = StreamingDataLoader(opened(url, choose, batch_size=3, topology=Topology(rank=rank, world_size=3)))
        reader.load_state_dict(state)
        readers.append(reader)
    left = planned(dataset, SETTINGS, 0)[8 * steps :]
    rest = flat(flat(ids(parts)) for parts in zip(*readers, strict=True))
    assert rest[: len(left)] == left
    following = flat(flat(ids(parts)) for parts in zip(*readers, strict=True))
    assert following[: dataset.num_samples] == planned(dataset, SETTINGS, 1)


def test_states_of_other_subsets_are_refused(url: str) -> None:
    """The whole, the other side, another seed and another length: the error names both subsets."""
    whole = StreamingDataset(url, batch_size=8)
    parts = [
        whole,
        *whole.split(0.5, seed=1),
        whole.split(0.5, seed=2)[0],
        whole.split(0.5, seed=1, by="shard")[0],
        whole.take(300),
        whole.skip(300),
    ]
    for here in parts:
        iterator = iter(here)
        next(iterator)
        state = here.state_dict()
        assert ("subset" in state) == (here is not whole)
        for other in parts:
            if other is here:
                copy.deepcopy(other).load_state_dict(state)
                continue
            for strict in (True, False):
                with pytest.raises(ResumeMismatch, match="subset is ") as refused:
                    other.load_state_dict(state, strict=strict)
                for part in (here, other):
                    assert (repr(part._subset.name) if part is not whole else "missing") in str(refused.value)


def test_a_state_between_epochs_fits_another_subset_if_asked(url: str) -> None:
    """At the end of an epoch, ``strict=False`` goes on with the next epoch of what is open here."""
    first, second = StreamingDataset(url, batch_size=8, shuffle=True, columns=["id"]).split(0.5)
    list(first)
    second.load_state_dict(first.state_dict(), strict=False)
    got = ids(second)
    assert second.state_dict()["epoch"] == 1
    second.set_epoch(1)
    assert ids(second) == got


# -- bad shards --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(url: str) -> tuple[str, set[int]]:
    """The same dataset with a third of its shards damaged, and the ids that are lost."""
    folder = f"{url}-damaged"
    shutil.copytree(url, folder)
    index = StreamingDataset(folder).index
    first = np.concatenate([[0], np.cumsum(index.rows)]).tolist()
    lost: set[int] = set()
    for shard in range(0, index.num_shards, 3):
        path = Path(folder, index.names[shard])
        path.write_bytes(path.read_bytes()[:-9])
        lost |= set(range(first[shard], first[shard + 1]))
    return folder, lost


def opened_damaged(url: str, choose: Choose, **options: Any) -> StreamingDataset:
    retry = RetryOptions(base_s=1e-6)
    dataset = opened(url, choose, max_corrupt=1.0, retry=retry, columns=["id"], **options)
    dataset._clock = FakeClock()
    return dataset


@each_choice
@pytest.mark.parametrize("shuffle_block", [1, 100], ids=["whole blocks lost", "some rows of blocks lost"])
def test_the_rows_of_a_bad_shard_are_refilled_from_the_subset(
    damaged: tuple[str, set[int]], choose: Choose, shuffle_block: int
) -> None:
    """Never a sample of the other side, nor a lost one; every other sample at its place; the same on two ranks."""
    url, lost = damaged
    order = OrderOptions(lanes=4, shuffle_block=shuffle_block)
    dataset = opened_damaged(url, choose, batch_size=8, order=order)
    if not set(members(dataset)) - lost:
        with pytest.raises(TooManyCorrupt, match="all others are corrupt"):
            list(dataset)
        return
    settings = dataclasses.replace(SETTINGS, shuffle_block=shuffle_block)
    for epoch in range(3):
        batches = ids(dataset)
        expected = planned(dataset, settings, epoch)
        got = flat(batches)[: len(expected)]
        assert set(got) <= set(expected) - lost
        assert all(now == then or then in lost for now, then in zip(got, expected, strict=True))
        parts = []
        for rank in range(2):
            part = opened_damaged(url, choose, batch_size=4, order=order, topology=Topology(rank=rank, world_size=2))
            part.set_epoch(epoch)
            parts.append(ids(part))
        assert [flat(step) for step in zip(*parts, strict=True)] == batches
    skipped = {number for number in members(dataset) if number in lost}
    assert dataset.stats()["rows_skipped"] == 3 * len(skipped)


def test_max_corrupt_is_a_part_of_the_subset(damaged: tuple[str, set[int]]) -> None:
    """The limit and the message count the subset's samples, not the whole dataset's."""
    url, lost = damaged
    valid = StreamingDataset(url, max_corrupt=0.1, retry=RetryOptions(base_s=1e-6)).split(0.5, seed=3)[1]
    valid._clock = FakeClock()
    allowed = int(0.1 * valid.num_samples)
    assert len(set(members(valid)) & lost) > allowed
    with pytest.raises(TooManyCorrupt, match=f"max_corrupt allows {allowed} of {valid.num_samples}"):
        list(valid)


# -- memory ------------------------------------------------------------------------------------------------------------


def unbroken(batches: Iterable[Any]) -> int:
    return sum(1 for _ in batches)


@pytest.mark.parametrize("choice", ["take", "split by sample, second", "a split of a split"])
def test_memory_that_cannot_hold_a_subset_is_refused(url: str, choice: str) -> None:
    """The error says how much is needed, and that much is enough."""
    options = {"batch_size": 4, "order": OrderOptions(lanes=16)}
    dataset = opened(url, CHOICES[choice], prefetch=PrefetchOptions(memory_bytes="10KiB"), **options)
    with pytest.raises(OptionInvalid, match=r"Set memory_bytes=") as refused:
        iter(dataset)
    needed = str(refused.value).split('memory_bytes="')[1].split('"')[0]
    enough = opened(url, CHOICES[choice], prefetch=PrefetchOptions(memory_bytes=needed), **options)
    assert unbroken(enough) == len(enough)


@pytest.mark.parametrize("fraction", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("labels", [Labels(), Labels(keys=True, source=True)], ids=["plain", "with labels"])
@pytest.mark.parametrize("is_twice", [False, True])
def test_blocks_take_no_more_than_reckoned(fraction: float, labels: Labels, is_twice: bool) -> None:
    """Blocks of drawn rows are reckoned as what they decode: everything from the first of their rows to the last, with
    its labels and the block's index."""
    store, index = numbered([100, 7, 1, 60, 0, 100, 40])
    chain = [require_split(fraction, seed=1, by="sample")[0]]
    rig = Rig(store, index, shuffle_block=90)
    source = dataclasses.replace(
        rig.source(),
        subset=Subset(index.rows, [*chain, *chain] if is_twice else chain),
        label_bytes=labels.block_row_bytes,
    )
    order = EpochOrder(source.subset.rows, rig.order().settings, 0, shards=source.subset.shards)
    bound = order.max_block_bytes(0, source.part_bytes)
    for block in order.blocks(0):
        opened = [
            open_piece(piece, span_of(piece, source.subset), source.fetcher.fetch(piece.shard), source.schema)
            for piece in block.pieces
        ]
        raw, stored = source.block_bytes(block)
        buffers = BlockBuffers(source.schema, opened)
        for number in range(len(opened)):
            buffers.fill(number)
        loaded = finish(order, block, buffers, labels)
        assert loaded is not None
        assert loaded.columns.nbytes + loaded.index.nbytes <= raw
        assert stored == sum(int(index.sizes[piece.shard]) for piece in block.pieces)
        assert raw + stored <= bound
