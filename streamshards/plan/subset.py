"""Which samples of a dataset an epoch consists of: all, or those that ``take``, ``skip`` and ``split`` leave. Pure.

Theory. A subset is a list of *cuts*, replayed over the shards' row counts whenever it is needed: nothing is stored per
sample. Each cut leaves every shard some of its rows, in ascending order, and drops shards that have none left, so a
subset looks to the order like a dataset of smaller shards. Where the rows of one shard lie is found when it is read.

* ``Take(n)`` and ``Skip(n)``: the first n samples in the order of the index, and the others.
* ``Split`` by sample, with fraction f: the first side has, of the shard that covers samples [a, b), ⌊bf⌋ − ⌊af⌋, drawn
  by a permutation keyed by (seed, shard). So each side has its share of every shard, to within one sample, and reads
  all of them; and shards that are appended leave every sample on its side.
* ``Split`` by shard: the shards in a permutation keyed by the seed; the first ⌊Nf⌋ rows of that tape. Only the shard on
  the border belongs to both sides. Shards that are appended make another permutation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from streamshards.errors import OptionInvalid
from streamshards.options import require_int
from streamshards.plan.order import Draw, Int64Array, keyed_permutation

SplitBy: TypeAlias = Literal["sample", "shard"]


@dataclass(frozen=True, slots=True)
class Take:
    """The first *count* samples, in the order of the index."""

    count: int

    def __str__(self) -> str:
        return f"take({self.count})"


@dataclass(frozen=True, slots=True)
class Skip:
    """All but the first *count* samples, in the order of the index."""

    count: int

    def __str__(self) -> str:
        return f"skip({self.count})"


@dataclass(frozen=True, slots=True)
class Split:
    """One of two sides that share no sample and together hold all."""

    fraction: Fraction
    """Of the samples that go to side 0."""
    seed: int
    by: SplitBy
    side: int
    """0 or 1."""

    def __str__(self) -> str:
        return f"split({float(self.fraction)!r}, seed={self.seed}, by={self.by!r})[{self.side}]"


Cut: TypeAlias = Take | Skip | Split


def require_split(fraction: float, *, seed: int, by: str) -> tuple[Split, Split]:
    """Return the two sides of a split.

    Raises:
        OptionInvalid: *fraction* is not between 0 and 1, or *by* is unknown.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise OptionInvalid(f"split({fraction!r}) must be the part of the samples on the first side, from 0 to 1")
    require_int(seed, name="split seed", minimum=0)
    for known in get_args(SplitBy):
        if by == known:
            exact = Fraction(str(fraction))  # 0.9 means nine tenths, not the nearest float
            return Split(exact, seed, known, 0), Split(exact, seed, known, 1)
    raise OptionInvalid(f'split by={by!r} must be "sample" or "shard"')


_CUT: Final = re.compile(
    r"(?P<name>take|skip)\((?P<count>\d{1,19})\)"
    r"|split\((?P<fraction>[\d.e-]{1,32}), seed=(?P<seed>\d{1,19}), by='(?P<by>sample|shard)'\)\[(?P<side>[01])\]"
)
"""One cut as its ``__str__`` writes it. No number has more digits than an int64 or a float needs."""


def parse_cuts(text: str) -> tuple[Cut, ...]:
    """Return the cuts whose ``Subset.name`` is *text*; none of an empty one.

    Guarantees: accepts what ``Subset.name`` writes, to the letter, and nothing else; runs no code from *text*.

    Raises:
        OptionInvalid: It is not such a name.
    """
    cuts: list[Cut] = []
    at = 0
    while at < len(text):
        match = _CUT.match(text, at + bool(cuts))  # past the dot between two; that it is one is seen below
        if match is None:
            break
        cuts.append(_cut_of(match, text))
        at = match.end()
    if ".".join(map(str, cuts)) != text:
        raise _no_subset(text)
    return tuple(cuts)


def _cut_of(match: re.Match[str], text: str) -> Cut:
    if match["name"]:
        count = require_int(int(match["count"]), name=match["name"], minimum=0)
        return Take(count) if match["name"] == "take" else Skip(count)
    try:
        fraction = float(match["fraction"])
    except ValueError:
        raise _no_subset(text) from None
    return require_split(fraction, seed=int(match["seed"]), by=match["by"])[int(match["side"])]


def _no_subset(text: str) -> OptionInvalid:
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    return OptionInvalid(f"{shown!r} is no subset; one looks like \"split(0.9, seed=1, by='sample')[0].take(10)\"")


class _Level(NamedTuple):
    """What one cut left: parts of the parts before it."""

    parents: Int64Array
    """Which part of the level before each part comes from, ascending."""
    starts: Int64Array | None
    """The first of the parent's rows that each part has; None where the rows are drawn."""


class Subset:
    """The rows of each shard that belong to a dataset.

    Args:
        rows: Rows of each shard, int64 ``(num_shards,)``, in the order of the index.
        cuts: What was cut off, in order; none leaves all.
    """

    def __init__(self, rows: Int64Array, cuts: Sequence[Cut] = ()) -> None:
        self.cuts = tuple(cuts)
        self._all_rows = rows
        self._counts = [rows]
        self._levels: list[_Level] = []
        self.shards: Int64Array = np.arange(len(rows), dtype=np.int64)
        """The shards that have rows here, int64 ``(parts,)``, ascending; without cuts, all shards."""
        for cut in self.cuts:
            parents, starts, counts = self._cut(cut, self._counts[-1])
            self._levels.append(_Level(parents, starts))
            self._counts.append(counts)
            self.shards = self.shards[parents]

    @property
    def rows(self) -> Int64Array:
        """How many rows each of ``shards`` has here, int64 ``(parts,)``."""
        return self._counts[-1]

    @property
    def num_samples(self) -> int:
        return int(self.rows.sum())

    @property
    def decoded_rows(self) -> Int64Array:
        """At most how many rows of each of ``shards`` must be decoded for those that are here, int64 ``(parts,)``."""
        draws = any(level.starts is None for level in self._levels)
        return self._all_rows[self.shards] if draws else self.rows

    @property
    def name(self) -> str:
        """How it was cut: ``"split(0.9, seed=1, by='sample')[0].take(100)"``; empty for a whole dataset."""
        return ".".join(str(cut) for cut in self.cuts)

    def rows_of(self, shard: int) -> range | Int64Array:
        """Return the rows of *shard*, one of ``shards``, that belong here, ascending: a range, or int64 ``(rows,)``."""
        part = int(self.shards.searchsorted(shard))
        parts = [part]
        for level in reversed(self._levels):
            parts.append(int(level.parents[parts[-1]]))
        found: range | Int64Array = range(int(self._all_rows[shard]))
        for depth, cut in enumerate(self.cuts):
            level, counts = self._levels[depth], self._counts[depth + 1]
            child = parts[len(self.cuts) - 1 - depth]
            if level.starts is not None:
                start = int(level.starts[child])
                found = found[start : start + int(counts[child])]
            else:
                assert isinstance(cut, Split)  # only splits draw
                found = _drawn(cut, shard, found, int(counts[child]))
        return found

    def _cut(self, cut: Cut, counts: Int64Array) -> tuple[Int64Array, Int64Array | None, Int64Array]:
        """Return parents, starts and row counts of the parts that *cut* leaves of parts with *counts* rows."""
        borders = np.concatenate([[0], np.cumsum(counts)])
        total = int(borders[-1])
        if isinstance(cut, Split):
            if cut.by == "sample":
                quota = _shares(borders, cut.fraction)
                return _dropping_empty(quota if cut.side == 0 else counts - quota, None)
            return self._cut_by_shard(cut, counts, int(cut.fraction * total))
        lo, hi = (0, cut.count) if isinstance(cut, Take) else (cut.count, total)
        starts = np.clip(lo - borders[:-1], 0, counts)
        stops = np.clip(hi - borders[:-1], 0, counts)
        return _dropping_empty(np.maximum(stops - starts, 0), starts)

    def _cut_by_shard(
        self, cut: Split, counts: Int64Array, first_side: int
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        tape = keyed_permutation(len(counts), seed=cut.seed, epoch=0, draw=Draw.SPLIT)
        before = np.empty_like(counts)
        before[tape] = np.concatenate([[0], np.cumsum(counts[tape])[:-1]]) if len(tape) else counts
        in_first = np.clip(first_side - before, 0, counts)
        starts = np.zeros_like(counts) if cut.side == 0 else in_first
        parents, _, left = _dropping_empty(in_first if cut.side == 0 else counts - in_first, None)
        return parents, starts[parents], left

    def __repr__(self) -> str:
        return f"Subset({self.name or 'all'}, samples={self.num_samples:,}, shards={len(self.shards):,})"


def _dropping_empty(counts: Int64Array, starts: Int64Array | None) -> tuple[Int64Array, Int64Array | None, Int64Array]:
    parents = np.flatnonzero(counts)
    return parents, None if starts is None else starts[parents], counts[parents]


def _shares(borders: Int64Array, fraction: Fraction) -> Int64Array:
    """Return ``⌊b·f⌋ − ⌊a·f⌋`` for each pair of borders (a, b), with f = *fraction*; exact at any size."""
    fits = int(borders[-1]) * fraction.numerator < 1 << 63 and fraction.denominator < 1 << 63
    exact = borders if fits else borders.astype(object)  # Python's integers where int64 would overflow
    return np.diff(exact * fraction.numerator // fraction.denominator).astype(np.int64)


def _drawn(cut: Split, shard: int, rows: range | Int64Array, count: int) -> Int64Array:
    """Return the *count* of *rows* that are on the side of *cut*, ascending."""
    order = keyed_permutation(len(rows), seed=cut.seed, epoch=0, draw=Draw.SPLIT, lane=1, block=shard)
    kept = np.sort(order[:count] if cut.side == 0 else order[len(rows) - count :])
    return np.asarray(rows, dtype=np.int64)[kept]
