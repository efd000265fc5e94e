"""What one reader gathers from which block, step by step, and which blocks it must load, in the order of need. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import gcd
from typing import NamedTuple, Protocol

import numpy as np

from streamshards.plan.assignment import Assignment
from streamshards.plan.order import Block, EpochOrder, Int64Array, Lane, Places, distinct

_PLANNED_POSITIONS = 1 << 14
"""Positions located at once: numpy's fixed costs (about 50 µs) spread over many batches, 128 KiB an array."""


_SHORT_RUN = 8
"""Rows: where a lane's rows come in shorter runs, they are gathered lane by lane and put in order at the end. That
copies the batch once more (0.15 ms a MB), but saves each run's fixed cost (20 µs and more)."""


class SampleOrder(Protocol):
    """An order of samples over lanes: that of one dataset's epoch, or of a mixture."""

    def places(self, positions: Int64Array) -> Places:
        """Return where each position leads; positions are in ``[0, num_samples)``."""

    def lane(self, track: int, number: int) -> Lane:
        """Return the lane that ``places`` named."""


@dataclass(eq=False, slots=True)
class Visit:
    """One stay of a reader in one block: from the first row it takes there until it moves on in that track.

    A block is visited again when the epoch's tail wraps to its first positions.
    """

    source: int
    """Which dataset of a mixture the block belongs to."""
    order: EpochOrder
    """The epoch of that dataset."""
    lane: int
    """The lane as ``SampleOrder.places`` names it."""
    block: Block
    planned: int = 0
    """Segments that take rows from here, as far as the schedule has been followed."""
    closed: bool = False
    """No more segments will come."""


class Segment(NamedTuple):
    """Consecutive lane offsets of one block that go into one batch, one after the other."""

    visit: Visit
    first: int
    """Offset in the block (not in the lane) of the first row."""
    num_rows: int


@dataclass(slots=True)
class Step:
    """One batch: the rows of its segments, in this order."""

    segments: list[Segment] = field(default_factory=list)
    positions: Int64Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Of the batch's rows, int64 ``(rows,)``; those at or beyond the end of the epoch are padding."""
    reordering: Int64Array | None = None
    """Which row of the segments, one after the other, each row of the batch is; None where they are the same."""
    opened: list[Visit] = field(default_factory=list)
    """Visits that begin in this step, in the order of need."""
    closed: list[Visit] = field(default_factory=list)
    """Visits that are known to be over now that this step has been planned."""


def schedule(order: SampleOrder, assignment: Assignment, *, skip: int = 0, per_step: int = 1) -> Iterator[Step]:
    """Yield the steps of one reader in order; a visit is closed as soon as it is known to be over.

    Args:
        order: The epoch's order.
        assignment: The reader's share of it.
        skip: Batches of the reader to leave out at the start.
        per_step: Consecutive batches of the reader that make one step.
    """
    current: dict[int, Visit] = {}
    group = max(1, _PLANNED_POSITIONS // (assignment.batch_size * per_step)) * per_step
    for first in range(skip, assignment.num_batches, group):
        count = min(group, assignment.num_batches - first)
        steps = _plan_group(order, assignment, current, first, count, per_step)
        if first + count == assignment.num_batches:
            yield from _close_all(list(steps), current)
        else:
            yield from steps


def _plan_group(
    order: SampleOrder,
    assignment: Assignment,
    current: dict[int, Visit],
    first: int,
    count: int,
    per_step: int,
) -> Iterator[Step]:
    positions, lengths = assignment.slots(first, count)
    lengths = np.add.reduceat(lengths, np.arange(0, count, per_step))
    ends = np.cumsum(lengths)
    places = order.places(positions % assignment.num_samples)
    run_at = _run_starts(places, ends)
    by_track = None
    if len(run_at) * _SHORT_RUN > len(positions):
        steps = np.repeat(np.arange(len(ends)), lengths)
        if len(run_at) > len(distinct(steps[run_at] * (int(places.tracks.max()) + 1) + places.tracks[run_at])):
            by_track = np.lexsort((places.tracks, steps))
            places = Places(*(values[by_track] for values in places))
            run_at = _run_starts(places, ends)
    run_lengths = np.diff(run_at, append=len(positions)).tolist()
    runs = zip(*(values[run_at].tolist() for values in places), run_lengths, strict=True)
    for begin, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
        step = Step(positions=positions[begin:end])
        if by_track is not None:
            step.reordering = np.argsort(by_track[begin:end])
        left = end - begin
        while left > 0:
            track, lane, offset, run = next(runs)
            _follow(order, step, current, track, lane, offset, run)
            left -= run
        yield step


def _run_starts(places: Places, ends: Int64Array) -> Int64Array:
    """Return where runs of consecutive rows of one lane begin; no run goes beyond the end of a step."""
    is_start = np.ones(len(places.offsets), dtype=bool)
    is_start[1:] = np.diff(places.offsets) != 1
    is_start[1:] |= np.diff(places.lanes) != 0
    if places.tracks is not places.lanes:
        is_start[1:] |= np.diff(places.tracks) != 0
    is_start[ends[:-1]] = True
    return np.flatnonzero(is_start)


def _close_all(steps: list[Step], current: dict[int, Visit]) -> list[Step]:
    """Return the last *steps* of a schedule, with the visits that are still open closed from the first of them on.

    At the end of an epoch a reader passes through the tails of many lanes; none may keep its block until the end.
    """
    for visit in current.values():
        visit.closed = True
    steps[0].closed.extend(current.values())
    return steps


def _follow(
    order: SampleOrder, step: Step, current: dict[int, Visit], track: int, lane: int, offset: int, count: int
) -> None:
    """Add lane offsets ``[offset, offset + count)`` to *step*, opening and closing visits at block borders."""
    while count > 0:
        visit = current.get(track)
        if visit is None or visit.lane != lane or not visit.block.start <= offset < visit.block.stop:
            if visit is not None:
                visit.closed = True
                step.closed.append(visit)
            source, epoch_order, number = order.lane(track, lane)
            visit = Visit(source, epoch_order, lane, epoch_order.block_at(number, offset))
            current[track] = visit
            step.opened.append(visit)
        taken = min(count, visit.block.stop - offset)
        assert taken > 0, f"{visit.block} does not hold offset {offset}"  # else this loop would never end
        step.segments.append(Segment(visit, offset - visit.block.start, taken))
        visit.planned += 1
        offset += taken
        count -= taken


def tracks_read(order: SampleOrder, assignment: Assignment, *, period: int) -> list[tuple[int, int]]:
    """Return the tracks that this reader follows side by side, each with the first of its lanes.

    Args:
        order: The epoch's order.
        assignment: The reader's share of it.
        period: Positions after which the order comes back to the same track: lanes × chunk.
    """
    stride = assignment.global_batch * assignment.topology.num_workers
    steps = period // gcd(period, stride)
    count = min(steps, assignment.num_batches, max(1, (1 << 18) // assignment.batch_size))
    if count == 0:
        return []
    positions, _ = assignment.positions(0, count)
    places = order.places(positions)
    tracks, firsts = np.unique(places.tracks, return_index=True)
    return list(zip(tracks.tolist(), places.lanes[firsts].tolist(), strict=True))
