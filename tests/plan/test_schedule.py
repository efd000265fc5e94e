"""What a reader gathers, step by step: the assignment's positions, through the order, out of blocks opened in time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import naive_order
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamshards.plan import schedule as schedule_module
from streamshards.plan.assignment import Assignment, Tail
from streamshards.plan.mixture import MixtureOrder, MixtureSettings, SourceRows
from streamshards.plan.order import EpochOrder, OrderSettings
from streamshards.plan.schedule import SampleOrder, Step, Visit, schedule
from streamshards.plan.topology import Topology
from streamshards.plan.weights import parse_weights

TAILS: tuple[Tail, ...] = ("pad", "drop", "uneven")


class Case(NamedTuple):
    order: EpochOrder
    reader: Assignment
    naive: list[naive_order.Row]

    def batches(self) -> list[list[tuple[int, int]]]:
        """Return the rows of each of the reader's batches, the slow way."""
        place = self.reader.topology
        steps = naive_order.global_batches(
            self.reader.num_samples, self.reader.start, self.reader.global_batch, self.reader.tail
        )
        mine = naive_order.reader_batches(
            steps,
            batch_size=self.reader.batch_size,
            rank=place.rank,
            worker=place.worker,
            num_workers=place.num_workers,
        )
        return [[tuple(self.naive[p]) for p in batch] for batch in mine]


def case(
    rows: Any,
    *,
    lanes: int = 1,
    chunk: int = 1,
    shuffle_block: int = 4,
    start: int = 0,
    batch_size: int = 2,
    topology: Topology | None = None,
    tail: Tail = "pad",
) -> Case:
    shape = {"shuffle": True, "seed": 3, "lanes": lanes, "chunk": chunk, "shuffle_block": shuffle_block}
    order = EpochOrder(np.array(rows, dtype=np.int64), OrderSettings(**shape), epoch=1)  # type: ignore[arg-type]
    reader = Assignment(
        num_samples=order.num_samples,
        start=start,
        batch_size=batch_size,
        topology=topology or Topology(),
        tail=tail,
    )
    return Case(order, reader, naive_order.epoch_order(list(rows), epoch=1, **shape))  # type: ignore[arg-type]


def small_cases() -> Iterator[Case]:
    """Yield every reader of several hundred small epochs."""
    shapes = itertools.product(([3, 0, 4], [1, 2, 3, 4], [0, 0, 11]), (1, 2, 4), (1, 3), (1, 16))
    for (rows, lanes, chunk, shuffle_block), tail in itertools.product(shapes, TAILS):
        for world_size, num_workers, start in itertools.product((1, 2), (1, 2), (0, 3)):
            for rank, worker in itertools.product(range(world_size), range(num_workers)):
                yield case(
                    rows,
                    lanes=lanes,
                    chunk=chunk,
                    shuffle_block=shuffle_block,
                    start=start,
                    batch_size=4 // world_size,
                    topology=Topology(rank=rank, world_size=world_size, worker=worker, num_workers=num_workers),
                    tail=tail,
                )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.lists(st.integers(0, 30), max_size=20))
    assume(sum(rows) > 0)
    world_size, num_workers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return case(
        rows,
        lanes=draw(st.integers(1, min(12, sum(rows)))),
        chunk=draw(st.integers(1, 10)),
        shuffle_block=draw(st.integers(1, 100)),
        start=draw(st.integers(0, sum(rows))),
        batch_size=draw(st.integers(1, 12)),
        topology=Topology(
            rank=draw(st.integers(0, world_size - 1)),
            world_size=world_size,
            worker=draw(st.integers(0, num_workers - 1)),
            num_workers=num_workers,
        ),
        tail=draw(st.sampled_from(TAILS)),
    )


def gathered(order: EpochOrder, step: Step) -> list[tuple[int, int]]:
    """Return the rows of one step, gathered as the engine does: from a block's stored rows, through its permutation."""
    out: list[tuple[int, int]] = []
    for segment in step.segments:
        block = segment.visit.block
        stored = [(piece.shard, row) for piece in block.pieces for row in range(piece.lo, piece.hi)]
        places = order.permutation(block)[segment.first : segment.first + segment.num_rows]
        assert len(places) == segment.num_rows > 0
        out += [stored[place] for place in places]
    return out if step.reordering is None else [out[row] for row in step.reordering]


def check_visits(steps: Iterator[Step]) -> None:
    """Follow *steps* and check the life of every visit, at each step, as far as it has been followed."""
    seen: Counter[int] = Counter()
    final: dict[int, int] = {}
    opened: list[Visit] = []
    first_used: list[Visit] = []
    closed: list[Visit] = []
    for step in steps:
        opened += step.opened
        for visit, _, _ in step.segments:
            assert any(visit is known for known in opened), "used before it was opened"
            assert visit.planned > 0
            if not any(visit is known for known in first_used):
                first_used.append(visit)
            seen[id(visit)] += 1
            assert seen[id(visit)] <= final.get(id(visit), visit.planned), "used after it was closed"
        closed += step.closed
        for visit in step.closed:
            assert visit.closed
            final[id(visit)] = visit.planned
    assert list(map(id, opened)) == list(map(id, first_used)), "opened in another order than needed"
    assert len(set(map(id, opened))) == len(opened), "opened twice"
    assert sorted(map(id, closed)) == sorted(map(id, opened)), "not closed exactly once"
    assert all(visit.planned == seen[id(visit)] == final[id(visit)] for visit in opened), "planned is not what came"
    by_lane: dict[int, list[Visit]] = {}
    for visit in opened:
        by_lane.setdefault(visit.block.lane, []).append(visit)
    for visits in by_lane.values():
        assert all(a.block != b.block for a, b in itertools.pairwise(visits)), "opened again without having left"


def test_steps_gather_the_assigned_rows_for_every_small_case() -> None:
    """For two thousand readers of small epochs, of every tail: each step gathers the rows of one batch, those
    that the naive order has at the positions dealt to this reader; and the life of every visit is in order."""
    for each in small_cases():
        steps = list(schedule(each.order, each.reader))
        assert [gathered(each.order, step) for step in steps] == each.batches()
        check_visits(schedule(each.order, each.reader))


@given(cases())
@settings(deadline=None, max_examples=80)
def test_steps_gather_what_rows_at_says(each: Case) -> None:
    """In larger epochs: the rows gathered are those that the order has at the assignment's positions."""
    positions, lengths = each.reader.positions(0, each.reader.num_batches)
    shards, rows = each.order.rows_at(positions)
    steps = list(schedule(each.order, each.reader))
    expected = list(zip(shards.tolist(), rows.tolist(), strict=True))
    assert [len(gathered(each.order, step)) for step in steps] == lengths.tolist()
    assert [row for step in steps for row in gathered(each.order, step)] == expected
    assert [gathered(each.order, step) for step in steps] == each.batches()


@given(cases(), st.integers(1, 40), st.integers(1, 4))
@settings(deadline=None, max_examples=80)
def test_every_visit_opens_and_closes_once_however_steps_are_grouped(each: Case, planned: int, per_step: int) -> None:
    """However many positions are planned at once: visits open in the order of need and close once, `planned` never
    changes after that, and the steps are the same."""
    whole = [gathered(each.order, step) for step in schedule(each.order, each.reader, per_step=per_step)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "_PLANNED_POSITIONS", planned)
        check_visits(schedule(each.order, each.reader, per_step=per_step))
        grouped = [gathered(each.order, step) for step in schedule(each.order, each.reader, per_step=per_step)]
    assert grouped == whole


@given(cases(), st.integers(0, 60), st.integers(1, 5))
@settings(deadline=None, max_examples=80)
def test_skipping_batches_is_dropping_them(each: Case, skip: int, per_step: int) -> None:
    """`skip=k` gives the batches after the k-th, `per_step=m` joins each m of them in a row; nothing else changes."""
    left = each.batches()[skip:]
    joined = [list(itertools.chain(*left[i : i + per_step])) for i in range(0, len(left), per_step)]
    steps = schedule(each.order, each.reader, skip=skip, per_step=per_step)
    assert [gathered(each.order, step) for step in steps] == joined
    check_visits(schedule(each.order, each.reader, skip=skip, per_step=per_step))


def test_a_visit_closes_when_its_lane_moves_on() -> None:
    """Before the last planned group, a visit closes in the very step that opens the lane's next block."""
    each = case([10] * 40, lanes=2, chunk=5, shuffle_block=20, batch_size=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "_PLANNED_POSITIONS", 5)
        steps = list(schedule(each.order, each.reader))
    current: dict[int, Visit] = {}
    for step in steps[:-1]:
        left = [current[visit.block.lane] for visit in step.opened if visit.block.lane in current]
        assert list(map(id, step.closed)) == list(map(id, left))
        current.update((visit.block.lane, visit) for visit in step.opened)
    assert set(map(id, current.values())) == set(map(id, steps[-1].closed))


def test_no_block_is_kept_until_the_end() -> None:
    """The last visit of every lane is known to be the last as soon as the final group is planned: it is among those
    closed by that group's first step, so that no lane keeps its block while the tails of the others pass by."""
    each = case([10] * 4, lanes=4, chunk=7, shuffle_block=20, batch_size=5)
    steps = list(schedule(each.order, each.reader))
    last_of_lane = {visit.block.lane: visit for step in steps for visit in step.opened}
    assert len(last_of_lane) == 4
    assert set(map(id, last_of_lane.values())) == set(map(id, steps[0].closed))


def test_padding_visits_the_first_block_again() -> None:
    """A tail that wraps opens the epoch's first block a second time, as a visit of its own."""
    each = case([4] * 6, shuffle_block=8, batch_size=5)
    steps = list(schedule(each.order, each.reader))
    opened = [visit for step in steps for visit in step.opened]
    assert opened[0].block == opened[-1].block
    assert opened[0] is not opened[-1]
    assert gathered(each.order, steps[-1])[4:] == [tuple(each.naive[0])]


def test_an_epoch_smaller_than_a_batch_wraps_around_and_around() -> None:
    """A batch of more samples than there are holds the epoch again and again."""
    each = case([2, 1], batch_size=8)
    (step,) = schedule(each.order, each.reader)
    assert gathered(each.order, step) == [tuple(row) for row in (each.naive * 3)[:8]]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("rows", [[], [0, 0], [3]])
def test_nothing_left_is_no_step(tail: Tail, rows: list[int]) -> None:
    """At the end of an epoch, or in an empty one, there are no steps."""
    each = case(rows, start=sum(rows), tail=tail)
    assert list(schedule(each.order, each.reader)) == []


@pytest.mark.parametrize(
    ("num_shards", "spread", "with_end"),
    [(512, 0, True), (512, 200, False), (2048, 200, True)],
    ids=["equal shards", "unequal shards but for the last steps", "unequal shards"],
)
def test_each_shard_is_read_by_one_reader(num_shards: int, spread: int, with_end: bool) -> None:
    """With the default order on 8 ranks of 4 workers, shards have at most 1.1 readers on average.

    What is more than 1 are the shards on the borders of the 32 lanes, and the rows left when the lanes stop taking
    turns: each rank takes its last batch from the last blocks of about three lanes. Both cost a fixed number of reads,
    so with fewer than about 64 shards a reader the end alone weighs more than 0.1 (0.14 with 512 unequal shards).
    """
    rows = 2_000 + np.arange(num_shards, dtype=np.int64) * 7_919 % (2 * spread + 1) - spread
    shape = OrderSettings(shuffle=True, seed=5, lanes=32, chunk=64, shuffle_block=4_000)
    order = EpochOrder(rows, shape, epoch=0)
    num_readers: Counter[int] = Counter()
    for rank, worker in itertools.product(range(8), range(4)):
        reader = Assignment(
            num_samples=order.num_samples if with_end else order.num_samples // 2048 * 2048,
            start=0,
            batch_size=64,
            topology=Topology(rank=rank, world_size=8, worker=worker, num_workers=4),
            tail="uneven",
        )
        steps = schedule(order, reader)
        num_readers.update({piece.shard for step in steps for visit in step.opened for piece in visit.block.pieces})
    assert len(num_readers) == num_shards
    assert sum(num_readers.values()) / num_shards <= 1.1


def test_each_lane_has_one_reader_while_all_lanes_last() -> None:
    """With the default order, each lane belongs to one reader for as long as lanes take turns; only the few rows
    that remain at the end may be read by another."""
    shape = OrderSettings(shuffle=True, seed=5, lanes=8, chunk=16, shuffle_block=100)
    order = EpochOrder(np.full(40, 50), shape, epoch=0)
    full_rounds = order.num_samples // (8 * 16) * (8 * 16)
    owners: dict[int, set[tuple[int, int]]] = {}
    for rank, worker in itertools.product(range(4), range(2)):
        topology = Topology(rank=rank, world_size=4, worker=worker, num_workers=2)
        reader = Assignment(num_samples=full_rounds, start=0, batch_size=16, topology=topology, tail="drop")
        lanes, _ = order.locate(reader.positions(0, reader.num_batches)[0])
        for lane in set(lanes.tolist()):
            owners.setdefault(lane, set()).add((rank, worker))
    assert sorted(owners) == list(range(8))
    assert all(len(mine) == 1 for mine in owners.values())


# -- short runs: lane by lane, then put in order -----------------------------------------------------------------------


def planned_with(short_run: int, order: SampleOrder, reader: Assignment, **options: int) -> list[Step]:
    """Return the steps, planned as if runs of fewer than *short_run* rows were short; 0: none are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "_SHORT_RUN", short_run)
        return list(schedule(order, reader, **options))


def checked_visits(short_run: int, order: SampleOrder, reader: Assignment, **options: int) -> list[Step]:
    """Return the same after checking the life of every visit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "_SHORT_RUN", short_run)
        check_visits(schedule(order, reader, **options))
    return planned_with(short_run, order, reader, **options)


def rows_of(step: Step) -> list[tuple[int, int, int, int]]:
    """Return source, epoch, shard and row of each row of a step, gathered as the engine does."""
    out: list[tuple[int, int, int, int]] = []
    for visit, first, num_rows in step.segments:
        stored = [(piece.shard, row) for piece in visit.block.pieces for row in range(piece.lo, piece.hi)]
        places = visit.order.permutation(visit.block)[first : first + num_rows]
        out += [(visit.source, visit.order.epoch, *stored[place]) for place in places]
    return out if step.reordering is None else [out[row] for row in step.reordering]


def require_alike(one_by_one: list[Step], by_lane: list[Step]) -> None:
    """Check that both deliver the same rows, and that each lane is gathered in one go where they are put in order."""
    assert [rows_of(step) for step in one_by_one] == [rows_of(step) for step in by_lane]
    assert [step.positions.tolist() for step in one_by_one] == [step.positions.tolist() for step in by_lane]
    assert all(step.reordering is None for step in one_by_one)
    for step, other in zip(by_lane, one_by_one, strict=True):
        assert len(step.segments) <= len(other.segments)
        if step.reordering is not None:
            assert sorted(step.reordering.tolist()) == list(range(len(step.positions)))


@given(cases(), st.integers(0, 20), st.integers(1, 4), st.sampled_from([1, 8, 1 << 20]))
@settings(deadline=None, max_examples=150)
def test_rows_gathered_by_lane_come_in_the_same_order(each: Case, skip: int, per_step: int, short_run: int) -> None:
    """Whether short runs are gathered one by one or lane by lane: each step has the same rows at the same places."""
    one_by_one = planned_with(0, each.order, each.reader, skip=skip, per_step=per_step)
    by_lane = checked_visits(short_run, each.order, each.reader, skip=skip, per_step=per_step)
    require_alike(one_by_one, by_lane)


@given(cases(), st.integers(1, 40), st.integers(1, 3))
@settings(deadline=None, max_examples=80)
def test_gathering_by_lane_does_not_depend_on_how_much_is_planned(each: Case, planned: int, per_step: int) -> None:
    """However many positions are planned at once, steps that are put in order deliver the same."""
    whole = planned_with(0, each.order, each.reader, per_step=per_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "_PLANNED_POSITIONS", planned)
        require_alike(whole, checked_visits(1 << 20, each.order, each.reader, per_step=per_step))


def test_short_runs_of_repeated_lanes_are_gathered_by_lane() -> None:
    """Rows of four lanes that take turns one by one: a batch of 32 is four segments and not 32, put in order."""
    each = case([40] * 8, lanes=4, chunk=1, shuffle_block=1000, batch_size=32)
    steps = list(schedule(each.order, each.reader))
    assert all(step.reordering is not None for step in steps)
    assert all(len(step.segments) == 4 for step in steps)
    assert [gathered(each.order, step) for step in steps] == each.batches()


def test_long_runs_and_single_lanes_are_not_put_in_order() -> None:
    """Where nothing is gained nothing is copied twice: runs of eight rows, or one run a lane."""
    for shape in ({"lanes": 4, "chunk": 8, "batch_size": 64}, {"lanes": 8, "chunk": 2, "batch_size": 16}):
        each = case([32] * 16, shuffle_block=1000, **shape)  # type: ignore[arg-type] # all of them are ints
        steps = list(schedule(each.order, each.reader))
        assert all(step.reordering is None for step in steps)
        assert [gathered(each.order, step) for step in steps] == each.batches()


@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(0, 2),
    st.data(),
)
@settings(deadline=None, max_examples=100)
def test_a_mixture_gathered_by_lane_comes_in_the_same_order(
    sources: list[list[int]], lanes: int, chunk: int, batch_size: int, num_workers: int, epoch: int, data: st.DataObject
) -> None:
    """Sources that take turns row by row, and wrap into their next epochs: the same rows at the same places."""
    assume(all(sum(rows) >= lanes for rows in sources))
    names = [f"s{number}" for number in range(len(sources))]
    rows = [
        SourceRows(name, np.array(rows, dtype=np.int64), True, number, 10, np.arange(len(rows), dtype=np.int64))
        for number, (name, rows) in enumerate(zip(names, sources, strict=True))
    ]
    weights = {name: data.draw(st.integers(1, 5)) for name in names}
    num_samples = data.draw(st.integers(1, 120))
    shape = MixtureSettings(seed=1, lanes=lanes, chunk=chunk)
    order = MixtureOrder(rows, parse_weights(weights, names), shape, epoch=epoch, num_samples=num_samples)
    for worker in range(num_workers):
        reader = Assignment(
            num_samples=num_samples,
            start=0,
            batch_size=batch_size,
            topology=Topology(worker=worker, num_workers=num_workers),
            tail="pad",
        )
        one_by_one = planned_with(0, order, reader)
        require_alike(one_by_one, planned_with(1 << 20, order, reader))
