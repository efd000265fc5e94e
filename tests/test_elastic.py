"""A run that changes its shape from life to life: other ranks, other workers, another batch size, one order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import pytest

from streamshards import OrderOptions, StreamingDataLoader, StreamingDataset, Topology
from tests.datasets import flat, ids, write

NUM_SAMPLES: Final = 101
GLOBAL_BATCH: Final = 12
"""Of the first life; it stands in the order as lanes times chunk."""
LANES: Final = 4
Tail = Literal["pad", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """One start of a training job."""

    world_size: int
    num_workers: int
    batch_size: int
    """Of one rank."""
    steps: int
    """How many global batches it lives for."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("dataset") / "train")
    write(folder, range(NUM_SAMPLES), shard_bytes=1_000)
    return folder


@pytest.fixture(scope="module")
def orders(url: str) -> list[list[int]]:
    """The order of each epoch, as a single rank without workers sees it."""
    dataset = open_dataset(url, batch_size=GLOBAL_BATCH)
    return [flat(ids(dataset))[:NUM_SAMPLES] for _ in range(26)]


def open_dataset(url: str, **options: Any) -> StreamingDataset:
    order = OrderOptions(lanes=LANES, shuffle_block=20)
    return StreamingDataset(url, shuffle=True, seed=4, columns=["id"], order=order, **options)


def start(url: str, life: Life, state: dict[str, Any] | None, epoch: int, tail: Tail) -> list[StreamingDataLoader]:
    """Return the loader of each rank, at *state*, or at the beginning of *epoch*."""
    loaders = []
    for rank in range(life.world_size):
        topology = Topology(rank=rank, world_size=life.world_size)
        dataset = open_dataset(url, batch_size=life.batch_size, topology=topology, tail=tail)
        context = "fork" if life.num_workers else None
        loader = StreamingDataLoader(dataset, num_workers=life.num_workers, multiprocessing_context=context)
        if state is None:
            dataset.set_epoch(epoch)
        else:
            loader.load_state_dict(state)
        loaders.append(loader)
    return loaders


def global_batches(loaders: list[StreamingDataLoader]) -> Iterator[list[int]]:
    """Yield the ids of each step over all ranks, rank after rank, epoch after epoch."""
    while True:
        for parts in zip(*loaders, strict=True):
            yield flat(ids(parts))


def live_through(url: str, orders: list[list[int]], lives: list[Life], *, epoch: int, tail: Tail = "pad") -> None:
    """Check each global batch of each life against the order, and that all ranks save the same state."""
    position = 0
    state: dict[str, Any] | None = None
    for life in lives:
        loaders = start(url, life, state, epoch, tail)
        received = global_batches(loaders)
        size = life.world_size * life.batch_size
        for _ in range(life.steps):
            if position == NUM_SAMPLES or (tail == "drop" and NUM_SAMPLES - position < size):
                epoch, position = epoch + 1, 0
            wanted = [orders[epoch][place % NUM_SAMPLES] for place in range(position, position + size)]
            assert next(received) == wanted
            position = min(position + size, NUM_SAMPLES)
            if tail == "drop" and NUM_SAMPLES - position < size:
                position = NUM_SAMPLES
        states = [json.dumps(loader.state_dict()) for loader in loaders]
        assert len(set(states)) == 1
        state = json.loads(states[0])
        assert (state["epoch"], state["position"]) == (epoch, position)
        assert (state["lanes"], state["chunk"]) == (LANES, GLOBAL_BATCH // LANES)


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(2, 2, 6, 3), (3, 1, 4, 3), (1, 0, 12, 2), (4, 1, 3, 4)], id="same-global-batch"),
        pytest.param([(3, 1, 4, 3), (2, 2, 5, 2), (1, 1, 7, 4), (5, 0, 1, 9)], id="other-global-batches"),
        pytest.param([(1, 2, 12, 7), (4, 1, 6, 2), (2, 0, 1, 3), (3, 2, 2, 2)], id="over-the-end-of-an-epoch"),
    ],
)
def test_lives_with_workers(
    url: str, orders: list[list[int]], shapes: list[tuple[int, int, int, int]], epoch: int
) -> None:
    """Checkpoints of W ranks × n workers go on with other W and n: each step's samples are those of one rank alone."""
    lives = [
        Life(world_size=world_size, num_workers=num_workers, batch_size=batch_size, steps=steps)
        for world_size, num_workers, batch_size, steps in shapes
    ]
    live_through(url, orders, lives, epoch=epoch)


@pytest.mark.parametrize("tail", ["pad", "drop"])
@pytest.mark.parametrize("seed", range(15))
def test_lives_of_any_shape(url: str, orders: list[list[int]], seed: int, tail: Tail) -> None:
    """Four lives of random shapes, from a random epoch on, any number of steps each: never a sample out of order."""
    rng = random.Random(seed)
    first = rng.choice([1, 2, 3, 4, 6])
    lives = [Life(world_size=first, num_workers=0, batch_size=GLOBAL_BATCH // first, steps=rng.randint(0, 9))]
    lives += [
        Life(world_size=rng.randint(1, 6), num_workers=0, batch_size=rng.randint(1, 9), steps=rng.randint(0, 9))
        for _ in range(3)
    ]
    live_through(url, orders, lives, epoch=rng.randint(0, 3), tail=tail)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_of_every_step_loads_on_every_small_cluster(
    url: str, orders: list[list[int]], num_workers: int
) -> None:
    """Two ranks write; one, three and five ranks, whose number divides nothing, read the rest of the epoch."""
    writers = start(url, Life(world_size=2, num_workers=num_workers, batch_size=6, steps=0), None, 2, "pad")
    received = global_batches(writers)
    for step in range(1, 9):
        assert next(received) == orders[2][(step - 1) * GLOBAL_BATCH : step * GLOBAL_BATCH]
        state = writers[1].state_dict()
        for world_size, batch_size in ((1, 10), (3, 4), (5, 3)):
            life = Life(world_size=world_size, num_workers=0, batch_size=batch_size, steps=0)
            readers = start(url, life, state, 0, "pad")
            rest = flat(flat(ids(parts)) for parts in zip(*readers, strict=True))
            left = NUM_SAMPLES - step * GLOBAL_BATCH
            assert rest[:left] == orders[2][step * GLOBAL_BATCH :]
            assert len(rest) - left < world_size * batch_size
