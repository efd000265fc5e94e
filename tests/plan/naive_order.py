"""The order once more, the slow and obvious way: lists that are built, cut and walked. No closed form, no search.

It was written from the definition of the order (docs/architecture.md), not from ``plan/order.py``, and shares no code
with it. What it takes from numpy is the raw Philox stream, whose words the golden files pin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

SHARDS_DRAW = 0
BLOCK_DRAW = 1

T = TypeVar("T")


class Row(NamedTuple):
    shard: int
    row: int


@dataclass
class NaiveBlock:
    """Rows that are shuffled together, as they stand on the tape."""

    number: int
    start: int
    rows: list[Row]


def permutation(n: int, key: Sequence[int]) -> list[int]:
    """Return ``0 … n-1`` sorted by the leading bits of n Philox words; equal leading bits keep their order."""
    halves = [half for number in key for half in (number % 2**32, number // 2**32)]
    words = [int(word) for word in np.random.Philox(np.random.SeedSequence(halves)).random_raw(n)]
    low_bits = 0
    while 2**low_bits < n:
        low_bits += 1
    return sorted(range(n), key=lambda i: (words[i] // 2**low_bits, i))


def tape(rows: Sequence[int], *, shuffle: bool, seed: int, epoch: int) -> list[Row]:
    """Return every row of the dataset, shard after shard."""
    shards = permutation(len(rows), (seed, epoch, SHARDS_DRAW, 0, 0)) if shuffle else list(range(len(rows)))
    return [Row(shard, row) for shard in shards for row in range(rows[shard])]


def cut_lanes(items: Sequence[T], lanes: int) -> list[list[T]]:
    """Return *items* cut into lanes."""
    n = len(items)
    return [list(items[lane * n // lanes : (lane + 1) * n // lanes]) for lane in range(lanes)]


def nominal_cuts(shuffle_block: int, rows: int) -> list[int]:
    """Return the lane offsets where blocks would begin if they could begin anywhere; the last is beyond *rows*."""
    cuts = [0]
    for part in (8, 4, 2):
        cuts.append(cuts[-1] + max(1, shuffle_block // part))
    while cuts[-1] <= rows:
        cuts.append(cuts[-1] + shuffle_block)
    return cuts


def cut_blocks(lane: Sequence[Row], shuffle_block: int) -> list[NaiveBlock]:
    """Return *lane* cut into blocks by walking along it: one begins at the first row of a shard, once a cut is due."""
    cuts = nominal_cuts(shuffle_block, len(lane))
    blocks: list[NaiveBlock] = []
    number = 0
    for offset, row in enumerate(lane):
        if row.row == 0:
            while cuts[number + 1] <= offset:
                number += 1
        if not blocks or blocks[-1].number != number:
            blocks.append(NaiveBlock(number, offset, []))
        blocks[-1].rows.append(row)
    return blocks


def shuffled_lane(
    lane: Sequence[Row], number: int, *, shuffle: bool, shuffle_block: int, seed: int, epoch: int
) -> list[Row]:
    """Return the rows of lane *number* as they are delivered."""
    out: list[Row] = []
    for block in cut_blocks(lane, shuffle_block):
        n = len(block.rows)
        places = permutation(n, (seed, epoch, BLOCK_DRAW, number, block.number)) if shuffle else range(n)
        out += [block.rows[place] for place in places]
    return out


def interleave(lanes: Sequence[Sequence[T]], chunk: int) -> list[T]:
    """Return the items of all lanes: *chunk* from each in turn while every lane has that many, then lane by lane."""
    left = [list(lane) for lane in lanes]
    out: list[T] = []
    while all(len(lane) >= chunk for lane in left):
        for lane in left:
            out += lane[:chunk]
            del lane[:chunk]
    for lane in left:
        out += lane
    return out


def epoch_order(
    rows: Sequence[int], *, shuffle: bool, seed: int, epoch: int, lanes: int, chunk: int, shuffle_block: int
) -> list[Row]:
    """Return the whole epoch, from position 0 on."""
    cut = cut_lanes(tape(rows, shuffle=shuffle, seed=seed, epoch=epoch), lanes)
    shuffled = [
        shuffled_lane(lane, i, shuffle=shuffle, shuffle_block=shuffle_block, seed=seed, epoch=epoch)
        for i, lane in enumerate(cut)
    ]
    return interleave(shuffled, chunk)


def global_batches(num_samples: int, start: int, size: int, tail: str) -> list[list[int]]:
    """Return the positions of every global batch from *start* on."""
    left = list(range(start, num_samples))
    if tail == "drop":
        left = left[: len(left) - len(left) % size]
    if tail == "pad":
        wrapped = 0
        while len(left) % size:
            left.append(wrapped % num_samples)
            wrapped += 1
    return [left[i : i + size] for i in range(0, len(left), size)]


def reader_batches(
    batches: Sequence[Sequence[int]], *, batch_size: int, rank: int, worker: int, num_workers: int
) -> list[list[int]]:
    """Return the batches of one reader: the rank's slice of each global batch, dealt to its workers in turn."""
    slices = [list(batch[rank * batch_size : (rank + 1) * batch_size]) for batch in batches]
    return [part for part in slices if part][worker::num_workers]
