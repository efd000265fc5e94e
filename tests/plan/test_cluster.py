"""Whole clusters on paper: ranks × workers that are killed, resized and resumed, epoch after epoch.

Nothing runs here but ``plan/``. A *life* is what one cluster does from a resume until it is killed. Its checkpoint is
taken some steps before that, travels as JSON, and is all that the next life knows. What counts is the *surviving
timeline*: what was delivered before each checkpoint that a later life went on from.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import naive_order
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.options import OrderOptions
from streamshards.plan.assignment import Assignment, Tail
from streamshards.plan.index import Index
from streamshards.plan.order import EpochOrder, Int64Array, OrderSettings, resolve_order
from streamshards.plan.schedule import schedule
from streamshards.plan.state import State
from streamshards.plan.topology import Topology

NOBODY = -1
"""Stands where a rank has no sample in a step; only tail "uneven" has such places."""


class Cluster(NamedTuple):
    """One shape of a cluster."""

    world_size: int
    num_workers: int
    batch_size: int

    @property
    def global_batch(self) -> int:
        return self.world_size * self.batch_size

    def rank(self, rank: int) -> Topology:
        return Topology(rank=rank, world_size=self.world_size)


def assigned(state: State, cluster: Cluster, tail: Tail, topology: Topology) -> Assignment:
    """Return the rest of the epoch as the reader at *topology* sees it."""
    return Assignment(
        num_samples=state.num_samples,
        start=state.position,
        batch_size=cluster.batch_size,
        topology=topology,
        tail=tail,
    )


def all_ranks(state: State, cluster: Cluster, tail: Tail) -> list[Assignment]:
    return [assigned(state, cluster, tail, cluster.rank(rank)) for rank in range(cluster.world_size)]


def delivered(state: State, cluster: Cluster, tail: Tail, num_steps: int) -> Int64Array:
    """Return the positions of the next *num_steps* steps, int64 ``(num_steps, world_size, batch_size)``.

    Each reader is asked for its own batches; a rank receives those of its workers in turn, as a DataLoader does it.
    """
    num_workers = cluster.num_workers
    out = np.full((num_steps, cluster.world_size, cluster.batch_size), NOBODY, dtype=np.int64)
    for rank, worker in itertools.product(range(cluster.world_size), range(num_workers)):
        reader = assigned(state, cluster, tail, cluster.rank(rank).with_worker(worker, num_workers))
        count = min(reader.num_batches, len(range(worker, num_steps, num_workers)))
        positions, lengths = reader.positions(0, count)
        batches = np.full((count, cluster.batch_size), NOBODY, dtype=np.int64)
        batches[np.arange(cluster.batch_size) < lengths[:, None]] = positions
        out[worker : worker + count * num_workers : num_workers, rank] = batches
    return out


def saved(state: State, cluster: Cluster, tail: Tail, num_steps: int) -> str:
    """Return the checkpoint after *num_steps* more steps, as JSON, having seen that every rank would write the same."""
    ranks = all_ranks(state, cluster, tail)
    is_over = num_steps >= max(reader.rank_batches for reader in ranks)
    (text,) = {
        json.dumps(state.after(reader, min(num_steps, reader.rank_batches), is_over=is_over).to_dict())
        for reader in ranks
    }
    return text


def loaded(text: str) -> State:
    return State.from_dict(json.loads(text))


def first_state(rows: Int64Array, cluster: Cluster, *, lanes: int | None = None, block: int | None = None) -> State:
    """Return where a first start on *cluster* begins, with the order that follows from it."""
    num_samples = int(rows.sum())
    order = resolve_order(
        OrderOptions(lanes=lanes, shuffle_block=block),
        shuffle=True,
        seed=17,
        num_samples=num_samples,
        raw_bytes=num_samples,
        global_batch=cluster.global_batch,
        topology=Topology(world_size=cluster.world_size, num_workers=cluster.num_workers),
    )
    return State(epoch=0, position=0, num_samples=num_samples, identity={"fingerprint": "ab" * 16}, order=order)


class Epoch:
    """One epoch, with the sample and the block at each position looked up block by block."""

    def __init__(self, rows: Int64Array, order_settings: OrderSettings, epoch: int) -> None:
        self.order = order = EpochOrder(rows, order_settings, epoch)
        first_sample = np.cumsum(rows) - rows
        self._starts = np.array([order.lane_interval(lane)[0] for lane in range(order_settings.lanes)])
        self._samples = np.empty(order.num_samples, dtype=np.int64)
        self._block = np.empty(order.num_samples, dtype=np.int64)
        self.shards: list[list[int]] = []
        """Of each block, the shards it needs."""
        for lane, start in enumerate(self._starts.tolist()):
            for block in order.blocks(lane):
                stored = [np.arange(p.lo, p.hi) + first_sample[p.shard] for p in block.pieces]
                place = slice(start + block.start, start + block.stop)
                self._samples[place] = np.concatenate(stored)[order.permutation(block)]
                self._block[place] = len(self.shards)
                self.shards.append([piece.shard for piece in block.pieces])

    def _place(self, positions: Int64Array) -> Int64Array:
        lanes, offsets = self.order.locate(positions)
        return self._starts[lanes] + offsets

    def samples(self, positions: Int64Array) -> Int64Array:
        """Return the sample, numbered through the dataset, at each position."""
        return self._samples[self._place(positions)]

    def blocks(self, positions: Int64Array) -> Int64Array:
        """Return the block, numbered through the epoch, of each position."""
        return self._block[self._place(positions)]


# -- every small world -------------------------------------------------------------------------------------------------

SMALL = [Cluster(*shape) for shape in itertools.product((1, 2, 3), (1, 2, 3), (1, 2))]
TAILS: tuple[Tail, ...] = ("pad", "drop", "uneven")


def small_rows(num_samples: int) -> list[int]:
    """Return shards of 3, 0, 1, 2, 3, 0, 1, 2, … rows that hold *num_samples*."""
    rows: list[int] = []
    while sum(rows) < num_samples:
        rows.append(min((3, 0, 1, 2)[len(rows) % 4], num_samples - sum(rows)))
    return rows


@cache
def rest_of_epoch(num_samples: int, position: int, cluster: Cluster, tail: Tail) -> tuple[tuple[int, ...], ...]:
    """Return the positions of each step that is left, rank after rank."""
    state = State(
        epoch=0,
        position=position,
        num_samples=num_samples,
        identity={"fingerprint": ""},
        order=OrderSettings(shuffle=False, seed=0, lanes=1, chunk=1, shuffle_block=1),
    )
    num_steps = max(reader.rank_batches for reader in all_ranks(state, cluster, tail))
    steps = delivered(state, cluster, tail, num_steps)
    return tuple(tuple(p for p in step.reshape(-1).tolist() if p != NOBODY) for step in steps)


def declared(num_samples: int, position: int, cluster: Cluster, tail: Tail) -> tuple[int, int]:
    """Return how many samples the end of an epoch leaves out, and how many it adds, if *cluster* got to *position*."""
    rest = (num_samples - position) % cluster.global_batch
    left_out = rest if tail == "drop" else 0
    padding = (cluster.global_batch - rest) % cluster.global_batch if tail == "pad" else 0
    return left_out, padding


def test_every_small_cluster_resumed_on_every_other(record_testsuite_property: Callable[[str, Any], None]) -> None:
    """For all small epochs, lanes, clusters before and after, tails and resume points: what both lives deliver, one
    after the other, is the order as built the slow way, and after it only the padding that the tail declares."""
    num_cases = 0
    for num_samples in range(1, 9):
        rows = small_rows(num_samples)
        shard_starts = (np.cumsum(rows) - rows).tolist()
        for lanes, first in itertools.product(range(1, min(4, num_samples) + 1), SMALL):
            begin = first_state(np.array(rows), first, lanes=lanes, block=4)
            chosen = begin.order
            reference = [
                shard_starts[shard] + row
                for shard, row in naive_order.epoch_order(
                    rows,
                    shuffle=True,
                    seed=chosen.seed,
                    epoch=0,
                    lanes=chosen.lanes,
                    chunk=chosen.chunk,
                    shuffle_block=chosen.shuffle_block,
                )
            ]
            for tail in TAILS:
                steps = rest_of_epoch(num_samples, 0, first, tail)
                for done in range(len(steps) + 1):
                    before = [p for step in steps[:done] for p in step]
                    state = loaded(saved(begin, first, tail, done))
                    epoch = Epoch(np.array(rows), state.order, state.epoch)
                    sample_at = epoch.samples(np.arange(num_samples)).tolist()
                    for second in SMALL:
                        after = rest_of_epoch(num_samples, state.position, second, tail)
                        seen = [sample_at[p] for p in itertools.chain(before, *after)]
                        last = (0, first) if done == len(steps) else (state.position, second)
                        left_out, padding = declared(num_samples, *last, tail)
                        wrapped = itertools.islice(itertools.cycle(reference), padding)
                        assert seen == [*reference[: num_samples - left_out], *wrapped], (
                            (num_samples, lanes, first, tail, done, second)
                        )  # fmt: skip
                        num_cases += 1
    record_testsuite_property("small clusters: cases", num_cases)
    assert num_cases > 50_000


# -- large worlds ------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What happened to a run; all of it is checked as it happens."""

    lives: int = 0
    kills: int = 0
    steps: int = 0
    samples: int = 0
    again: int = 0
    """Samples that were delivered after the checkpoint, and so once more by the next life."""
    padding: int = 0
    left_out: int = 0


@dataclass
class Timeline:
    """What was delivered and will stay so, epoch by epoch; and what still waits for a checkpoint."""

    kept: dict[int, list[Int64Array]] = field(default_factory=dict)
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    _waiting: list[tuple[int, Int64Array, tuple[int, int] | None]] = field(default_factory=list)

    def receive(self, epoch: int, samples: Int64Array, end: tuple[int, int] | None = None) -> None:
        """Take what all ranks received; *end* says what its tail left out and added, if that ended the epoch."""
        self._waiting.append((epoch, samples, end))

    def checkpoint(self) -> None:
        for epoch, samples, end in self._waiting:
            self.kept.setdefault(epoch, []).append(samples)
            if end is not None:
                self.ends[epoch] = end
        self._waiting.clear()

    def kill(self) -> list[tuple[int, Int64Array]]:
        """Return what was received for nothing."""
        gone = [(epoch, samples) for epoch, samples, _ in self._waiting]
        self._waiting.clear()
        return gone


def references(rows: Int64Array, chosen: OrderSettings, num_epochs: int) -> list[Int64Array]:
    """Return the samples of each epoch, as one rank without workers that is never killed receives them."""
    whole = []
    for epoch in range(num_epochs):
        alone = Cluster(1, 1, 1000)
        state = State(epoch=epoch, position=0, num_samples=int(rows.sum()), identity={"fingerprint": ""}, order=chosen)
        positions = delivered(state, alone, "uneven", -(-state.num_samples // 1000)).reshape(-1)
        whole.append(Epoch(rows, chosen, epoch).samples(positions[positions != NOBODY]))
    return whole


def play(
    rows: Int64Array,
    begin: State,
    *,
    tail: Tail,
    num_epochs: int,
    next_cluster: Callable[[], Cluster],
    draw: Callable[[int, int], int],
    min_kills: int = 0,
    kill_chance: int = 60,
) -> Figures:
    """Play lives until *num_epochs* epochs are over, and check all that they delivered.

    Args:
        rows: Rows of each shard.
        begin: The first start.
        tail: "pad" or "drop".
        num_epochs: How many epochs.
        next_cluster: The shape of each life's cluster.
        draw: Returns a number from its first argument to its second, both included.
        min_kills: The first lives are killed for sure, as many as these.
        kill_chance: Of a later life within an epoch, in percent.
    """
    whole = references(rows, begin.order, num_epochs)
    epochs: dict[tuple[OrderSettings, int], Epoch] = {}
    timeline = Timeline()
    figures = Figures()
    checkpoint = json.dumps(begin.to_dict())
    is_alive = False
    state, cluster = begin, Cluster(1, 1, 1)
    while True:
        if not is_alive:
            state, cluster, is_alive = loaded(checkpoint), next_cluster(), True
            figures.lives += 1
        # Lock-step: one number of batches, on every rank, known before the first of them.
        (num_steps,) = {reader.rank_batches for reader in all_ranks(state, cluster, tail)}
        is_killed = figures.kills < min_kills or draw(1, 100) <= kill_chance
        stop = draw(0, num_steps) if is_killed else num_steps
        positions = delivered(state, cluster, tail, stop)
        assert positions.min(initial=0) >= 0, "a rank had no batch in a step"
        key = (state.order, state.epoch)
        if key not in epochs:
            epochs.clear()
            epochs[key] = Epoch(rows, *key)
        samples = epochs[key].samples(positions.reshape(-1))
        figures.steps += stop
        figures.samples += len(samples)
        end = declared(state.num_samples, state.position, cluster, tail) if state.position < state.num_samples else None
        cut = draw(0, stop)
        if draw(0, 3):  # else no checkpoint was due in this epoch
            timeline.receive(state.epoch, samples[: cut * cluster.global_batch], end if cut == num_steps else None)
            timeline.checkpoint()
            checkpoint = saved(state, cluster, tail, cut)
            samples = samples[cut * cluster.global_batch :]
            end = None if cut == num_steps else end
        timeline.receive(state.epoch, samples, end if stop == num_steps else None)
        if is_killed:
            figures.kills += 1
            is_alive = False
            for epoch, gone in timeline.kill():
                figures.again += len(gone)
                # Delivered for nothing, but not other samples: consecutive ones of the same order.
                if len(gone):
                    at = int(np.flatnonzero(whole[epoch] == gone[0])[0])
                    assert np.array_equal(gone, np.take(whole[epoch], np.arange(at, at + len(gone)), mode="wrap"))
        elif state.epoch + 1 < num_epochs:
            state = replace(state, epoch=state.epoch + 1, position=0)
        else:
            break
    timeline.checkpoint()
    for epoch, reference in enumerate(whole):
        assert np.array_equal(np.sort(reference), np.arange(begin.num_samples))
        left_out, padding = timeline.ends[epoch]
        wrapped = np.take(reference, np.arange(padding), mode="wrap")
        expected = np.concatenate([reference[: begin.num_samples - left_out], wrapped])
        assert np.array_equal(np.concatenate(timeline.kept[epoch]), expected), f"epoch {epoch}"
        figures.padding += padding
        figures.left_out += left_out
    return figures


def uneven_rows(num_shards: int, mean_rows: int) -> Int64Array:
    """Return shards of *mean_rows* on average, from none to twice as many."""
    return np.random.Philox(7).random_raw(num_shards).astype(np.int64) % (2 * mean_rows + 1)


@pytest.mark.parametrize("tail", ["pad", "drop"])
@pytest.mark.parametrize(
    ("start", "lanes"),
    [(Cluster(512, 8, 2), None), (Cluster(64, 4, 16), 64), (Cluster(7, 3, 36), None)],
    ids=["512 ranks", "64 lanes", "7 ranks"],
)
def test_large_clusters_killed_and_resized(
    start: Cluster, lanes: int | None, tail: Tail, record_testsuite_property: Callable[[str, Any], None]
) -> None:
    """Up to 512 ranks × 8 workers, killed and resized at random over three epochs: the surviving timeline is the order
    that one rank receives, every sample once an epoch but for what the tail declares, and all ranks stay in step."""
    rows = uneven_rows(400, 500)
    rng = np.random.default_rng([start.world_size, tail == "pad"])
    worlds = [1, 2, 3, 7, 8, 48, 64, 100, 256, 509, 512]
    clusters = itertools.chain(
        [start],
        (
            Cluster(int(rng.choice(worlds)), int(rng.integers(1, 9)), int(rng.choice([1, 2, 5, 16])))
            for _ in itertools.count()
        ),
    )
    figures = play(
        rows,
        first_state(rows, start, lanes=lanes, block=1500),
        tail=tail,
        num_epochs=3,
        next_cluster=lambda: next(clusters),
        draw=lambda low, high: int(rng.integers(low, high + 1)),
        min_kills=6,
    )
    record_testsuite_property(f"{start}, lanes={lanes}, {tail}", figures)
    assert figures.kills >= 6
    assert figures.again > 0


def test_the_largest_cluster_for_thousands_of_steps() -> None:
    """512 ranks × 8 workers deliver a whole epoch of two thousand steps in the order of one rank."""
    rows = uneven_rows(4000, 500)
    cluster = Cluster(512, 8, 2)
    figures = play(
        rows,
        first_state(rows, cluster, block=2000),
        tail="pad",
        num_epochs=1,
        next_cluster=lambda: cluster,
        draw=lambda _low, high: high,
        kill_chance=0,
    )
    assert figures.steps >= 1900


@st.composite
def runs(draw: st.DrawFn) -> tuple[Int64Array, State, Tail, Callable[[], Cluster], Callable[[int, int], int]]:
    rows = np.array(draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)), dtype=np.int64)
    shapes = st.builds(Cluster, st.integers(1, 12), st.integers(1, 4), st.integers(1, 9))
    state = first_state(
        rows,
        draw(shapes),
        lanes=draw(st.none() | st.integers(1, min(9, int(rows.sum())))),
        block=draw(st.integers(1, 60)),
    )
    # Lives are many and short: kills end when these have been drawn, so that the run does.
    kills = draw(st.lists(st.just(1), max_size=8))

    def number(low: int, high: int) -> int:
        if (low, high) == (1, 100):
            return kills.pop() if kills else 100
        return draw(st.integers(low, high))

    return rows, state, draw(st.sampled_from(["pad", "drop"])), lambda: draw(shapes), number


@given(run=runs())
@settings(deadline=None, max_examples=100)
def test_any_run_of_kills_and_resizes(
    run: tuple[Int64Array, State, Tail, Callable[[], Cluster], Callable[[int, int], int]],
) -> None:
    """Whatever the shards, the first cluster, the kills, the checkpoints and the sizes: two epochs in one order."""
    rows, state, tail, next_cluster, number = run
    play(rows, state, tail=tail, num_epochs=2, next_cluster=next_cluster, draw=number)


# -- how many readers need a shard -------------------------------------------------------------------------------------


def readers_per_shard(epoch: Epoch, rows: Int64Array, state: State, cluster: Cluster) -> Int64Array:
    """Return how many readers need each shard that has rows, over the rest of the epoch."""
    (num_steps,) = {reader.rank_batches for reader in all_ranks(state, cluster, "drop")}
    positions = delivered(state, cluster, "drop", num_steps)
    workers = np.arange(num_steps) % cluster.num_workers
    readers = np.arange(cluster.world_size) * cluster.num_workers + workers[:, None]
    num_blocks = len(epoch.shards)
    needs = np.unique((readers[:, :, None] * num_blocks + epoch.blocks(positions)).reshape(-1))
    pairs = {(need // num_blocks, shard) for need in needs.tolist() for shard in epoch.shards[need % num_blocks]}
    counts = np.bincount([shard for _, shard in pairs], minlength=len(rows))
    return counts[rows > 0]


def opened_by_schedules(rows: Int64Array, state: State, cluster: Cluster) -> Int64Array:
    """Return the same, from the blocks that each reader's schedule opens."""
    order = EpochOrder(rows, state.order, state.epoch)
    counts = np.zeros(len(rows), dtype=np.int64)
    for rank, worker in itertools.product(range(cluster.world_size), range(cluster.num_workers)):
        reader = assigned(state, cluster, "drop", cluster.rank(rank).with_worker(worker, cluster.num_workers))
        shards = {
            piece.shard for step in schedule(order, reader) for visit in step.opened for piece in visit.block.pieces
        }
        counts[list(shards)] += 1
    return counts[rows > 0]


GLOBAL_BATCH = 512
CHUNK = 16
FIRST_WORKERS = 4
LANES = GLOBAL_BATCH // CHUNK * FIRST_WORKERS
SHARDS_PER_LANE = 96
SHARD_ROWS = 20


def shaped(world_size: int, num_workers: int) -> Cluster:
    return Cluster(world_size, num_workers, GLOBAL_BATCH // world_size)


def test_each_shard_is_needed_by_one_reader(record_testsuite_property: Callable[[str, Any], None]) -> None:
    """With K = (G/b)·n₀ lanes, every W that divides G/b and every n that divides n₀: 1.00 to 1.04 readers a shard.

    Two readers need the shard that a lane's border cuts, and the last block of a lane: its last rows, fewer than a
    chunk, are dealt at the end of the epoch. Here a block is two shards, as by default, and a lane 96.
    """
    rows = SHARD_ROWS - 2 + np.arange(SHARDS_PER_LANE * LANES, dtype=np.int64) % 5
    state = first_state(rows, shaped(GLOBAL_BATCH // CHUNK, FIRST_WORKERS), block=2 * SHARD_ROWS)
    assert (state.order.lanes, state.order.chunk) == (LANES, CHUNK)
    epoch = Epoch(rows, state.order, 0)
    for world_size, num_workers in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4)):
        mean = float(readers_per_shard(epoch, rows, state, shaped(world_size, num_workers)).mean())
        record_testsuite_property(f"readers per shard, {world_size} ranks x {num_workers} workers", round(mean, 4))
        assert 1.0 <= mean <= 1.04


def test_schedules_open_what_was_counted() -> None:
    """The blocks that readers' schedules open need the shards counted from positions, in a shape that fits the lanes,
    in ones that do not, and after a resume on another one."""
    rows = uneven_rows(400, 60)
    first = shaped(32, 2)
    begin = first_state(rows, first, block=300)
    epoch = Epoch(rows, begin.order, 0)
    later = loaded(saved(begin, first, "drop", 20))
    for state, cluster in itertools.product((begin, later), (first, shaped(8, 1), shaped(16, 3), Cluster(5, 2, 33))):
        counted = readers_per_shard(epoch, rows, state, cluster)
        assert np.array_equal(counted, opened_by_schedules(rows, state, cluster))


# -- the state ---------------------------------------------------------------------------------------------------------


def test_the_state_of_a_large_run_is_under_a_kibibyte() -> None:
    """A checkpoint of 512 ranks × 8 workers over 1,000 shards is one small dict, the same from every rank."""
    names = [f"part/shard-{number:05}.pt.zst" for number in range(1000)]
    counts = np.full(1000, 100_000, dtype=np.int64)
    index = Index(
        schema={"fields": {"tokens": "int32"}},
        names=names,
        rows=counts,
        sizes=counts * 1000,
        raw_sizes=counts * 4000,
        digests=[f"{number:032x}" for number in range(1000)],
    )
    cluster = Cluster(512, 8, 64)
    begin = replace(
        first_state(index.rows, cluster),
        identity={"fingerprint": index.fingerprint, "num_shards": index.num_shards},
        epoch=99,
    )
    text = saved(begin, cluster, "pad", 3000)
    assert len(text) < 1024
    assert loaded(text).position == 3000 * cluster.global_batch
