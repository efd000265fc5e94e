"""Which positions a reader delivers: together all readers deliver each position once, in every small topology."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import naive_order
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.errors import OptionInvalid
from streamshards.plan.assignment import Assignment, Tail, require_tail
from streamshards.plan.topology import Topology

TAILS: tuple[Tail, ...] = ("pad", "drop", "uneven")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def readers(
    num_samples: int, start: int, global_batch: int, world_size: int, num_workers: int, tail: Tail
) -> Iterator[Assignment]:
    """Yield the assignment of every reader, rank by rank."""
    for rank, worker in itertools.product(range(world_size), range(num_workers)):
        yield Assignment(
            num_samples=num_samples,
            start=start,
            batch_size=global_batch // world_size,
            topology=Topology(rank=rank, world_size=world_size, worker=worker, num_workers=num_workers),
            tail=tail,
        )


def batches_of(reader: Assignment) -> list[list[int]]:
    positions, lengths = reader.positions(0, reader.num_batches)
    assert positions.dtype == lengths.dtype == np.int64
    return [part.tolist() for part in np.split(positions, np.cumsum(lengths)[:-1])] if len(lengths) else []


def steps_of(everyone: list[Assignment]) -> list[list[int]]:
    """Return, for each training step, what all ranks receive in it: each rank takes its workers' batches in turn."""
    waiting = {(a.topology.rank, a.topology.worker): batches_of(a) for a in everyone}
    world_size, num_workers = everyone[0].topology.world_size, everyone[0].topology.num_workers
    steps: list[list[int]] = []
    while any(waiting.values()):
        step: list[int] = []
        for rank in range(world_size):
            queue = waiting[rank, len(steps) % num_workers]
            step += queue.pop(0) if queue else []
        steps.append(step)
    return steps


def every_small_start() -> Iterator[tuple[int, int, int]]:
    """Yield samples, start and global batch."""
    for num_samples, global_batch in itertools.product(range(11), (1, 2, 3, 4, 6)):
        for start in range(num_samples + 1):
            yield num_samples, start, global_batch


@pytest.mark.parametrize("tail", TAILS)
def test_every_topology_delivers_the_same_steps(tail: Tail) -> None:
    """For every small epoch, start, world size, number of workers and batch size with the same global batch: each
    reader's batches are those dealt by hand, and every step is the same positions in the same order."""
    for num_samples, start, size in every_small_start():
        expected = naive_order.global_batches(num_samples, start, size, tail)
        for world_size, num_workers in itertools.product(divisors(size), (1, 2, 3)):
            everyone = list(readers(num_samples, start, size, world_size, num_workers, tail))
            for reader in everyone:
                place = reader.topology
                assert batches_of(reader) == naive_order.reader_batches(
                    expected,
                    batch_size=size // world_size,
                    rank=place.rank,
                    worker=place.worker,
                    num_workers=num_workers,
                )
            assert steps_of(everyone) == expected, (num_samples, start, size, world_size, num_workers)


def test_each_tail_delivers_what_it_says() -> None:
    """From any start, "uneven" delivers each position left exactly once; "drop" all but a last short global batch;
    "pad" all of them and then the epoch's first positions, just enough to fill the last global batch."""
    for num_samples, start, size in every_small_start():
        delivered = {
            tail: [p for step in steps_of(list(readers(num_samples, start, size, size, 1, tail))) for p in step]
            for tail in TAILS
        }
        left = list(range(start, num_samples))
        assert delivered["uneven"] == left
        assert delivered["drop"] == left[: len(left) // size * size]
        padding = delivered["pad"][len(left) :]
        assert delivered["pad"][: len(left)] == left
        assert padding == [i % num_samples for i in range(-len(left) % size)]


@pytest.mark.parametrize("tail", TAILS)
def test_workers_share_the_batches_of_their_rank(tail: Tail) -> None:
    """The batches of a rank's workers add up to the rank's, and differ by at most one."""
    for num_samples, start, size in every_small_start():
        for world_size, num_workers in itertools.product(divisors(size), range(1, 6)):
            everyone = list(readers(num_samples, start, size, world_size, num_workers, tail))
            for rank in range(world_size):
                mine = [a for a in everyone if a.topology.rank == rank]
                counts = [a.num_batches for a in mine]
                assert {a.rank_batches for a in mine} == {sum(counts)}
                assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("tail", ["pad", "drop"])
def test_ranks_stay_in_lock_step(tail: Tail) -> None:
    """With "pad" and "drop" every rank delivers the same number of batches, each of the full size."""
    for num_samples, start, size in every_small_start():
        for world_size in divisors(size):
            everyone = list(readers(num_samples, start, size, world_size, 1, tail))
            assert len({a.rank_batches for a in everyone}) == 1
            assert {len(b) for a in everyone for b in batches_of(a)} <= {size // world_size}


def test_uneven_ranks_differ_by_one_batch() -> None:
    """With "uneven" a rank delivers at most one batch fewer than rank 0, and only its last batch may be short."""
    for num_samples, start, size in every_small_start():
        for world_size in divisors(size):
            everyone = list(readers(num_samples, start, size, world_size, 1, "uneven"))
            counts = [a.rank_batches for a in everyone]
            assert counts == sorted(counts, reverse=True)
            assert counts[0] - counts[-1] <= 1
            assert all(len(b) == size // world_size for a in everyone for b in batches_of(a)[:-1])


@pytest.mark.parametrize("tail", TAILS)
def test_any_slice_of_the_batches_can_be_asked_for(tail: Tail) -> None:
    """Asking for batches [first, first + count) gives just those of the reader's batches."""
    for num_samples, start, world_size, num_workers in itertools.product((0, 1, 7, 10), (0, 1), (1, 2), (1, 2)):
        for reader in readers(num_samples, min(start, num_samples), 2, world_size, num_workers, tail):
            everything = batches_of(reader)
            for first in range(len(everything) + 1):
                for count in range(len(everything) - first + 1):
                    positions, lengths = reader.positions(first, count)
                    chosen = everything[first : first + count]
                    assert positions.tolist() == [p for batch in chosen for p in batch]
                    assert lengths.tolist() == [len(batch) for batch in chosen]


@pytest.mark.parametrize("tail", TAILS)
def test_position_after_is_where_the_next_step_begins(tail: Tail) -> None:
    """After k batches, the position is the first that no step so far has delivered; after the last, the epoch's end,
    whatever the tail did - but for a rank that the last, uneven step leaves out: others may still wait for it."""
    for num_samples, start, size in every_small_start():
        steps = naive_order.global_batches(num_samples, start, size, tail)
        for world_size in divisors(size):
            for reader in readers(num_samples, start, size, world_size, 1, tail):
                for k in range(reader.rank_batches):
                    assert reader.position_after(k) == start + sum(map(len, steps[:k])) == steps[k][0]
                is_left_out = tail == "uneven" and reader.rank_batches < len(steps)
                end = steps[reader.rank_batches][0] if is_left_out else num_samples
                assert reader.position_after(reader.rank_batches) == end


@st.composite
def clusters(draw: st.DrawFn) -> tuple[int, int, int]:
    return draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 9))


@given(num_samples=st.integers(1, 400), runs=st.lists(st.tuples(clusters(), st.integers(0, 12)), max_size=6))
@settings(deadline=None, max_examples=80)
def test_any_chain_of_resumes_delivers_each_position_once(
    num_samples: int, runs: list[tuple[tuple[int, int, int], int]]
) -> None:
    """A run that is stopped after any number of steps, and resumed on other ranks, workers and batch sizes as often
    as you like, delivers positions 0 … N-1, in this order, once each."""
    delivered: list[int] = []
    position = 0
    for (world_size, num_workers, batch_size), num_steps in [*runs, ((2, 1, 3), num_samples)]:
        size = world_size * batch_size
        everyone = list(readers(num_samples, position, size, world_size, num_workers, "uneven"))
        steps = steps_of(everyone)[:num_steps]
        delivered += [p for step in steps for p in step]
        position = everyone[0].position_after(len(steps))
        assert position == len(delivered)
    assert delivered == list(range(num_samples))


@given(
    num_samples=st.integers(1, 5 * 10**9),
    start=st.floats(0, 1),
    batch_size=st.integers(1, 4096),
    world_size=st.integers(1, 1024),
    num_workers=st.integers(1, 16),
    tail=st.sampled_from(TAILS),
    data=st.data(),
)
@settings(deadline=None, max_examples=100)
def test_large_epochs_end_where_small_ones_do(
    num_samples: int,
    start: float,
    batch_size: int,
    world_size: int,
    num_workers: int,
    tail: Tail,
    data: st.DataObject,
) -> None:
    """In epochs of billions of samples, a reader's last batch holds only positions of the epoch, the batch after it
    would be beyond it, and finding it costs no more than its own size."""
    rank = data.draw(st.integers(0, world_size - 1))
    worker = data.draw(st.integers(0, num_workers - 1))
    begin = int(start * num_samples)
    reader = Assignment(
        num_samples=num_samples,
        start=begin,
        batch_size=batch_size,
        topology=Topology(rank=rank, world_size=world_size, worker=worker, num_workers=num_workers),
        tail=tail,
    )
    step_after = worker + reader.num_batches * num_workers
    beyond = begin + step_after * reader.global_batch
    assert beyond + (reader.global_batch if tail == "drop" else rank * batch_size if tail == "uneven" else 0) >= (
        num_samples + (1 if tail == "drop" else 0)
    )
    if reader.num_batches:
        positions, lengths = reader.positions(reader.num_batches - 1, 1)
        assert len(positions) == lengths[0]
        assert 0 < lengths[0] <= batch_size
        assert 0 <= positions.min() <= positions.max() < num_samples
        first = begin + (step_after - num_workers) * reader.global_batch + rank * batch_size
        assert positions[0] == first % num_samples


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"start": -1}, "position=-1"),
        ({"start": 11}, "position=11"),
    ],
)
def test_no_start_outside_the_epoch(wrong: dict[str, int], named: str) -> None:
    """A start outside the epoch, or a batch of nothing, is refused by name and value."""
    chosen = {"num_samples": 10, "start": 0, "batch_size": 2, **wrong}
    with pytest.raises(OptionInvalid, match=named):
        Assignment(**chosen, topology=Topology(), tail="pad")


def test_tails_have_three_names() -> None:
    """Each name of a tail is itself; any other is refused with the names there are."""
    assert [require_tail(tail) for tail in TAILS] == list(TAILS)
    for wrong in ("", "Pad", "wrap"):
        with pytest.raises(OptionInvalid, match=f'tail={wrong!r} must be "pad", "drop" or "uneven"'):
            require_tail(wrong)
