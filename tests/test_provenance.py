"""with_keys and with_mask: each delivered sample says where it comes from, and whether it is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch

from streamshards import (
    OptionInvalid,
    OrderOptions,
    RetryOptions,
    ShardWriter,
    StreamingDataLoader,
    StreamingDataset,
    Topology,
)
from streamshards.testing import FakeClock
from tests.datasets import assert_same, flat, ids, write

NUM_SAMPLES = 301
LANES = OrderOptions(lanes=4, chunk=2, shuffle_block=60)
Tail = Literal["pad", "drop", "uneven"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("dataset") / "train")
    write(folder, range(NUM_SAMPLES), shard_bytes=2_000)
    return folder


@pytest.fixture(scope="module")
def orders(url: str) -> list[list[int]]:
    """The ids of each epoch, in the global order, as a dataset without keys delivers them."""
    plain = opened(url, with_keys=False, batch_size=None)
    return [[got["id"] for got in plain] for _ in range(3)]


def opened(url: str, **options: Any) -> StreamingDataset:
    defaults: dict[str, Any] = {"shuffle": True, "seed": 6, "order": LANES, "columns": ["id"], "with_keys": True}
    return StreamingDataset(url, **defaults | options)


class Delivered(NamedTuple):
    id: int
    shard: int
    row: int
    epoch: int
    position: int


def delivered(batches: Iterable[dict[str, Any]]) -> list[Delivered]:
    """Return what batches say, sample by sample."""
    out = []
    for batch in batches:
        assert list(batch["key"]) == ["shard", "row", "epoch", "position"]
        assert all(part.dtype == torch.int64 and part.shape == batch["id"].shape for part in batch["key"].values())
        columns = [batch["id"].tolist(), *(batch["key"][name].tolist() for name in Delivered._fields[1:])]
        out += [Delivered(*values) for values in zip(*columns, strict=True)]
    return out


def require_right(url: str, got: Iterable[Delivered]) -> None:
    """Check that each key's shard and row in the index hold the very sample that came."""
    first = np.concatenate([[0], np.cumsum(StreamingDataset(url).index.rows)]).tolist()
    for each in got:
        assert first[each.shard] + each.row == each.id
        assert each.row < first[each.shard + 1] - first[each.shard]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_finds_its_sample_again(url: str) -> None:
    """Shard and row lead to the sample in the index's order, every field of it, also from a subset."""
    plain = StreamingDataset(url)
    first = np.concatenate([[0], np.cumsum(plain.index.rows)]).tolist()
    whole = opened(url, columns=None)
    for dataset in (whole, whole.split(0.3, seed=1)[1], whole.split(0.3, seed=1, by="shard")[0], whole.skip(50)):
        got = list(dataset)
        assert len(got) == dataset.num_samples
        for each in got[::7]:
            key = each.pop("key")
            assert all(type(number) is int for number in key.values())
            assert_same(each, plain[first[key["shard"]] + key["row"]])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("tail", ["pad", "drop", "uneven"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_keys_say_epoch_and_position_on_any_cluster(
    url: str, orders: list[list[int]], world_size: int, num_workers: int, tail: Tail
) -> None:
    """Whatever the ranks and workers: the sample at a position is the one that a single rank delivers there; padding
    has the positions it repeats."""
    loaders = [
        StreamingDataLoader(
            opened(url, batch_size=8, tail=tail, topology=Topology(rank=rank, world_size=world_size)),
            num_workers=num_workers,
        )
        for rank in range(world_size)
    ]
    for epoch in range(2):
        by_rank = [list(loader) for loader in loaders]
        got = [each for batches in by_rank for each in delivered(batches)]
        require_right(url, got)
        assert all(each.epoch == epoch and orders[epoch][each.position] == each.id for each in got)
        global_batch = 8 * world_size
        slots = range(
            {
                "pad": -(-NUM_SAMPLES // global_batch) * global_batch,
                "drop": NUM_SAMPLES // global_batch * global_batch,
                "uneven": NUM_SAMPLES,
            }[tail]
        )
        assert sorted(each.position for each in got) == sorted(slot % NUM_SAMPLES for slot in slots)
        for rank, batches in enumerate(by_rank):
            for step, batch in enumerate(batches):
                assert int(batch["key"]["position"][0]) == (step * global_batch + rank * 8) % NUM_SAMPLES


def test_keys_count_on_across_resumes(url: str, orders: list[list[int]]) -> None:
    """Positions go on where the state stands, on another number of ranks, and into the next epoch."""
    writer = opened(url, batch_size=8)
    iterator = iter(writer)
    head = delivered(next(iterator) for _ in range(11))
    got = list(head)
    readers = []
    for rank in range(2):
        reader = opened(url, batch_size=5, topology=Topology(rank=rank, world_size=2), tail="uneven")
        reader.load_state_dict(writer.state_dict())
        readers.append(reader)
        got += delivered(reader)
    require_right(url, got)
    assert sorted(each.position for each in got) == list(range(NUM_SAMPLES))
    assert all(each.epoch == 0 and orders[0][each.position] == each.id for each in got)
    following = [each for reader in readers for each in delivered(reader)]
    assert all(each.epoch == 1 and orders[1][each.position] == each.id for each in following)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_single_samples_have_keys_of_ints(url: str, orders: list[list[int]], num_workers: int) -> None:
    """Without a batch size, ``sample["key"]`` is a dict of Python ints."""
    got = []
    for each in StreamingDataLoader(opened(url, batch_size=None, with_mask=True), num_workers=num_workers):
        assert list(each) == ["id", "key", "mask"]
        assert list(each["key"]) == ["shard", "row", "epoch", "position"]
        assert all(type(number) is int for number in each["key"].values())
        assert each["mask"] is True
        got.append(Delivered(each["id"], **each["key"]))
    require_right(url, got)
    assert [each.id for each in got] == orders[0]
    assert [each.position for each in got] == list(range(NUM_SAMPLES))


def test_transforms_see_keys(url: str) -> None:
    """A transform of samples, and one of batches, gets the key and the mask like any other field."""
    dataset = opened(url, batch_size=8, with_mask=True, transform=lambda got: {**got, "twice": 2 * got["key"]["row"]})
    batch = next(iter(dataset))
    assert torch.equal(batch["twice"], 2 * batch["key"]["row"])
    assert batch["mask"].all()
    dataset = opened(url, batch_size=8, batch_transform=lambda batch: batch["key"]["position"])
    assert next(iter(dataset)).tolist() == list(range(8))


def test_keys_and_masks_change_no_sample(url: str) -> None:
    """The same batches come with and without them."""
    assert ids(opened(url, batch_size=8, with_mask=True)) == ids(opened(url, batch_size=8, with_keys=False))


@pytest.mark.parametrize("shuffle_block", [1, 60], ids=["whole blocks lost", "some rows lost"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_refilled_place_names_the_row_that_stands_there(url: str, shuffle_block: int, world_size: int) -> None:
    """With a quarter of the shards damaged no key names a lost row; each names the sample that came, and positions
    are those of the plan."""
    folder = f"{url}-damaged-{shuffle_block}-{world_size}"
    shutil.copytree(url, folder)
    index = StreamingDataset(folder).index
    bad = set(range(1, index.num_shards, 4))
    for shard in bad:
        path = Path(folder, index.names[shard])
        path.write_bytes(path.read_bytes()[:-1])
    got = []
    for rank in range(world_size):
        dataset = opened(
            folder,
            batch_size=8,
            max_corrupt=1.0,
            retry=RetryOptions(base_s=1e-6),
            order=OrderOptions(lanes=4, shuffle_block=shuffle_block),
            topology=Topology(rank=rank, world_size=world_size),
            tail="uneven",
        )
        dataset._clock = FakeClock()
        got += delivered(dataset)
    require_right(url, got)
    assert not bad & {each.shard for each in got}
    assert sorted(each.position for each in got) == list(range(NUM_SAMPLES))
    assert len({(each.shard, each.row) for each in got}) < NUM_SAMPLES


# -- names that are taken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["key", "mask"])
@pytest.mark.parametrize("value", [1, {"x": 1}, {}, None, "text"], ids=repr)
def test_a_name_that_the_data_has_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    """A field, a dict or an empty dict of that name: the error says so, and that columns= leaves it out."""
    with ShardWriter(str(tmp_path)) as out:
        out.write({name: value, "other": 1})
    option: Any = {f"with_{name}s" if name == "key" else "with_mask": True}
    other: Any = {"with_mask" if name == "key" else "with_keys": True}
    with pytest.raises(OptionInvalid, match=rf"with_{name}s?=True adds a field '{name}'.*columns="):
        StreamingDataset(str(tmp_path), **option)
    assert len(list(StreamingDataset(str(tmp_path), **other))) == 1
    (got,) = StreamingDataset(str(tmp_path), columns=["other"], **option)
    assert sorted(got) == sorted(["other", name])


# -- masks -------------------------------------------------------------------------------------------------------------


def padded_ranks(url: str, world_size: int, **options: Any) -> Iterator[list[dict[str, Any]]]:
    for rank in range(world_size):
        topology = Topology(rank=rank, world_size=world_size)
        yield list(opened(url, with_mask=True, topology=topology, **options))


@pytest.mark.parametrize("batch_size", [1, 7, 40, 500])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tail", ["pad", "drop", "uneven"])
def test_the_mask_is_false_exactly_on_padding(
    url: str, orders: list[list[int]], batch_size: int, world_size: int, tail: Tail
) -> None:
    """Over all ranks, what is not masked is each sample once ("pad", "uneven"), or what "drop" leaves of them."""
    if tail == "drop" and batch_size * world_size > NUM_SAMPLES:
        with pytest.raises(OptionInvalid, match="leaves nothing"):
            list(padded_ranks(url, world_size, batch_size=batch_size, tail=tail))
        return
    ranks = list(padded_ranks(url, world_size, batch_size=batch_size, tail=tail))
    kept, masked = [], 0
    for batch in flat(ranks):
        assert batch["mask"].dtype == torch.bool
        assert batch["mask"].shape == batch["id"].shape
        kept += batch["id"][batch["mask"]].tolist()
        masked += int((~batch["mask"]).sum())
    step = batch_size * world_size
    full = NUM_SAMPLES // step * step
    assert sorted(kept) == sorted(orders[0][:full] if tail == "drop" else orders[0])
    assert masked == (-NUM_SAMPLES % step if tail == "pad" else 0)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_single_samples_are_masked_too(url: str, world_size: int) -> None:
    """Without a batch size one sample of each rank makes a step: the last one is filled up, and says so."""
    ranks = list(padded_ranks(url, world_size))
    assert {len(samples) for samples in ranks} == {-(-NUM_SAMPLES // world_size)}
    assert sum(got["mask"] for got in flat(ranks)) == NUM_SAMPLES


def test_a_resume_masks_the_same_samples(url: str) -> None:
    """After a resume on another cluster the rest of the epoch is unmasked once each, and its padding masked."""
    writer = opened(url, batch_size=8, with_mask=True)
    iterator = iter(writer)
    kept = flat(next(iterator)["id"].tolist() for _ in range(20))
    for rank in range(3):
        reader = opened(url, batch_size=10, with_mask=True, topology=Topology(rank=rank, world_size=3))
        reader.load_state_dict(writer.state_dict())
        kept += flat(batch["id"][batch["mask"]].tolist() for batch in reader)
    assert sorted(kept) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("tail", ["pad", "uneven"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_mean_over_ranks_is_exact(url: str, world_size: int, tail: Tail) -> None:
    """The recipe of an evaluation: each rank sums over its unmasked samples, the sums are added; no sample counts
    twice, and none is left out."""
    total = count = 0
    for batches in padded_ranks(url, world_size, batch_size=16, tail=tail):
        total += sum(int((batch["id"] * batch["mask"]).sum()) for batch in batches)
        count += sum(int(batch["mask"].sum()) for batch in batches)
    assert Fraction(total, count) == Fraction(NUM_SAMPLES - 1, 2)
