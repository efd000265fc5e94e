"""The mixture once more, the slow and obvious way: lanes that are dealt one position at a time. No closed form.

It was written from the theory above ``plan/mixture.py`` and shares no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import naive_order

MIXTURE_DRAW = 3
BLOCK = 1000

Weights = Sequence[Fraction]
Phases = Sequence[tuple[int, Weights]]
"""(from_sample, weights of sum 1)."""


class Sample(NamedTuple):
    source: int
    x: int


def radical_inverse(number: int) -> Fraction:
    """Return the binary digits of *number*, mirrored at the point."""
    out, digit = Fraction(0), Fraction(1, 2)
    while number:
        out += digit * (number % 2)
        number //= 2
        digit /= 2
    return out


def slots_of(weights: Weights, block: int, length: int) -> list[int]:
    """Return how many of a block's *length* slots each source has."""
    u = radical_inverse(block)
    counts, before = [], Fraction(0)
    for weight in weights:
        whole = math.floor(weight * length)
        after = before + weight * length - whole
        counts.append(whole + math.ceil(after - u) - math.ceil(before - u))
        before = after
    return counts


@lru_cache(2000)
def slots_in_order(
    weights: tuple[Fraction, ...], block: int, length: int, seed: int, lane: int, number: int
) -> list[int]:
    """Return the source of each slot of a block."""
    in_list = [source for source, count in enumerate(slots_of(weights, block, length)) for _ in range(count)]
    return [in_list[i] for i in naive_order.permutation(len(in_list), (seed, 0, MIXTURE_DRAW, lane, number))]


@dataclass
class NaiveLane:
    """Where one lane stands."""

    number: int
    uses: list[int]
    phase: int = 0
    block: int = 0
    blocks_of_all_phases: int = 0
    slots: list[int] = field(default_factory=list)
    """Sources of the rest of the block, the next one last."""

    def begin(self, phase: int) -> None:
        if phase != self.phase:
            assert self.slots == []  # blocks end where phases do
            self.phase, self.block = phase, 0

    def next_source(self, weights: Weights, seed: int, left: int) -> int:
        """Return the source of the next slot; *left* slots of the phase are left, this one included."""
        if not self.slots:
            number = self.blocks_of_all_phases
            self.slots = slots_in_order(tuple(weights), self.block, min(left, BLOCK), seed, self.number, number)[::-1]
            self.block += 1
            self.blocks_of_all_phases += 1
        return self.slots.pop()


def stream(phases: Phases, *, seed: int, lanes: int, chunk: int) -> Iterator[Sample]:
    """Yield what each position has, for ever."""
    dealt = [NaiveLane(number, [0] * len(phases[0][1])) for number in range(lanes)]
    ends = [math.ceil(Fraction(from_sample, lanes * chunk)) * chunk for from_sample, _ in phases[1:]]
    ends.append(10**30)
    position = slot = 0
    while True:
        phase = max(i for i, (from_sample, _) in enumerate(phases) if from_sample <= position)
        for lane in dealt:
            lane.begin(phase)
            for turn in range(chunk):
                source = lane.next_source(phases[phase][1], seed, ends[phase] - slot - turn)
                yield Sample(source, lane.uses[source] * lanes + lane.number)
                lane.uses[source] += 1
                position += 1
        slot += chunk


def first_exhausted(samples: Iterator[Sample], sizes: Sequence[int]) -> int:
    """Return how many samples come before one that its source gives again."""
    return next(position for position, (source, x) in enumerate(samples) if x >= sizes[source])


def all_exhausted(samples: Iterator[Sample], sizes: Sequence[int]) -> int:
    """Return how many samples it takes until each sample of each source has come."""
    left = sum(sizes)
    for position, (source, x) in enumerate(samples):
        left -= x < sizes[source]
        if left == 0:
            return position + 1
    raise AssertionError("a stream has no end")
