"""What one reader gathers from which block, step by step, and which blocks it must load, in the order of need. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import gcd
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
    closed: list[Visit] = field(default_factory=list)
    """Visits that are known to be over now that this step has been planned."""


def schedule(order: EpochOrder, assignment: Assignment, *, skip: int = 0, per_step: int = 1) -> Iterator[Step]:
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
    order: EpochOrder,
    assignment: Assignment,
    current: dict[int, Visit],
    first: int,
    count: int,
    per_step: int,
) -> Iterator[Step]:
    positions, lengths = assignment.positions(first, count)
    lengths = np.add.reduceat(lengths, np.arange(0, count, per_step))
    lanes, offsets = order.locate(positions)
    is_start = np.ones(len(positions), dtype=bool)
    is_start[1:] = (np.diff(lanes) != 0) | (np.diff(offsets) != 1)
    is_start[np.cumsum(lengths)[:-1]] = True
    run_at = np.flatnonzero(is_start)
    run_lengths = np.diff(run_at, append=len(positions)).tolist()
    runs = zip(lanes[run_at].tolist(), offsets[run_at].tolist(), run_lengths, strict=True)
    for length in lengths.tolist():
        step = Step()
        while length > 0:
            lane, offset, run = next(runs)
            _follow(order, step, current, lane, offset, run)
            length -= run
        yield step


def _close_all(steps: list[Step], current: dict[int, Visit]) -> list[Step]:
    """Return the last *steps* of a schedule, with the visits that are still open closed from the first of them on.

    At the end of an epoch a reader passes through the tails of many lanes; none may keep its block until the end.
    """
    for visit in current.values():
        visit.closed = True
    steps[0].closed.extend(current.values())
    return steps


def _follow(order: EpochOrder, step: Step, current: dict[int, Visit], lane: int, offset: int, count: int) -> None:
    """Add lane offsets ``[offset, offset + count)`` to *step*, opening and closing visits at block borders."""
    while count > 0:
        visit = current.get(lane)
        if visit is None or not visit.block.start <= offset < visit.block.stop:
            if visit is not None:
                visit.closed = True
                step.closed.append(visit)
            visit = current[lane] = Visit(order.block_at(lane, offset))
            step.opened.append(visit)
        taken = min(count, visit.block.stop - offset)
        assert taken > 0, f"{visit.block} does not hold offset {offset}"  # else this loop would never end
        step.segments.append(Segment(visit, offset - visit.block.start, taken))
        visit.planned += 1
        offset += taken
        count -= taken


def lanes_read(order: EpochOrder, assignment: Assignment) -> list[int]:
    """Return the lanes whose blocks this reader holds side by side."""
    settings = order.settings
    stride = assignment.global_batch * assignment.topology.num_workers
    round_positions = settings.lanes * settings.chunk
    period = round_positions // gcd(round_positions, stride)
    count = min(period, assignment.num_batches, max(1, (1 << 18) // assignment.batch_size))
    if count == 0:
        return []
    positions, _ = assignment.positions(0, count)
    lanes, _ = order.locate(positions)
    return sorted(set(lanes.tolist()))
