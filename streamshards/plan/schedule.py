"""What one reader gathers from which block, step by step, and which blocks it must load, in the order of need. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from streamshards.plan.assignment import Assignment
from streamshards.plan.order import Block, EpochOrder

_PLANNED_POSITIONS = 1 << 14
"""Positions located at once: numpy's fixed costs (about 50 µs) spread over many batches, 128 KiB an array."""


@dataclass(eq=False, slots=True)
class Visit:
    """One stay of a reader in one block: from the first row it takes there until it moves on in that lane.

    A block is visited again when the epoch's tail wraps to its first positions.
    """

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
    opened: list[Visit] = field(default_factory=list)
    """Visits that begin in this step, in the order of need."""


def schedule(order: EpochOrder, assignment: Assignment, *, skip: int = 0) -> Iterator[Step]:
    """Yield the steps of one reader in order, from its batch number *skip*; a visit is closed as soon as it is over."""
    current: dict[int, Visit] = {}
    group = max(1, _PLANNED_POSITIONS // assignment.batch_size)
    for first in range(skip, assignment.num_batches, group):
        count = min(group, assignment.num_batches - first)
        positions, lengths = assignment.positions(first, count)
        lanes, offsets = order.locate(positions)
        starts = np.zeros(len(positions), dtype=bool)
        starts[1:] = (np.diff(lanes) != 0) | (np.diff(offsets) != 1)
        ends = np.cumsum(lengths)
        starts[ends[:-1]] = True
        starts[0] = True
        run_at = np.flatnonzero(starts)
        run_counts = np.diff(run_at, append=len(positions)).tolist()
        runs = zip(lanes[run_at].tolist(), offsets[run_at].tolist(), run_counts, strict=True)
        for length in lengths.tolist():
            step = Step()
            while length > 0:
                lane, offset, run = next(runs)
                _follow(order, step, current, lane, offset, run)
                length -= run
            yield step
    for visit in current.values():
        visit.closed = True


def _follow(order: EpochOrder, step: Step, current: dict[int, Visit], lane: int, offset: int, count: int) -> None:
    """Add lane offsets ``[offset, offset + count)`` to *step*, opening and closing visits at block borders."""
    while count > 0:
        visit = current.get(lane)
        if visit is None or not visit.block.start <= offset < visit.block.stop:
            if visit is not None:
                visit.closed = True
            visit = current[lane] = Visit(order.block_at(lane, offset))
            step.opened.append(visit)
        taken = min(count, visit.block.stop - offset)
        step.segments.append(Segment(visit, offset - visit.block.start, taken))
        visit.planned += 1
        offset += taken
        count -= taken
