"""Mixture: what is delivered is the plan, on every cluster, from every place; and what it refuses."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import logging
import math
import pickle
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from streamshards import (
    Mixture,
    OptionInvalid,
    OrderOptions,
    PrefetchOptions,
    ResumeMismatch,
    RetryOptions,
    ShardCorrupt,
    ShardWriter,
    StreamingDataLoader,
    StreamingDataset,
    TooManyCorrupt,
    Topology,
)
from streamshards.events import Event, ShardSkipped
from streamshards.plan.mixture import MixtureOrder, MixtureSettings, SourceRows
from streamshards.plan.weights import parse_weights
from tests.datasets import assert_same, flat, write

SIZES: Final = {"web": 700, "code": 300, "books": 120, "rare": 3, "news": 260, "few": 30}
"""Samples of each source; "rare" has fewer than there are lanes."""
FIRST_IDS: Final = {name: 10_000 * number for number, name in enumerate(SIZES)}
LANES: Final = OrderOptions(lanes=4, shuffle_block=40)
GLOBAL_BATCH: Final = 24
WEIGHTS: Final = {"web": 0.5, "code": 0.3, "books": 0.2}

Delivered = tuple[int, int, int, int]
"""Source, its epoch, shard and row."""
Urls = dict[str, str]


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Urls:
    folder = tmp_path_factory.mktemp("mixture")
    for name, size in SIZES.items():
        with ShardWriter(str(folder / name), shard_bytes=300 if size > 3 else 10) as out:
            for number in range(size):
                out.write({"id": FIRST_IDS[name] + number, "x": torch.full((2,), number / 2)})
    return {name: str(folder / name) for name in SIZES}


def source(urls: Urls, name: str, **options: Any) -> StreamingDataset:
    return StreamingDataset(urls[name], **{"shuffle": True, "seed": len(name), **options})


def make(urls: Urls, weights: Any = WEIGHTS, **options: Any) -> Mixture:
    """Return a mixture of the sources that *weights* names."""
    names = weights if isinstance(weights, Mapping) else weights[0][1]
    options = {"batch_size": GLOBAL_BATCH, "seed": 11, "order": LANES, "with_keys": True, **options}
    return Mixture({name: source(urls, name) for name in names}, weights=weights, **options)


def planned(mix: Mixture, weights: Any, epoch: int = 0) -> list[Delivered]:
    """Return what the plan says of a whole pass."""
    state = mix.state_dict()
    rows = [
        SourceRows(name, ds.index.rows, ds.shuffle, ds.seed, state["shuffle_block"]) for name, ds in mix.sources.items()
    ]
    shape = MixtureSettings(seed=state["seed"], lanes=state["lanes"], chunk=state["chunk"])
    phases = parse_weights(weights, mix.names)
    order = MixtureOrder(rows, phases, shape, epoch=epoch, num_samples=state["num_samples"])
    found = order.rows_at(np.arange(state["num_samples"], dtype=np.int64))
    return list(zip(*(values.tolist() for values in found), strict=True))


def rows_of(batch: Mapping[str, Any]) -> list[Delivered]:
    """Return where each row of a batch, or a sample, says that it comes from."""
    key = batch["key"]
    columns = [
        torch.as_tensor(v).reshape(-1).tolist() for v in (batch["source"], key["epoch"], key["shard"], key["row"])
    ]
    return list(zip(*columns, strict=True))


def checked(mix: Mixture, batch: Mapping[str, Any]) -> list[Delivered]:
    """Return the same, once each row's data has been found to be that of the row it names."""
    rows = rows_of(batch)
    starts = [np.concatenate([[0], np.cumsum(ds.index.rows)]) for ds in mix.sources.values()]
    numbers = [int(starts[number][shard]) + row for number, _, shard, row in rows]
    ids = [FIRST_IDS[mix.names[row[0]]] + number for row, number in zip(rows, numbers, strict=True)]
    assert torch.as_tensor(batch["id"]).reshape(-1).tolist() == ids
    assert torch.as_tensor(batch["x"]).reshape(-1, 2)[:, 0].tolist() == [number / 2 for number in numbers]
    return rows


def delivered(mix: Mixture, batches: Iterable[Any] | None = None) -> list[Delivered]:
    return flat(checked(mix, batch) for batch in (mix if batches is None else batches))


def loader_of(mix: Mixture, num_workers: int = 0) -> StreamingDataLoader:
    return StreamingDataLoader(mix, num_workers=num_workers, multiprocessing_context="fork" if num_workers else None)


def start(
    urls: Urls, weights: Any, world_size: int, num_workers: int, batch_size: int | None, **options: Any
) -> list[StreamingDataLoader]:
    """Return the loader of each rank."""
    return [
        loader_of(
            make(
                urls,
                weights,
                batch_size=batch_size,
                topology=Topology(rank=rank, world_size=world_size),
                **options,
            ),
            num_workers,
        )
        for rank in range(world_size)
    ]


def global_batches(loaders: list[StreamingDataLoader]) -> Iterator[list[Delivered]]:
    """Yield what all ranks together get in each step of one pass."""
    for parts in zip(*loaders, strict=True):
        yield flat(checked(loader.dataset.dataset, part) for loader, part in zip(loaders, parts, strict=True))


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return *state* as a checkpoint file would give it back."""
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    assert loaded == state
    return loaded


# -- the delivered stream is the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_cluster_delivers_the_plan(urls: Urls, world_size: int, num_workers: int) -> None:
    """On 1, 2 and 4 ranks × 0, 1 and 2 workers, the global batches of two passes are the plan's, padding included."""
    loaders = start(urls, WEIGHTS, world_size, num_workers, GLOBAL_BATCH // world_size)
    one_rank = make(urls)
    for epoch in range(2):
        plan = planned(one_rank, WEIGHTS, epoch)
        steps = list(global_batches(loaders))
        assert {len(step) for step in steps} == {GLOBAL_BATCH}
        assert len(steps) == math.ceil(len(plan) / GLOBAL_BATCH)
        assert flat(steps) == (plan * 2)[: len(steps) * GLOBAL_BATCH]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_single_samples_are_the_plan(urls: Urls, num_workers: int) -> None:
    """Without a batch size, each sample comes alone, in the same order, with Python numbers."""
    mix = make(urls, batch_size=None, order=OrderOptions(lanes=4, chunk=6, shuffle_block=40))
    samples = list(loader_of(mix, num_workers))
    assert flat(checked(mix, one) for one in samples) == planned(make(urls), WEIGHTS)
    assert type(samples[0]["source"]) is int
    assert [one["key"]["position"] for one in samples] == list(range(len(samples)))


@pytest.mark.parametrize("tail", ["pad", "drop", "uneven"])
def test_tails(urls: Urls, tail: Any) -> None:
    """The last short global batch is filled with the pass's first samples, left out, or given out short."""
    loaders = start(urls, WEIGHTS, 4, 0, 6, tail=tail, with_mask=True)
    plan = planned(make(urls), WEIGHTS)
    full, rest = divmod(len(plan), GLOBAL_BATCH)
    assert rest
    parts = [list(loader) for loader in loaders]
    for loader, batches in zip(loaders, parts, strict=True):
        loader.dataset.set_epoch(0)
        assert len(loader) == len(batches)
        assert loader.dataset.dataset.num_samples == len(plan)
    steps = [flat(rows_of(batch) for batch in step if batch) for step in itertools.zip_longest(*parts)]
    wanted = {"pad": full * GLOBAL_BATCH + GLOBAL_BATCH, "drop": full * GLOBAL_BATCH, "uneven": len(plan)}[tail]
    assert flat(steps) == (plan * 2)[:wanted]
    real = sum(int(batch["mask"].sum()) for batch in flat(parts))
    assert real == min(wanted, len(plan))


@pytest.mark.parametrize(
    ("weights", "stop"),
    [
        ({"web": 1}, "first_exhausted"),
        ({"web": 0.25, "rare": 0.75}, 500),
        ({"web": 3, "code": 2, "books": 1, "rare": 1}, "all_exhausted"),
        ({"web": 1, "code": 1, "books": 1, "rare": 0.001, "news": 1}, 3000),
        ([(0, {"web": 1, "code": 0}), (400, {"web": 0.2, "code": 0.8}), (410, {"web": 0, "code": 1})], 700),
    ],
    ids=["one", "tiny-source", "all-exhausted", "five", "phases"],
)
def test_any_mixture_is_the_plan_for_three_passes(urls: Urls, weights: Any, stop: Any) -> None:
    """Whatever the sources, weights and stop, pass after pass goes on in the plan where the last one ended."""
    mix = make(urls, weights, stop=stop, tail="uneven")
    counts: Counter[int] = Counter()
    for epoch in range(3):
        plan = planned(mix, weights, epoch)
        assert delivered(mix) == plan
        counts.update(row[0] for row in plan)
        assert mix.source_counts() == {name: counts[number] for number, name in enumerate(mix.names)}


def test_stop_rules(urls: Urls) -> None:
    """first_exhausted repeats nothing; all_exhausted gives everything; a number gives as many."""
    first = delivered(make(urls, tail="uneven"))
    assert len(set(first)) == len(first)
    assert {epoch for _, epoch, _, _ in first} == {0}
    everything = Counter((row[0], *row[2:]) for row in delivered(make(urls, stop="all_exhausted", tail="uneven")))
    assert len(everything) == sum(SIZES[name] for name in WEIGHTS)
    exact = make(urls, stop=1001, tail="uneven")
    assert exact.num_samples == len(delivered(exact)) == 1001


def test_each_epoch_of_a_source_is_a_permutation_of_its_own(urls: Urls) -> None:
    """However often a source wraps, each of its epochs that is over gave every sample once, in another order."""
    weights = {"web": 0.2, "books": 0.7, "rare": 0.1}
    mix = make(urls, weights, stop=900, tail="uneven")
    rows = flat(delivered(mix) for _ in range(2))
    for number, name in enumerate(weights):
        by_epoch: dict[int, list[tuple[int, int]]] = {}
        for of, epoch, shard, row in rows:
            if of == number:
                by_epoch.setdefault(epoch, []).append((shard, row))
        # Lanes wrap at different times: those well before the last are over.
        over = [epoch for epoch in by_epoch if epoch < max(by_epoch) - 100 / SIZES[name] - 1]
        assert all(len(got) == len(set(got)) <= SIZES[name] for got in by_epoch.values())
        assert all(len(by_epoch[epoch]) == SIZES[name] for epoch in over)
        assert over or name == "web"
        if name == "books":
            assert len({tuple(by_epoch[epoch]) for epoch in over}) == len(over) >= 5


def test_what_a_source_says_of_its_own_order_holds(urls: Urls) -> None:
    """Without shuffle, a source comes in the order of its index, again and again; another one beside it is shuffled."""
    sources = {"books": source(urls, "books", shuffle=False), "code": source(urls, "code", columns=["id"])}
    one_lane = OrderOptions(lanes=1, shuffle_block=40)
    mix = Mixture(sources, weights={"books": 2, "code": 1}, batch_size=10, stop=400, order=one_lane, tail="uneven")
    ids: list[list[int]] = [[], []]
    for batch in mix:
        for of, number in zip(batch["source"].tolist(), batch["id"].tolist(), strict=True):
            ids[of].append(number - FIRST_IDS[mix.names[of]])
        assert torch.equal(batch["x?"], batch["source"] == 0)
    assert ids[0] == [number % 120 for number in range(len(ids[0]))]
    assert ids[1] != sorted(ids[1])
    assert len(ids[0]) > 240


# -- proportions and counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "world_size", "num_workers"),
    [
        ({"web": 2, "code": 1}, 4, 0),
        ({"web": 0.7, "code": 0.2, "books": 0.1}, 1, 0),
        ({"web": 0.7, "code": 0.2, "books": 0.1}, 2, 2),
        ({"web": 0.123456, "code": 0.3, "books": 0.2, "rare": 0.0003}, 1, 2),
        ({"web": 1, "code": 1, "books": 1, "news": 1e-3, "rare": math.pi / 100}, 2, 1),
    ],
)
def test_every_thousand_samples_of_a_lane_have_the_weights(
    urls: Urls, weights: dict[str, float], world_size: int, num_workers: int
) -> None:
    """In each 1,000 samples of each lane, every source has its share to within one sample, on every cluster."""
    batch_size, lanes = GLOBAL_BATCH // world_size, 2
    chunk = GLOBAL_BATCH // lanes
    order = OrderOptions(lanes=lanes, shuffle_block=40)
    loaders = start(urls, weights, world_size, num_workers, batch_size, stop=4 * 1008, order=order)
    sources = np.array([row[0] for step in global_batches(loaders) for row in step])
    lane_of = np.arange(len(sources)) // chunk % lanes
    total = sum(weights.values())
    for lane in range(lanes):
        of_lane = sources[lane_of == lane]
        for block in of_lane[: len(of_lane) // 1000 * 1000].reshape(-1, 1000):
            for number, weight in enumerate(weights.values()):
                assert abs(int((block == number).sum()) - 1000 * weight / total) < 1
        assert len(of_lane) >= 2000


CHANGING: Final = [
    (0, {"web": 1, "code": 1}),
    (480, {"web": 1, "code": 3}),
    (1000, {"web": 0, "code": 1}),
    (1008, {"web": 9, "code": 1}),
]


def test_weights_change_where_they_should(urls: Urls) -> None:
    """From the first whole round of lanes × chunk samples at or after from_sample on, and over the end of a pass."""
    mix = make(urls, CHANGING, stop=1200, tail="uneven")
    sources = [row[0] for _ in range(2) for row in delivered(mix)]

    def ones(start: int, stop: int) -> float:
        return sum(sources[start:stop]) / (stop - start)

    assert ones(0, 480) == pytest.approx(0.5, abs=0.1)
    assert ones(480, 1008) == pytest.approx(0.75, abs=0.1)
    assert ones(1008, 2400) == pytest.approx(0.1, abs=0.05)
    assert ones(984, 1008) < 1  # the round that holds sample 1,000 still has the old weights


@pytest.mark.parametrize("weights", [WEIGHTS, CHANGING], ids=["fixed", "changing"])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 1), (3, 2)])
def test_source_counts_are_exact_at_every_step(urls: Urls, weights: Any, world_size: int, num_workers: int) -> None:
    """After each step of two passes, on each rank, from the loader's state: what was really delivered till then."""
    loaders = start(urls, weights, world_size, num_workers, GLOBAL_BATCH // world_size, stop=600)
    names = loaders[0].dataset.names
    seen: Counter[str] = Counter()
    for _ in range(2):
        for step in global_batches(loaders):
            seen.update(names[row[0]] for row in step)
            wanted = {name: seen[name] for name in names}
            for loader in loaders:
                assert loader.dataset.source_counts(loader.state_dict()) == wanted
    assert make(urls, weights, stop=600).source_counts() == dict.fromkeys(names, 0)


def test_source_counts_without_a_loader(urls: Urls) -> None:
    """A mixture that is iterated itself knows its own counts; padding counts for nothing."""
    mix = make(urls)
    seen: Counter[int] = Counter()
    for batch in itertools.islice(mix, 7):
        seen.update(batch["source"].tolist())
    mix = make(urls)
    iterator = iter(mix)
    for _ in range(7):
        next(iterator)
    assert list(mix.source_counts().values()) == [seen[number] for number in range(3)]
    list(iterator)
    assert sum(mix.source_counts().values()) == mix.num_samples
    with pytest.raises(ResumeMismatch):
        mix.source_counts({"version": 1})


def test_each_source_counts_what_was_read_of_it(urls: Urls) -> None:
    """The sources' stats are their own; those of the mixture are all together, workers included."""
    for num_workers in (0, 2):
        mix = make(urls, {"web": 1, "books": 1, "code": 0}, stop=200)
        list(loader_of(mix, num_workers))
        stats = {name: ds.stats() for name, ds in mix.sources.items()}
        assert stats["web"]["bytes_read"] > 0 < stats["books"]["bytes_decoded"]
        assert stats["code"]["shards_read"] == 0
        total = mix.stats()
        for name in ("shards_read", "bytes_read", "bytes_decoded"):
            assert total[name] == sum(of_source[name] for of_source in stats.values())
        assert total["samples"] == 216


# -- resuming ----------------------------------------------------------------------------------------------------------


LIVES: Final[dict[str, tuple[Any, Any]]] = {
    "first": ({"code": 0.6, "books": 0.4}, "first_exhausted"),
    "all": ({"code": 0.5, "books": 0.4, "rare": 0.1}, "all_exhausted"),
    "changing": (CHANGING, 400),
}


@pytest.mark.parametrize("name", LIVES)
@pytest.mark.parametrize("seed", range(4))
def test_lives_of_any_shape(urls: Urls, seed: int, name: str) -> None:
    """Lives of random ranks, workers and batch sizes, from a random pass on: never a sample out of the plan."""
    rng = random.Random(seed)
    weights, stop = LIVES[name]
    options = {"stop": stop}
    reference = make(urls, weights, **options)
    epoch, position = rng.randint(0, 2), 0
    state: dict[str, Any] | None = None
    for life in range(4):
        world_size = rng.choice([1, 2, 3, 4]) if life == 0 else rng.randint(1, 5)
        batch_size = GLOBAL_BATCH // world_size if life == 0 else rng.randint(1, 13)
        num_workers = rng.choice([0, 0, 0, 1, 2]) if world_size < 4 else 0
        loaders = start(urls, weights, world_size, num_workers, batch_size, **options)
        for loader in loaders:
            if state is None:
                loader.set_epoch(epoch)
            else:
                loader.load_state_dict(copied(state))
                assert loader.state_dict() == state
        size = world_size * batch_size
        left = rng.randint(1, 15)
        while left:
            plan = planned(reference, weights, epoch)
            for got in itertools.islice(global_batches(loaders), left):
                assert got == [plan[place % len(plan)] for place in range(position, position + size)]
                position = min(position + size, len(plan))
                left -= 1
                assert [loader.state_dict()["position"] for loader in loaders] == [position] * world_size
            if left:
                assert position == len(plan)
                epoch, position = epoch + 1, 0
        states = {json.dumps(loader.state_dict()) for loader in loaders}
        assert len(states) == 1
        state = json.loads(states.pop())


def test_resume_at_every_step(urls: Urls) -> None:
    """Of two passes: before, after each batch, and at the end; the rest follows exactly, then the next pass."""
    weights = {"books": 0.9, "rare": 0.1}
    mix = make(urls, weights, tail="uneven", stop=205)
    passes = [[rows_of(batch) for batch in mix] for _ in range(3)]
    for epoch in range(2):
        mix = make(urls, weights, tail="uneven", stop=205)
        mix.set_epoch(epoch)
        states = [copied(mix.state_dict())]
        states += [copied(mix.state_dict()) for _ in mix]
        for taken, state in enumerate(states):
            resumed = make(urls, weights, tail="uneven", stop=205)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert [rows_of(batch) for batch in resumed] == passes[epoch][taken:]
            assert [rows_of(batch) for batch in resumed] == passes[epoch + 1]  # the load has been used


def test_break_set_epoch_and_a_second_load(urls: Urls) -> None:
    """A left pass is given up for the next one; set_epoch goes anywhere; a load may be repeated."""

    def small() -> Mixture:
        return make(urls, {"books": 3, "code": 1}, stop=150)

    for make_one in (small, lambda: loader_of(small()), lambda: loader_of(small(), 2)):
        mix: Any = make_one()
        passes = [[rows_of(batch) for batch in mix] for _ in range(3)]
        mix = make_one()
        for batch in mix:
            assert rows_of(batch) == passes[0][0]
            break
        state = copied(mix.state_dict())
        assert [rows_of(batch) for batch in mix] == passes[1]
        mix.set_epoch(2)
        assert [rows_of(batch) for batch in mix] == passes[2]
        for _ in range(2):
            mix.load_state_dict(state)
            mix.set_epoch(0)  # the place inside that very pass is kept
            assert [rows_of(batch) for batch in mix] == passes[0][1:]
        assert [rows_of(batch) for batch in mix] == passes[1]


def test_the_length_follows_the_loaded_order(urls: Urls) -> None:
    """Where the sources end depends on the lanes: after a load, length and num_samples are those of the state's."""
    saved = make(urls)
    resumed = make(urls, order=OrderOptions(lanes=7, shuffle_block=40), tail="uneven")
    fresh = resumed.num_samples
    assert fresh != saved.num_samples
    resumed.load_state_dict(saved.state_dict())
    assert resumed.num_samples == saved.num_samples
    assert len(resumed) == math.ceil(saved.num_samples / GLOBAL_BATCH)
    assert len(list(resumed)) == len(resumed)


def same(item: Any) -> Any:
    return item


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stateful_dataloader(urls: Urls, num_workers: int) -> None:
    """torchdata's loader resumes a mixture at any step, with the workers it had."""

    def stateful() -> StatefulDataLoader[Any]:
        context = "fork" if num_workers else None
        return StatefulDataLoader(
            make(urls, {"books": 1, "code": 1}),
            batch_size=None,
            collate_fn=same,
            num_workers=num_workers,
            multiprocessing_context=context,
        )

    loader = stateful()
    passes = [[rows_of(batch) for batch in loader] for _ in range(2)]
    plan = planned(make(urls, {"books": 1, "code": 1}), {"books": 1, "code": 1})
    assert flat(passes[0])[: len(plan)] == plan
    loader = stateful()
    iterator = iter(loader)
    for taken in (1, 4):
        while taken:
            next(iterator)
            taken -= 1
        state = copied(loader.state_dict())
    resumed = stateful()
    resumed.load_state_dict(state)
    assert [rows_of(batch) for batch in resumed] == passes[0][5:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_worker_state_holds_for_the_weights_of_its_pass(urls: Urls, num_workers: int) -> None:
    """Of a single worker's state, no weights of the pass it is in may change; those of later passes may."""

    def stateful(weights: Any) -> StatefulDataLoader[Any]:
        mix = make(urls, weights, stop=600)
        context = "fork" if num_workers else None
        return StatefulDataLoader(
            mix, batch_size=None, collate_fn=same, num_workers=num_workers, multiprocessing_context=context
        )

    old, new = {"web": 1, "code": 1}, {"web": 1, "code": 3}
    loader = stateful([(0, old), (48, new)])
    iterator = iter(loader)
    for _ in range(8):
        next(iterator)
    state = copied(loader.state_dict())
    rest = [rows_of(batch) for batch in iterator]
    with pytest.raises(ResumeMismatch, match="weights"):
        resumed = stateful([(0, old)])
        resumed.load_state_dict(state)
        list(resumed)
    resumed = stateful([(0, old), (48, new), (4800, old)])
    resumed.load_state_dict(state)
    assert [rows_of(batch) for batch in resumed] == rest


def test_persistent_workers(urls: Urls) -> None:
    """They go on from pass to pass, see set_epoch, and begin where a load says."""
    loader = StreamingDataLoader(
        make(urls, stop=200), num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    reference = make(urls, stop=200)
    passes = [[rows_of(batch) for batch in reference] for _ in range(3)]
    assert [[rows_of(batch) for batch in loader] for _ in range(2)] == passes[:2]
    loader.set_epoch(0)
    iterator = iter(loader)
    next(iterator)
    state = copied(loader.state_dict())
    assert [rows_of(batch) for batch in iterator] == passes[0][1:]
    loader.set_epoch(2)
    assert [rows_of(batch) for batch in loader] == passes[2]
    loader.load_state_dict(state)
    assert [rows_of(batch) for batch in loader] == passes[0][1:]


def test_plain_dataloader(urls: Urls) -> None:
    """Two workers of torch's own loader deliver the plan, pass after pass."""
    mix = make(urls)
    loader = DataLoader(mix, batch_size=None, num_workers=2, collate_fn=same, multiprocessing_context="fork")
    for epoch in range(2):
        plan = planned(make(urls), WEIGHTS, epoch)
        assert delivered(mix, loader)[: len(plan)] == plan


# -- what a state says, and what it refuses ----------------------------------------------------------------------------


def taken(mix: Mixture, batches: int) -> dict[str, Any]:
    """Return the state of *mix* after some batches."""
    iterator = iter(mix)
    for _ in range(batches):
        next(iterator)
    return copied(mix.state_dict())


def test_the_state_is_small(urls: Urls) -> None:
    """Under 4 KiB for eight sources with long names, after a hundred changes of weight."""
    names = [f"{number}-a-quite-descriptive-name-of-a-source-of-a-mixture-{number}" for number in range(8)]
    sources = {name: source(urls, "web").take(500).split(0.5)[0] for name in names}
    weights = [(100 * k, {name: 1 / (3 + k + number) for number, name in enumerate(names)}) for k in range(100)]
    mix = Mixture(sources, weights=weights, stop=20_000, batch_size=8, order=LANES)
    mix.set_epoch(1)
    assert len(json.dumps(mix.state_dict())) < 4096
    assert len(json.dumps({**mix.state_dict(), "position": 19_999})) < 4096


def test_each_difference_is_named(urls: Urls, tmp_path: Path) -> None:
    """A state of other sources, names, seeds, weights or stop is refused, with what differs and how."""
    state = taken(make(urls, stop=500), 3)

    def refusal(mix: Mixture) -> str:
        for target in (mix, loader_of(mix)):
            with pytest.raises(ResumeMismatch) as refused:
                target.load_state_dict(state)
        return str(refused.value)

    def differing(mix: Mixture) -> set[str]:
        text = refusal(mix).split("order: ", 1)[1]
        return {clause.split(" is ", 1)[0] for clause in text.split("; ")}

    write(str(tmp_path / "other"), range(SIZES["code"]))
    other = {**urls, "code": str(tmp_path / "other")}
    only_source = differing(make(other, stop=500))
    assert only_source == {"fingerprint", "sources.code.fingerprint", "sources.code.num_shards"}
    assert "seed is 12 here and 11 in the state" in refusal(make(urls, stop=500, seed=12))
    assert differing(make(urls, stop=500, seed=12)) == {"seed"}
    changed = {**WEIGHTS, "web": 0.4, "code": 0.4}
    text = refusal(make(urls, changed, stop=500))
    assert "weights.web is 0.4 here and 0.5 in the state" in text
    assert differing(make(urls, changed, stop=500)) == {"fingerprint", "weights.web", "weights.code"}
    assert differing(make(urls, stop=501)) == {"fingerprint", "num_samples", "stop"}
    renamed = {"web": 0.5, "code": 0.3, "news": 0.2}
    text = refusal(make(urls, renamed, stop=500))
    assert "weights.news is 0.2 here and missing in the state" in text
    assert "sources.books is missing here" in text
    reseeded = Mixture(
        {name: source(urls, name, seed=77 if name == "web" else len(name)) for name in WEIGHTS},
        weights=WEIGHTS, stop=500, batch_size=4, seed=11, order=LANES,
    )  # fmt: skip
    assert "sources.web.seed is 77 here and 3 in the state" in refusal(reseeded)
    earlier = make(urls, [(0, {**WEIGHTS, "web": 0.9}), (24, WEIGHTS)], stop=500)
    assert differing(earlier) == {"fingerprint"}
    assert "had other weights before this place" in refusal(earlier)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {1: 2}},
        {"sources": {1: 2}},
        {"sources": []},
        {"lanes": 70_000, "num_samples": 10**6},
        {"epoch": 2**62},
    ],
    ids=str,
)
def test_a_state_edited_by_hand_is_refused(urls: Urls, changes: dict[str, Any]) -> None:
    """Whatever was written into it: ResumeMismatch, and nothing else."""
    mix = make(urls, stop=500)
    with pytest.raises(ResumeMismatch):
        mix.load_state_dict({**taken(mix, 3), **changes})


@pytest.mark.parametrize("num_samples", [400, 1000, 10_000])
@pytest.mark.parametrize(("world_size", "num_workers", "batch_size"), [(1, 0, 32), (8, 0, 32), (8, 4, 256)])
def test_a_pass_that_ends_with_a_source_misses_little(
    tmp_path: Path, num_samples: int, world_size: int, num_workers: int, batch_size: int
) -> None:
    """By default, lanes are so few and chunks so short that on any cluster nine tenths of small sources come."""
    urls = {name: str(tmp_path / name) for name in "ab"}
    for url in urls.values():
        with ShardWriter(url) as out:
            out.write_batch({"id": torch.arange(num_samples // 2)})
    sources = {name: StreamingDataset(url, batch_size=batch_size, shuffle=True) for name, url in urls.items()}
    topology = Topology(rank=0, world_size=world_size)
    mix = Mixture(sources, weights={"a": 1, "b": 1}, topology=topology)
    state = StreamingDataLoader(mix, num_workers=num_workers).state_dict()
    assert 0.9 * num_samples <= state["num_samples"] <= num_samples


def test_sources_in_another_order_are_another_mixture(urls: Urls) -> None:
    """The numbers in "source" and the order itself follow the order of the names: a state holds for one of them."""
    equal = {"web": 1, "code": 1}
    state = taken(make(urls, equal, stop=300), 3)
    turned = Mixture(
        {name: source(urls, name) for name in ("code", "web")}, weights=equal, stop=300, seed=11, batch_size=24
    )
    with pytest.raises(ResumeMismatch, match="stood in another order"):
        turned.load_state_dict(state)


def test_later_weights_may_change_at_a_resume(urls: Urls) -> None:
    """Weights are free from where every lane has ended the 1,000 samples it is in: a resume goes on with the new ones,
    as the plan says. An earlier change is refused, and the refusal says from where on it could be."""
    old, new = {"web": 0.5, "code": 0.5}, {"web": 0.1, "code": 0.9}
    mix = make(urls, old, stop=3000)
    for _ in mix:
        pass
    state = taken(mix, 10)
    with pytest.raises(ResumeMismatch, match="from sample 3240 begin too early: they can from sample 4008 on"):
        make(urls, [(0, old), (3000 + 240, new)], stop=3000).load_state_dict(state)
    with pytest.raises(ResumeMismatch, match="had other weights before this place"):
        make(urls, new, stop=3000).load_state_dict(state)
    weights = [(0, old), (4008, new)]
    resumed = make(urls, weights, stop=3000)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    plan = planned(make(urls, weights, stop=3000), weights, epoch=1)
    assert delivered(resumed)[: 3000 - 240] == plan[240:]
    assert plan[:988] == planned(mix, old, epoch=1)[:988]  # up to sample 3,988, where the first lane ends its thousand
    assert plan[240:] != planned(mix, old, epoch=1)[240:]
    later = resumed.state_dict()
    assert later["weights"] == new
    assert sum(resumed.source_counts().values()) == 6000
    with pytest.raises(ResumeMismatch, match=r"weights\.web is 0\.5 here and 0\.1 in the state"):
        make(urls, old, stop=3000).load_state_dict(later)
    with pytest.raises(ResumeMismatch, match="fingerprint"):
        make(urls, [(0, old), (4007, new)], stop=3000).load_state_dict(later)
    make(urls, [(0, old), (4008, new), (20_000, old)], stop=3000).load_state_dict(later)


def test_changed_weights_on_another_cluster(urls: Urls) -> None:
    """The state of a step after a change says the same on each rank and with workers, and loads on others."""
    loaders = start(urls, CHANGING, 2, 2, 12, stop=600)
    for loader in loaders:
        loader.set_epoch(1)
    steps = list(itertools.islice(global_batches(loaders), 19))
    states = {json.dumps(loader.state_dict()) for loader in loaders}
    assert len(states) == 1
    state = json.loads(states.pop())
    assert state["weights"] == {"web": 0.9, "code": 0.1}
    resumed = start(urls, CHANGING, 3, 0, 5, stop=600)
    for loader in resumed:
        loader.load_state_dict(state)
    plan = planned(make(urls, CHANGING, stop=600), CHANGING, 1)
    assert flat(steps) == plan[: 19 * 24]
    assert flat(global_batches(resumed))[: 600 - 19 * 24] == plan[19 * 24 :]


def test_strict_false_forgives_between_two_passes(urls: Urls) -> None:
    """At the end of a pass, the next one may be of another mixture; in the middle it may not."""
    mix = make(urls, stop=240)
    middle = taken(mix, 3)
    mix.set_epoch(0)
    list(mix)
    other = make(urls, {"web": 1, "news": 1}, stop=240)
    other.load_state_dict(mix.state_dict(), strict=False)
    assert flat(rows_of(batch) for batch in other) == planned(other, {"web": 1, "news": 1}, epoch=1)
    with pytest.raises(ResumeMismatch, match="in the middle of epoch 0, at 72 of 240"):
        other.load_state_dict(middle, strict=False)


def test_a_state_of_a_dataset_is_none_of_a_mixture(urls: Urls) -> None:
    """And the other way round; the text says which is which."""
    mix, alone = make(urls, {"web": 1}), source(urls, "web", batch_size=24, seed=11)
    with pytest.raises(ResumeMismatch, match="the state is of a dataset, this is a mixture"):
        mix.load_state_dict(alone.state_dict())
    with pytest.raises(ResumeMismatch, match="the state is of a mixture, this is a dataset"):
        alone.load_state_dict(mix.state_dict())


# -- different fields --------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, samples: Iterable[dict[str, Any]]) -> StreamingDataset:
    with ShardWriter(str(folder / name), shard_bytes=400) as out:
        for one in samples:
            out.write(one)
    return StreamingDataset(str(folder / name), shuffle=True)


KINDS: Final[dict[str, Callable[[int], Any]]] = {
    "fixed": lambda i: torch.full((2, 3), i, dtype=torch.float32),
    "half": lambda i: torch.tensor([i, -i], dtype=torch.bfloat16),
    "eighth": lambda i: torch.tensor([i], dtype=torch.float32).to(torch.float8_e4m3fn),
    "ragged": lambda i: torch.arange(i % 5, dtype=torch.int32),
    "boxes": lambda i: torch.full((i % 3, i % 4), i, dtype=torch.float64),
    "text": lambda i: f"text {i}",
    "blob": lambda i: bytes([i]) * (i % 4),
    "tags": lambda i: [i, {"a": None}],
    "whole": lambda i: i,
    "real": lambda i: i / 2,
    "flag": lambda i: i % 2 == 0,
    "wave": lambda i: complex(i, 1),
    "nested": lambda i: {"name": f"n{i}", "deep": {"value": i, "more": torch.tensor(i)}},
    "sometimes": lambda i: None if i % 3 else i,
    "never": lambda _: None,
}


def emptied(value: Any) -> Any:
    """Return what stands where a source does not have *value*'s field."""
    return {key: emptied(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_fields_of_every_kind_that_one_source_lacks(tmp_path: Path) -> None:
    """Each sample comes back as it went in, with None in the other sources' fields; in batches, masked."""
    full = written(tmp_path, "full", ({"id": i, **{k: f(i) for k, f in KINDS.items()}} for i in range(60)))
    bare = written(tmp_path, "bare", ({"id": 1000 + i, "own": f"own {i}"} for i in range(60)))
    weights = {"full": 1, "bare": 1}
    seen = set()
    for one in Mixture({"full": full, "bare": bare}, weights=weights, order=LANES, stop=200):
        i = one["id"] % 1000
        seen.add(one["source"])
        if one["source"] == 0:
            expected = {"id": i, **{k: f(i) for k, f in KINDS.items()}, "own": None, "source": 0}
        else:
            expected = {"id": 1000 + i, **{k: emptied(f(0)) for k, f in KINDS.items()}, "own": f"own {i}", "source": 1}
        assert_same(one, expected)
    assert seen == {0, 1}
    for sources in ({"full": full, "bare": bare}, {"bare": bare, "full": full}):
        for batch in Mixture(sources, weights=weights, order=LANES, stop=200, batch_size=10):
            has = batch["source"] == list(sources).index("full")
            assert torch.equal(batch["id"] < 1000, has)
            for name in ("fixed", "half", "eighth", "whole", "real", "flag", "wave"):
                assert torch.equal(batch[f"{name}?"], has)
                stacked = (
                    torch.stack([torch.as_tensor(KINDS[name](i % 1000)).float().abs() for i in batch["id"].tolist()])
                    if name not in ("wave",)
                    else None
                )
                if stacked is not None:
                    assert torch.equal(batch[name][has].float().abs(), stacked[has])
                assert not batch[name][~has].float().any() if name != "wave" else not batch[name][~has].abs().any()
            for name in ("text", "blob", "tags", "ragged", "boxes"):
                assert [value is not None for value in batch[name]] == has.tolist()
            assert [value is None for value in batch["own"]] == has.tolist()
            assert [value is not None for value in batch["nested"]["name"]] == has.tolist()
            assert torch.equal(batch["nested"]["deep"]["value?"], has)
            present = has & (batch["id"] % 3 == 0)
            assert torch.equal(batch["sometimes?"], present)
            assert torch.equal(batch["sometimes"][present], batch["id"][present])


def test_sizes_that_differ_become_ragged(tmp_path: Path) -> None:
    """A field of one size here and of another there, or of any, is a list of tensors of their own shapes."""
    shapes: dict[str, Callable[[int], tuple[int, ...]]] = {
        "a": lambda _: (3, 2), "b": lambda _: (4, 2), "c": lambda i: (i % 5, 2), "d": lambda i: (2, i % 3)
    }  # fmt: skip
    sources = {
        name: written(tmp_path, name, ({"x": torch.full(shape(i), i + 0.5), "i": i} for i in range(40)))
        for name, shape in shapes.items()
    }
    for names in ("ab", "abc", "abcd", "da", "ca"):
        chosen = {name: sources[name] for name in names}
        mix = Mixture(chosen, weights=dict.fromkeys(names, 1), stop=100, batch_size=10, order=LANES)
        for batch in mix:
            for of, i, x in zip(batch["source"].tolist(), batch["i"].tolist(), batch["x"], strict=True):
                assert torch.equal(x, torch.full(shapes[names[of]](i), i + 0.5))


def test_types_that_clash_name_both_sources_and_the_field(tmp_path: Path) -> None:
    """float32 here and float64 there is no field of one mixture; columns=[…] leaves it out."""
    one = written(tmp_path, "one", [{"id": i, "y": {"x": torch.zeros(2)}} for i in range(30)])
    two = written(tmp_path, "two", [{"id": i, "y": {"x": torch.zeros(2).double()}} for i in range(30)])
    with pytest.raises(
        OptionInvalid, match=r"'one' and 'two' cannot be mixed: field 'y\.x': expected float32 .* got float64"
    ):
        Mixture({"one": one, "two": two}, weights={"one": 1, "two": 1})
    without = {"one": one, "two": StreamingDataset(two.url, columns=["id"])}
    assert "y" in next(iter(Mixture(without, weights={"one": 1, "two": 1})))


def test_a_field_called_source_clashes(tmp_path: Path) -> None:
    """The mixture's own field cannot stand beside it; the text says how to leave it out."""
    one = written(tmp_path, "one", [{"id": i, "source": "me"} for i in range(30)])
    with pytest.raises(OptionInvalid, match=r"a mixture adds a field 'source'.*columns="):
        Mixture({"one": one}, weights={"one": 1})
    assert next(iter(Mixture({"one": StreamingDataset(one.url, columns=["id"])}, weights={"one": 1})))["source"] == 0


def test_transforms_see_the_source(urls: Urls) -> None:
    """transform gets each sample with its source; batch_transform each batch."""
    doubled = make(urls, transform=lambda s: {"got": s["id"] * 2, "source": s["source"]})
    plain = make(urls)
    for ours, theirs in itertools.islice(zip(doubled, plain, strict=True), 5):
        assert torch.equal(ours["got"], theirs["id"] * 2)
        assert torch.equal(ours["source"], theirs["source"])
    totals = make(urls, batch_transform=lambda b: b["source"].bincount(minlength=3).tolist())
    assert sum(next(iter(totals))) == GLOBAL_BATCH


def test_the_batch_size_may_come_from_the_sources(urls: Urls) -> None:
    """What all sources say holds; what the mixture says goes first."""
    sources = {name: source(urls, name, batch_size=16) for name in WEIGHTS}
    assert Mixture(sources, weights=WEIGHTS).batch_size == 16
    assert Mixture(sources, weights=WEIGHTS, batch_size=4).batch_size == 4


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda _: Mixture({}, weights={}), "takes a dict of datasets by name"),
        (lambda u: Mixture([source(u, "web")], weights={}), "takes a dict of datasets by name"),
        (lambda u: Mixture({1: source(u, "web")}, weights={1: 1}), "1 must be a name"),
        (lambda u: Mixture({"a": u["web"]}, weights={"a": 1}), "'a' is a str, not a StreamingDataset"),
        (lambda u: Mixture({"a": make(u)}, weights={"a": 1}), "'a' is a Mixture itself"),
        (lambda u: Mixture({"a": source(u, "web", transform=same)}, weights={"a": 1}), "'a' has a transform"),
        (
            lambda u: Mixture({"a": source(u, "web", batch_size=2, batch_transform=same)}, weights={"a": 1}),
            "'a' has a transform",
        ),
        (lambda u: Mixture({"a": source(u, "web", order=OrderOptions(lanes=2))}, weights={"a": 1}), "lanes or chunk"),
        (lambda u: Mixture({"a": source(u, "web", order=OrderOptions(chunk=2))}, weights={"a": 1}), "lanes or chunk"),
        (
            lambda u: Mixture(
                {"a": source(u, "web", batch_size=2), "b": source(u, "code")}, weights={"a": 1, "b": 1}
            ),
            r"different batch sizes \('a' 2, 'b' None\)",
        ),
        (lambda u: make(u, weights={"web": 0}), "at least one weight"),
        (lambda u: make(u, weights={"web": -1}), "at least 0"),
        (lambda u: Mixture({"a": source(u, "web")}, weights={"b": 1}), "no source 'b'"),
        (lambda u: make(u, stop="sometime"), "stop"),
        (lambda u: make(u, stop=0), "stop"),
        (lambda u: make(u, stop=2.5), "stop"),
        (lambda u: make(u, {"web": 1, "code": 0}, stop="all_exhausted"), "would never come"),
        (lambda u: make(u, batch_size=0), "batch_size=0"),
        (lambda u: make(u, seed=-1), "seed=-1"),
        (lambda u: make(u, tail="wrap"), "tail='wrap'"),
        (lambda u: make(u, order=5), "order=5 must be OrderOptions"),
        (lambda u: make(u, prefetch="1GiB"), "must be PrefetchOptions"),
        (lambda u: make(u, batch_size=None, batch_transform=same), "needs a batch_size"),
        (lambda u: Mixture({"a": source(u, "web").take(0)}, weights={"a": 1}), "'a' has no samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(urls: Urls, build: Callable[[Urls], Any], text: str) -> None:
    """One line that says what was given and what could be."""
    with pytest.raises(OptionInvalid, match=text):
        build(urls)


def test_a_short_pass_on_many_readers_can_be_resumed(urls: Urls) -> None:
    """With fewer samples than readers, the default order has as many lanes as samples, and its state loads."""
    mix = make(urls, stop=5, order=None, batch_size=2, topology=Topology(rank=0, world_size=9), tail="uneven")
    state = copied(mix.state_dict())
    mix.load_state_dict(state)
    assert [len(batch["id"]) for batch in mix] == [2]


def test_what_a_mixture_says_of_itself(urls: Urls) -> None:
    """Names, sources, schema, repr."""
    mix = make(urls, {"web": 7, "code": 3})
    assert mix.names == ("web", "code")
    assert mix.schema.field(("id",)) is not None
    assert repr(mix).startswith("Mixture({web: 0.7, code: 0.3}, stop='first_exhausted', batch_size=24, seed=11")
    with pytest.raises(TypeError):
        mix.sources["new"] = source(urls, "web")  # type: ignore[index]


# -- parts of datasets, damage, memory, processes ----------------------------------------------------------------------


def test_parts_of_datasets_are_sources(urls: Urls) -> None:
    """take, skip and both sides of a split give their own samples and no others; the state names the part."""
    web = source(urls, "web")
    train, held_out = web.split(0.8, seed=3)
    parts = {"head": web.take(50), "rest": web.skip(650), "train": train, "held": held_out}
    wanted = {name: {one["id"] for one in part} for name, part in parts.items()}
    assert wanted["head"] == set(range(50))
    mix = Mixture(
        parts, weights=dict.fromkeys(parts, 1), stop="all_exhausted", batch_size=16, order=LANES, with_keys=True
    )
    got: dict[str, set[int]] = {name: set() for name in parts}
    starts = np.concatenate([[0], np.cumsum(web.index.rows)])
    for batch in mix:
        for of, number in zip(batch["source"].tolist(), batch["id"].tolist(), strict=True):
            got[mix.names[of]].add(number)
        assert torch.equal(torch.from_numpy(starts)[batch["key"]["shard"]] + batch["key"]["row"], batch["id"])
    assert got == wanted
    assert mix.state_dict()["sources"]["head"]["subset"] == "take(50)"
    other = Mixture({**parts, "head": web.take(51)}, weights=dict.fromkeys(parts, 1), stop=500, batch_size=16)
    with pytest.raises(ResumeMismatch, match=r"sources\.head\.subset is 'take\(51\)' here and 'take\(50\)'"):
        other.load_state_dict(mix.state_dict())


def test_one_dataset_under_two_names(urls: Urls) -> None:
    """Both are read for themselves; what was read is counted once."""
    books = source(urls, "books")
    mix = Mixture({"a": books, "b": books}, weights={"a": 1, "b": 1}, stop=100, batch_size=10, tail="uneven")
    assert len(flat(batch["id"].tolist() for batch in mix)) == 100
    assert mix.stats()["shards_read"] == books.stats()["shards_read"]
    assert mix.stats()["samples"] == 100


FAST: Final = RetryOptions(base_s=1e-6)


@pytest.fixture
def damaged(urls: Urls, tmp_path: Path) -> Urls:
    """The same sources; one shard of "books", of "rare" and of "few" is not what it was."""
    out = dict(urls)
    for name in ("books", "rare", "few"):
        shutil.copytree(urls[name], tmp_path / name)
        dataset = StreamingDataset(urls[name])
        path = tmp_path / name / dataset.index.names[0]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        out[name] = str(tmp_path / name)
    return out


def damaged_mix(urls: Urls, weights: Any, **options: Any) -> Mixture:
    sources = {name: source(urls, name, retry=FAST, max_corrupt=0.9) for name in weights}
    return Mixture(
        sources,
        weights=weights,
        **{"batch_size": GLOBAL_BATCH, "seed": 11, "order": LANES, "with_keys": True, "stop": 900, **options},
    )


def test_lost_rows_are_refilled_from_their_own_source(urls: Urls, damaged: Urls) -> None:
    """Source by source the places stay; lost rows are replaced by others of the source's same epoch, on any cluster."""
    weights = {"web": 0.5, "books": 0.5}
    whole = flat(rows_of(batch) for batch in make(urls, weights, stop=900))
    mix = damaged_mix(damaged, weights)
    got = delivered(mix)
    assert [row[:2] for row in got] == [row[:2] for row in whole]
    lost = [planned_row for planned_row in whole if planned_row[0] == 1 and planned_row[2] == 0]
    assert lost
    kept = [g for g, w in zip(got, whole, strict=True) if not (w[0] == 1 and w[2] == 0)]
    assert kept == [row for row in whole if not (row[0] == 1 and row[2] == 0)]
    assert not any(row[0] == 1 and row[2] == 0 for row in got)
    for world_size, num_workers in ((2, 2), (4, 0)):
        loaders = [
            loader_of(
                damaged_mix(
                    damaged, weights, batch_size=24 // world_size, topology=Topology(rank=rank, world_size=world_size)
                ),
                num_workers,
            )
            for rank in range(world_size)
        ]
        assert flat(global_batches(loaders)) == got


def test_a_lost_shard_is_logged_once_for_each_epoch_of_its_source(
    damaged: Urls, caplog: pytest.LogCaptureFixture
) -> None:
    """Over many epochs of small sources, with lanes in several at once; both observers hear of it, both count it."""
    weights = {"web": 0.3, "books": 0.2, "rare": 0.2, "few": 0.3}
    ours: list[Event] = []
    theirs: list[Event] = []
    sources = {name: source(damaged, name, retry=FAST, max_corrupt=1.0, observer=theirs.append) for name in weights}
    mix = Mixture(
        sources, weights=weights, batch_size=24, order=LANES, stop=1800, tail="uneven", with_keys=True,
        observer=ours.append,
    )  # fmt: skip
    with caplog.at_level(logging.ERROR, logger="streamshards"):
        rows = delivered(mix)
    epochs = {name: len({row[1] for row in rows if row[0] == number}) for number, name in enumerate(weights)}
    assert epochs["rare"] > 50
    skips = [event for event in ours if isinstance(event, ShardSkipped)]
    assert skips
    assert Counter(ours) == Counter(theirs)
    by_name = {
        name: sum(urls_of in event.url for event in skips) for name, urls_of in damaged.items() if name in weights
    }
    assert by_name["web"] == 0
    assert all(1 <= by_name[name] <= epochs[name] for name in ("books", "rare", "few"))
    assert len(caplog.records) == len(skips)
    assert mix.stats()["shards_skipped"] == len(skips)
    assert mix.sources["books"].stats()["shards_skipped"] == by_name["books"]
    assert mix.sources["web"].stats()["rows_skipped"] == 0
    assert mix.sources["rare"].stats()["rows_skipped"] == by_name["rare"]


def test_each_source_keeps_its_own_policy_for_damage(damaged: Urls) -> None:
    """on_corrupt="raise" of one source raises its error; max_corrupt is of one epoch of that source."""
    strict = {"web": source(damaged, "web"), "books": source(damaged, "books", retry=FAST, on_corrupt="raise")}
    with pytest.raises(ShardCorrupt, match="books"):
        list(Mixture(strict, weights={"web": 1, "books": 1}, batch_size=8, order=LANES, stop="all_exhausted"))
    none = {"web": source(damaged, "web"), "books": source(damaged, "books", retry=FAST, max_corrupt=0)}
    with pytest.raises(TooManyCorrupt, match=r"books.*max_corrupt allows 0 of 120"):
        list(Mixture(none, weights={"web": 1, "books": 1}, batch_size=8, order=LANES, stop="all_exhausted"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Urls:
    """Eight sources of 120 samples of 16 KiB, in shards of 160 KiB."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(8):
        with ShardWriter(str(folder / str(number)), shard_bytes="160KiB") as out:
            for i in range(120):
                out.write({"id": i, "x": torch.full((4096,), i, dtype=torch.float32)})
    return {str(number): str(folder / str(number)) for number in range(8)}


def test_memory_is_bounded_over_all_sources(large: Urls) -> None:
    """An order that cannot fit is refused with the number that is enough, and with that number it is kept to."""

    def mixed(memory_bytes: str) -> Mixture:
        sources = {name: StreamingDataset(url, shuffle=True) for name, url in large.items()}
        return Mixture(
            sources, weights=dict.fromkeys(sources, 1), batch_size=8, stop=1500,
            order=OrderOptions(lanes=2, shuffle_block=20), prefetch=PrefetchOptions(memory_bytes=memory_bytes),
        )  # fmt: skip

    with pytest.raises(OptionInvalid, match=r"interleaves 16 lanes here.*Set memory_bytes=") as refused:
        iter(mixed("2MiB"))
    needed = str(refused.value).split('memory_bytes="')[1].split('"')[0]
    mix = mixed(needed)
    iterator = iter(mix)
    blocks = iterator._stream._loader
    assert sum(1 for _ in iterator) == len(mix)
    assert 0 < blocks.peak_bytes <= int(needed.removesuffix("MiB")) << 20


def streaming_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamshards-")]


def test_leaving_the_loop_leaves_no_thread(urls: Urls) -> None:
    """break, an exception in the body, and a forgotten iterator each end all threads."""
    mix = make(urls)
    for _ in mix:
        break
    with pytest.raises(ZeroDivisionError):
        for _ in mix:
            raise ZeroDivisionError
    next(iter(mix))
    gc.collect()
    assert streaming_threads() == []


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_every_start_method(urls: Urls, context: str) -> None:
    """A mixture is safe to fork and to pickle, also while its own threads are running."""
    mix = make(urls)
    plan = planned(mix, WEIGHTS)
    running = iter(mix)
    first = rows_of(next(running))
    mix.set_epoch(0)
    loader = DataLoader(mix, batch_size=None, num_workers=2, multiprocessing_context=context, collate_fn=same)
    assert delivered(mix, loader)[: len(plan)] == plan
    assert (first + delivered(mix, running))[: len(plan)] == plan
    assert mix.sources["web"].stats()["shards_read"] > 0


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda mix: pickle.loads(pickle.dumps(mix))])
def test_copies_iterate_on_their_own(urls: Urls, duplicate: Callable[[Mixture], Mixture]) -> None:
    """A copied or pickled mixture delivers the same pass."""
    assert delivered(duplicate(make(urls))) == delivered(make(urls))


def test_nothing_is_logged_when_nothing_went_wrong(urls: Urls, caplog: pytest.LogCaptureFixture) -> None:
    """A clean pass is silent."""
    with caplog.at_level(logging.DEBUG, logger="streamshards"):
        list(make(urls))
    assert caplog.records == []
