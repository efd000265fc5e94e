"""Subsets: chains of take, skip and split, against lists of rows."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards import OptionInvalid
from streamshards.plan.order import Draw, keyed_permutation
from streamshards.plan.subset import Cut, Skip, Split, Subset, Take, require_split

Parts: TypeAlias = dict[int, list[int]]
"""The rows of each shard, in the order of the index."""

ROW_COUNTS = st.lists(st.integers(0, 9), max_size=8)
FRACTIONS = st.one_of(st.sampled_from([0, 1, 0.0, 0.1, 0.5, 0.9, 1e-9, 1 / 3]), st.floats(0, 1, allow_subnormal=False))
BYS = st.sampled_from(["sample", "shard"])


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    kind = draw(st.sampled_from(["take", "skip", "split", "split"]))
    if kind == "split":
        sides = require_split(draw(FRACTIONS), seed=draw(st.integers(0, 3)), by=draw(BYS))
        return sides[draw(st.integers(0, 1))]
    count = draw(st.integers(0, 40))
    return Take(count) if kind == "take" else Skip(count)


def subset(rows: list[int], *chain: Cut) -> Subset:
    return Subset(np.array(rows, dtype=np.int64), chain)


def parts_of(cut_dataset: Subset) -> Parts:
    return {shard: np.asarray(cut_dataset.rows_of(shard)).tolist() for shard in cut_dataset.shards.tolist()}


def samples_of(parts: Parts) -> list[tuple[int, int]]:
    return [(shard, row) for shard, rows in parts.items() for row in rows]


def naive(rows: list[int], chain: list[Cut]) -> Parts:
    """Return what *chain* leaves, worked out sample by sample."""
    parts = {shard: list(range(count)) for shard, count in enumerate(rows)}
    for cut in chain:
        kept = naive_cut(parts, cut)
        left = {shard: [row for row in rows if (shard, row) in kept] for shard, rows in parts.items()}
        parts = {shard: rows for shard, rows in left.items() if rows}
    return parts


def naive_cut(parts: Parts, cut: Cut) -> set[tuple[int, int]]:
    samples = samples_of(parts)
    if isinstance(cut, Take):
        return set(samples[: cut.count])
    if isinstance(cut, Skip):
        return set(samples[cut.count :])
    first_side = naive_by_shard(parts, cut) if cut.by == "shard" else naive_by_sample(parts, cut)
    return first_side if cut.side == 0 else set(samples) - first_side


def naive_by_shard(parts: Parts, cut: Split) -> set[tuple[int, int]]:
    shards = list(parts)
    tape = keyed_permutation(len(shards), seed=cut.seed, epoch=0, draw=Draw.SPLIT)
    samples = [(shards[place], row) for place in tape.tolist() for row in parts[shards[place]]]
    return set(samples[: int(cut.fraction * len(samples))])


def naive_by_sample(parts: Parts, cut: Split) -> set[tuple[int, int]]:
    chosen: set[tuple[int, int]] = set()
    begin = 0
    for shard, rows in parts.items():
        end = begin + len(rows)
        order = keyed_permutation(len(rows), seed=cut.seed, epoch=0, draw=Draw.SPLIT, lane=1, block=shard)
        quota = int(end * cut.fraction) - int(begin * cut.fraction)
        chosen |= {(shard, rows[place]) for place in order[:quota].tolist()}
        begin = end
    return chosen


@given(ROW_COUNTS, st.lists(cuts(), max_size=4))
@settings(deadline=None, max_examples=400)
def test_a_chain_of_cuts_leaves_what_cutting_lists_leaves(rows: list[int], chain: list[Cut]) -> None:
    """Whatever is cut off, in whatever order: the rows of each shard are those that lists of samples would have."""
    cut_dataset, expected = subset(rows, *chain), naive(rows, chain)
    assert parts_of(cut_dataset) == expected
    assert cut_dataset.rows.tolist() == [len(rows) for rows in expected.values()]
    assert cut_dataset.num_samples == len(samples_of(expected))
    assert cut_dataset.shards.dtype == cut_dataset.rows.dtype == np.int64
    assert cut_dataset.cuts == tuple(chain)
    assert cut_dataset.name == ".".join(map(str, chain))
    for shard in cut_dataset.shards.tolist():
        found = cut_dataset.rows_of(shard)
        assert isinstance(found, range) or found.dtype == np.int64


@given(ROW_COUNTS, st.lists(cuts(), max_size=4))
@settings(deadline=None, max_examples=200)
def test_decoded_rows_are_at_least_the_spans(rows: list[int], chain: list[Cut]) -> None:
    """A shard is decoded from the first of its rows to the last: ``decoded_rows`` is never less, nor more than all."""
    cut_dataset = subset(rows, *chain)
    expected = naive(rows, chain)
    spans = [max(here) - min(here) + 1 if here else 0 for here in expected.values()]
    for shard, span, decoded in zip(expected, spans, cut_dataset.decoded_rows.tolist(), strict=True):
        assert span <= decoded <= rows[shard]


def test_rows_that_are_cut_in_one_piece_are_decoded_alone() -> None:
    """Without a draw no row is decoded that is not delivered."""
    (_, valid) = require_split(0.5, seed=1, by="shard")
    for chain in ((Take(7), Skip(3)), (valid, Take(6)), (Skip(4), valid)):
        cut_dataset = subset([5, 5, 5, 5], *chain)
        assert cut_dataset.decoded_rows.tolist() == cut_dataset.rows.tolist()


@given(ROW_COUNTS, st.lists(cuts(), max_size=2), FRACTIONS, st.integers(0, 5), BYS)
@settings(deadline=None, max_examples=300)
def test_two_sides_share_no_sample_and_hold_all(
    rows: list[int], before: list[Cut], fraction: float, seed: int, by: str
) -> None:
    """A split of anything, of a side of a split too: each sample is on one side, and the first has its exact share."""
    whole = parts_of(subset(rows, *before))
    first, second = (
        samples_of(parts_of(subset(rows, *before, side))) for side in require_split(fraction, seed=seed, by=by)
    )
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(samples_of(whole))
    assert len(first) == int(Fraction(str(fraction)) * len(samples_of(whole)))


@given(ROW_COUNTS, FRACTIONS, st.integers(0, 5))
@settings(deadline=None, max_examples=200)
def test_by_sample_each_shard_gives_its_share(rows: list[int], fraction: float, seed: int) -> None:
    """By sample, each side has its part of every shard, to within one sample."""
    exact = Fraction(str(fraction))
    for share, side in zip((exact, 1 - exact), require_split(fraction, seed=seed, by="sample"), strict=True):
        parts = parts_of(subset(rows, side))
        for shard, count in enumerate(rows):
            assert abs(len(parts.get(shard, [])) - share * count) < 1


@given(ROW_COUNTS, FRACTIONS, st.integers(0, 5))
@settings(deadline=None, max_examples=200)
def test_by_shard_at_most_one_shard_is_shared(rows: list[int], fraction: float, seed: int) -> None:
    """By shard, the sides have at most one shard in common."""
    first, second = (subset(rows, side) for side in require_split(fraction, seed=seed, by="shard"))
    assert len(set(first.shards.tolist()) & set(second.shards.tolist())) <= 1


def test_take_and_skip_share_none() -> None:
    """``take(n)`` and ``skip(n)`` are the two parts of the dataset, for every n, far beyond its end too."""
    for count in (*range(12), 2**62, 2**63 - 1):
        first, rest = subset([3, 0, 4, 3], Take(count)), subset([3, 0, 4, 3], Skip(count))
        assert samples_of(parts_of(first)) + samples_of(parts_of(rest)) == samples_of(naive([3, 0, 4, 3], []))
        assert first.num_samples == min(count, 10)


def test_without_cuts_every_shard_stands() -> None:
    """An uncut dataset keeps its empty shards; a cut drops them."""
    assert subset([2, 0, 1]).shards.tolist() == [0, 1, 2]
    assert subset([2, 0, 1]).name == ""
    assert subset([2, 0, 1], Take(3)).shards.tolist() == [0, 2]


def test_the_split_is_frozen() -> None:
    """These literal rows never change: a split that moves mixes training with validation data."""
    train, valid = require_split(0.7, seed=11, by="sample")
    assert parts_of(subset([6, 0, 5, 9], train)) == {0: [1, 2, 4, 5], 2: [1, 3, 4], 3: [0, 1, 2, 3, 5, 6, 7]}
    assert parts_of(subset([6, 0, 5, 9], valid)) == {0: [0, 3], 2: [0, 2], 3: [4, 8]}
    assert parts_of(subset([6, 0, 5, 9], valid, require_split(0.5, seed=11, by="sample")[0])) == {
        0: [3],
        2: [2],
        3: [8],
    }
    train, valid = require_split(0.7, seed=11, by="shard")
    assert parts_of(subset([6, 0, 5, 9], train)) == {0: [0, 1, 2, 3, 4, 5], 3: [0, 1, 2, 3, 4, 5, 6, 7]}
    assert parts_of(subset([6, 0, 5, 9], valid)) == {2: [0, 1, 2, 3, 4], 3: [8]}


def test_another_seed_is_another_split() -> None:
    """The samples follow from the seed; their number does not."""
    sides = [samples_of(parts_of(subset([40, 40], require_split(0.5, seed=seed, by="sample")[0]))) for seed in range(4)]
    assert len({tuple(side) for side in sides}) == 4
    assert {len(side) for side in sides} == {40}


def test_equal_shards_are_split_differently() -> None:
    """Each shard has a draw of its own."""
    parts = parts_of(subset([50] * 4, require_split(0.5, seed=0, by="sample")[0]))
    assert all(a != b for a, b in pairwise(parts.values()))


def test_tenths_are_tenths() -> None:
    """0.29 of 100 is 29, though the nearest float to 0.29 times 100 is less than 29."""
    for hundredths in range(101):
        first, _ = require_split(hundredths / 100, seed=0, by="sample")
        assert subset([60, 40], first).num_samples == hundredths


@pytest.mark.parametrize("by", ["sample", "shard"])
def test_five_billion_rows_in_a_million_shards(by: str) -> None:
    """Nothing overflows: the shares of 10⁶ shards of 5·10³ rows are exact, and so are those of 10³ shards of 2⁴⁸."""
    for rows in (np.full(1_000_000, 5_000, dtype=np.int64), np.full(1_000, 1 << 48, dtype=np.int64)):
        total = int(rows.sum())
        train, valid = (Subset(rows, [side]) for side in require_split(0.9, seed=3, by=by))
        assert train.num_samples == int(Fraction(9, 10) * total)
        assert train.num_samples + valid.num_samples == total
        if by == "sample":
            assert set(np.unique(train.rows - rows * 9 // 10)) <= {0, 1}
        assert Subset(rows, [*train.cuts, Skip(total // 2)]).num_samples == train.num_samples - total // 2


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf"), True, "0.9", None, Fraction(1, 2)])
def test_a_fraction_is_a_number_from_0_to_1(fraction: Any) -> None:
    """Anything else is refused, with its value."""
    with pytest.raises(OptionInvalid, match="split"):
        require_split(fraction, seed=0, by="sample")


@pytest.mark.parametrize(("seed", "by"), [(-1, "sample"), (1.5, "sample"), (2**63, "sample"), (0, "row")])
def test_seed_and_by_are_checked(seed: Any, by: str) -> None:
    """A seed is a whole number that an int64 holds, and there are two ways to split."""
    with pytest.raises(OptionInvalid, match="split"):
        require_split(0.5, seed=seed, by=by)


def test_the_name_says_how_it_was_cut() -> None:
    """The name can be typed back in; it stands in states."""
    chain = [require_split(0.9, seed=1, by="sample")[0], Take(100), Skip(3), require_split(1, seed=0, by="shard")[1]]
    cut_dataset = subset([500], *chain)
    assert cut_dataset.name == (
        "split(0.9, seed=1, by='sample')[0].take(100).skip(3).split(1.0, seed=0, by='shard')[1]"
    )
    assert repr(cut_dataset) == f"Subset({cut_dataset.name}, samples=0, shards=0)"
    assert repr(subset([2, 3])) == "Subset(all, samples=5, shards=2)"


@given(ROW_COUNTS, ROW_COUNTS, st.lists(cuts().filter(lambda cut: str(cut).count("by='shard'") == 0), max_size=3))
@settings(deadline=None)
def test_an_append_leaves_every_sample_on_its_side(rows: list[int], more: list[int], chain: list[Cut]) -> None:
    """By sample, and for take and skip: what shards that are appended add, they add; nothing leaves a side for another.
    (What was cut off by take stays cut off.)"""
    before, after = (set(samples_of(parts_of(subset(shards, *chain)))) for shards in (rows, rows + more))
    assert before <= after
    assert all(shard >= len(rows) for shard, _ in after - before)
