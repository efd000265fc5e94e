"""The closed forms of the mixture against a naive reference, and what the theory above plan/mixture.py promises."""

from __future__ import annotations

import itertools
import json
import math
import random
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import make_golden
import naive_mixture
import naive_order
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.errors import OptionInvalid
from streamshards.options import MiB
from streamshards.plan.mixture import (
    MIXTURE_BLOCK,
    MixtureOrder,
    MixtureSettings,
    SourceRows,
    earliest_change,
    pass_length,
    settled_phases,
)
from streamshards.plan.order import Draw, Int64Array
from streamshards.plan.weights import Phase, parse_weights

M = MIXTURE_BLOCK
NAMES = "abcdefgh"


def int64(values: Any) -> Int64Array:
    return np.array(values, dtype=np.int64)


def upto(n: int) -> Int64Array:
    return np.arange(n, dtype=np.int64)


def phases_of(*weights: Any) -> tuple[Phase, ...]:
    """Return phases of ``[1, 2, …]``, one, or of several ``(from_sample, [1, 2, …])``."""
    pairs = weights if isinstance(weights[0], tuple) else [(0, weights[0])]
    names = NAMES[: len(pairs[0][1])]
    return parse_weights([(start, dict(zip(names, w, strict=True))) for start, w in pairs], names)


def sources_of(*rows: Sequence[int], shuffle: bool = True, shuffle_block: int = 4) -> list[SourceRows]:
    return [SourceRows(NAMES[i], int64(r), shuffle, 5 + i, shuffle_block) for i, r in enumerate(rows)]


def make(
    rows: Sequence[Sequence[int]],
    phases: Sequence[Phase],
    *,
    lanes: int = 1,
    chunk: int = 1,
    seed: int = 3,
    epoch: int = 0,
    num_samples: int = 100_000,
) -> MixtureOrder:
    chosen = MixtureSettings(seed=seed, lanes=lanes, chunk=chunk)
    return MixtureOrder(sources_of(*rows), phases, chosen, epoch=epoch, num_samples=num_samples)


def large(phases: Sequence[Phase], **changes: Any) -> MixtureOrder:
    """Return a mixture of sources of 10⁶ samples each."""
    changes = {"num_samples": 10**6, **changes}
    return make([[1000] * 1000] * len(phases[0].weights), phases, **changes)


def naive(phases: Sequence[Phase], s: MixtureSettings, start: int, stop: int) -> list[tuple[int, int]]:
    plain = [(phase.from_sample, phase.weights) for phase in phases]
    samples = naive_mixture.stream(plain, seed=s.seed, lanes=s.lanes, chunk=s.chunk)
    return list(itertools.islice(samples, start, stop))


def found(order: MixtureOrder, positions: Int64Array) -> list[tuple[int, int]]:
    return list(zip(*(a.tolist() for a in order.sources_at(positions)), strict=True))


# -- the stream --------------------------------------------------------------------------------------------------------

WEIGHTS: Mapping[str, tuple[Phase, ...]] = {
    "one source": phases_of([1]),
    "two": phases_of([0.7, 0.3]),
    "thirds": phases_of([1, 1, 1]),
    "rare": phases_of([1, 1e-5, 0.4, 0]),
    "phases": phases_of((0, [1, 2]), (700, [2, 1]), (710, [0, 1]), (3001, [3, 1])),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_position_is_what_dealing_gives(name: str) -> None:
    """For 1 to 5 lanes and several chunks, each of the first positions has the source and sample that a walk deals."""
    for lanes, chunk in itertools.product((1, 2, 3, 5), (1, 2, 7, 1500)):
        order = large(WEIGHTS[name], lanes=lanes, chunk=chunk)
        n = 2200 * lanes
        assert found(order, upto(n)) == naive(WEIGHTS[name], order.settings, 0, n), (lanes, chunk)


@st.composite
def mixtures(draw: st.DrawFn, max_phases: int = 4) -> tuple[tuple[Phase, ...], MixtureSettings]:
    """Draw up to 5 sources, phases that begin anywhere, and any settings."""
    num_sources = draw(st.integers(1, 5))
    weight = st.one_of(st.integers(0, 9), st.floats(0, 1, allow_subnormal=False), st.fractions(0, 2))
    weights = st.lists(weight, min_size=num_sources, max_size=num_sources).filter(any)
    starts = sorted({0, *draw(st.lists(st.integers(1, 6000), max_size=max_phases - 1))})
    chosen = MixtureSettings(
        seed=draw(st.integers(0, 2**63 - 1)), lanes=draw(st.integers(1, 6)), chunk=draw(st.integers(1, 40))
    )
    return phases_of(*[(start, draw(weights)) for start in starts]), chosen


@given(mixtures(), st.data())
@settings(deadline=None, max_examples=40)
def test_any_selection_of_any_mixture_is_what_dealing_gives(mixture: Any, data: st.DataObject) -> None:
    """Positions in any sequence, of any pass, under any weights, phases and settings, are those of the one stream."""
    phases, chosen = mixture
    everything = naive(phases, chosen, 0, 8_000)
    epoch, length = data.draw(st.sampled_from([(0, 8_000), (1, 4_000), (7, 1_000), (7_999, 1)]))
    order = MixtureOrder(sources_of(*[[50]] * len(phases[0].weights)), phases, chosen, epoch=epoch, num_samples=length)
    asked = data.draw(st.lists(st.integers(0, length - 1), max_size=50))
    assert found(order, int64(asked)) == [everything[epoch * length + p] for p in asked]
    assert found(order, upto(length)) == everything[epoch * length : (epoch + 1) * length]
    for position in data.draw(st.lists(st.integers(0, length), max_size=5)):
        before = [source for source, _ in everything[: epoch * length + position]]
        assert order.counts(position).tolist() == [before.count(s) for s in range(order.num_sources)]


def test_counts_are_what_counting_gives() -> None:
    """For every position of some mixtures, ``counts`` says how often each source came before it in the stream."""
    for name, (lanes, chunk) in itertools.product(("two", "phases"), ((1, 1), (3, 5))):
        order = large(WEIGHTS[name], lanes=lanes, chunk=chunk, epoch=3, num_samples=1500)
        dealt = naive(WEIGHTS[name], order.settings, 0, 6000)
        counted = np.cumsum([[s == i for i in range(order.num_sources)] for s, _ in dealt], axis=0)
        for position in range(0, 1501, 7):
            assert order.counts(position).tolist() == counted[4500 + position - 1].tolist()


def test_counts_hold_up_to_the_last_position() -> None:
    """With a chunk of 2⁶² in one lane, positions in its second round are counted too."""
    position = 2**62 + 12_345
    order = large(phases_of([1, 3]), chunk=2**62, num_samples=2**63 - 2)
    assert order.counts(position).sum() == position
    before, (source,) = order.counts(position), order.sources_at(int64([position]))[0].tolist()
    assert order.counts(position + 1).tolist() == [n + (s == source) for s, n in enumerate(before.tolist())]


def test_passes_go_on_where_the_earlier_ended() -> None:
    """The positions of three passes of 777 are the first 2,331 of one pass that is longer."""
    whole = found(large(WEIGHTS["phases"], lanes=3, chunk=2), upto(2331))
    passes = [large(WEIGHTS["phases"], lanes=3, chunk=2, epoch=e, num_samples=777) for e in range(3)]
    assert [sample for order in passes for sample in found(order, upto(777))] == whole


def test_no_block_is_permuted_like_another() -> None:
    """Each lane, each block, each phase's first block too, and each seed, has an order of its own."""
    phases = phases_of((0, [1, 1]), (4000, [1, 1]))
    seen = set()
    for seed in range(2):
        sources, _ = large(phases, lanes=2, chunk=M, seed=seed).sources_at(upto(8000))
        seen |= {tuple(block) for block in sources.reshape(8, M).tolist()}
    assert len(seen) == 16


def test_the_draw_of_a_mixture_never_changes() -> None:
    """Keys of mixtures differ from those of shards, blocks, refills and splits."""
    assert [int(draw) for draw in Draw] == [0, 1, 2, 3, 4]
    assert Draw.MIXTURE == naive_mixture.MIXTURE_DRAW


def test_nothing_asked_is_nothing_found() -> None:
    """No positions have no places, sources or rows."""
    order = large(WEIGHTS["two"])
    assert [a.shape for a in (*order.places(int64([])), *order.sources_at(int64([])), *order.rows_at(int64([])))] == [
        (0,)
    ] * 9


# -- weights -----------------------------------------------------------------------------------------------------------

_EIGHT = [random.Random(number).random() for number in range(8)]
SHARES: Mapping[str, Sequence[Any]] = {
    "0.7 and 0.3": [0.7, 0.3],
    "thirds": [1, 1, 1],
    "a third": [Fraction(1, 3), Fraction(2, 3)],
    "one in 100,000": [1e-5, 1 - 1e-5],
    "eight floats": _EIGHT,
    "seven and nothing": [0, *_EIGHT[1:]],
    "three decimals": [0.125, 0.5, 0.374, 0.001],
    "far apart": [1e-300, 1, 1e-9],
}


@pytest.mark.parametrize("name", SHARES)
def test_every_block_holds_every_weight_to_within_one_slot(name: str) -> None:
    """Over 3,000 blocks: in each, a source has its share rounded up or down, and after each, all sources have their
    shares to within 1 + log₂(blocks)/3 slots. Shares that are whole slots hold exactly."""
    phases = phases_of(SHARES[name])
    order = large(phases, num_samples=10**7)
    shares = [weight * M for weight in phases[0].weights]
    before = order.counts(0).tolist()
    assert not any(before)
    for block in range(1, 3001):
        counts = order.counts(block * M).tolist()
        assert sum(counts) == block * M
        for share, a, b in zip(shares, before, counts, strict=True):
            assert b - a in (math.floor(share), math.ceil(share))
            assert abs(b - block * share) <= 1 + math.log2(block) / 3
        before = counts


def test_the_share_holds_wherever_the_stream_has_come_to() -> None:
    """After 10³, 10⁶ and 10¹⁵ blocks, too, and some beside them, the deviation is below 1 + log₂(blocks)/3 slots."""
    for weights in SHARES.values():
        phases = phases_of(weights)
        order = large(phases, num_samples=2 * 10**18)
        for block in (10**3 - 1, 10**6 + 1, 0x5555555555555 // 8, 10**15 + 12_345):
            counts = order.counts(block * M).tolist()
            deviations = [abs(c - block * M * w) for c, w in zip(counts, phases[0].weights, strict=True)]
            assert max(deviations) <= 1 + math.log2(block) / 3
            assert sum(counts) == block * M


def test_the_first_source_is_ahead_never_behind() -> None:
    """The error of counting a radical inverse below a is in [0, 1 + log₂(Q)/3], for every Q up to 700 and a = k/41."""
    for k in range(41):
        share = Fraction(k, 41)
        order = large((Phase(0, (share / M, 1 - share / M)),))
        for block in range(1, 700):
            error = int(order.counts(block * M)[0]) - block * share
            assert 0 <= error <= 1 + math.log2(block) / 3


def block_borders(phases: Sequence[Phase], lanes: int, chunk: int) -> list[tuple[int, int, Phase]]:
    """Return first slot, last slot + 1 and phase of each block of a lane, up to the third of the last phase."""
    starts = [-(-phase.from_sample // (lanes * chunk)) * chunk for phase in phases]
    return [
        (slot, min(slot + M, end), phase)
        for phase, start, end in zip(phases, starts, [*starts[1:], starts[-1] + 3 * M], strict=True)
        for slot in range(start, end, M)
    ]


@pytest.mark.parametrize("name", WEIGHTS)
def test_after_every_block_what_was_used_has_no_gap(name: str) -> None:
    """Once all lanes are through a block, whole or cut short by the next phase, the samples used of each source are
    0, 1, 2, … without a gap, equally many from each lane."""
    phases = WEIGHTS[name]
    for lanes, chunk in ((1, 1), (3, 1), (7, 1), (3, 8), (2, 350)):
        borders = block_borders(phases, lanes, chunk)
        sources, samples = large(phases, lanes=lanes, chunk=chunk).sources_at(upto((borders[-1][1] + chunk) * lanes))
        position = upto(len(sources))
        slots, in_lanes = position // (lanes * chunk) * chunk + position % chunk, position // chunk % lanes
        for _, stop, _ in borders:
            for source in range(len(phases[0].weights)):
                used = (slots < stop) & (sources == source)
                assert np.sort(samples[used]).tolist() == list(range(int(used.sum())))
                assert len(set(np.bincount(in_lanes[used], minlength=lanes).tolist())) == 1


@given(mixtures(), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_a_block_cut_short_holds_every_weight_to_within_one_slot(mixture: Any, lane: int) -> None:
    """In each block of each lane, of whatever length, a source has its share of the slots, rounded up or down."""
    phases, chosen = mixture
    lanes, chunk, lane = chosen.lanes, chosen.chunk, lane % chosen.lanes
    order = MixtureOrder(sources_of(*[[50]] * len(phases[0].weights)), phases, chosen, epoch=0, num_samples=10**6)
    for start, stop, phase in block_borders(phases, lanes, chunk):
        slots = np.arange(start, stop, dtype=np.int64)
        sources, _ = order.sources_at((slots // chunk * lanes + lane) * chunk + slots % chunk)
        counts = np.bincount(sources, minlength=order.num_sources).tolist()
        for weight, count in zip(phase.weights, counts, strict=True):
            assert count in (math.floor(weight * (stop - start)), math.ceil(weight * (stop - start)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_sample_of_the_stream_comes_twice(name: str) -> None:
    """No (source, stream sample) comes at two positions, across blocks and phases."""
    for lanes, chunk in ((1, 1), (4, 3), (64, 32)):
        sources, samples = large(WEIGHTS[name], lanes=lanes, chunk=chunk).sources_at(upto(50_000))
        assert len(set(zip(sources.tolist(), samples.tolist(), strict=True))) == 50_000


def test_a_phase_begins_with_a_round() -> None:
    """Weights change with the first whole round of the interleave at or after their sample, at once in all lanes."""
    for lanes, chunk, start in itertools.product((1, 3), (1, 4), (1, 11, 12, 13, 1200)):
        phases = phases_of((0, [1, 0]), (start, [0, 1]))
        sources, samples = large(phases, lanes=lanes, chunk=chunk).sources_at(upto(2000))
        begin = -(-start // (lanes * chunk)) * lanes * chunk
        assert sources.tolist() == [0] * begin + [1] * (2000 - begin)
        assert sorted(samples[:begin].tolist()) == list(range(begin))
        rounds = (2000 - begin) // (lanes * chunk) * lanes * chunk
        assert sorted(samples[begin : begin + rounds].tolist()) == list(range(rounds))


# -- the rows ----------------------------------------------------------------------------------------------------------

SMALL_ROWS = [[3, 0, 4, 1], [1, 1], [40, 30, 50], [2]]


def naive_rows(order: MixtureOrder, samples: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    epochs: dict[tuple[int, int], list[naive_order.Row]] = {}
    out = []
    for number, x in samples:
        source = order.sources[number]
        epoch, position = divmod(x, sum(source.rows.tolist()))
        if (number, epoch) not in epochs:
            epochs[number, epoch] = naive_order.epoch_order(
                source.rows.tolist(),
                shuffle=source.shuffle,
                seed=source.seed,
                epoch=epoch,
                lanes=min(order.settings.lanes, source.num_samples),
                chunk=1,
                shuffle_block=source.shuffle_block,
            )
        out.append((number, epoch, *epochs[number, epoch][position]))
    return out


@pytest.mark.parametrize(("lanes", "chunk"), [(1, 1), (2, 3), (5, 2), (16, 4), (150, 1)])
def test_rows_are_those_of_each_sources_own_epochs(lanes: int, chunk: int) -> None:
    """Every position has the row that the naive order of its source's epoch has; sources smaller than the lanes
    included. Each epoch of a source gives each row once at most, and all of them once it is through."""
    phases, chosen = phases_of([4, 1, 9, 1]), MixtureSettings(seed=3, lanes=lanes, chunk=chunk)
    length = pass_length("all_exhausted", sources_of(*SMALL_ROWS), phases, chosen)
    rows: list[tuple[int, ...]] = []
    for epoch in range(2):
        order = MixtureOrder(sources_of(*SMALL_ROWS), phases, chosen, epoch=epoch, num_samples=length)
        of_pass = list(zip(*(a.tolist() for a in order.rows_at(upto(length))), strict=True))
        assert of_pass == naive_rows(order, found(order, upto(length)))
        rows += of_pass
    assert len(set(rows)) == 2 * length
    for number, source in enumerate(order.sources):
        whole = [r[2:] for r in rows if r[:2] == (number, 0)]
        assert sorted(whole) == [(i, row) for i, n in enumerate(source.rows.tolist()) for row in range(n)]


def test_epochs_of_a_source_are_reshuffled() -> None:
    """The second epoch of a source within the mixture gives the same rows in another order."""
    order = make([[20] * 5], phases_of([1]))
    _, epochs, shards, rows = order.rows_at(upto(200))
    assert epochs.tolist() == [0] * 100 + [1] * 100
    pairs = list(zip(shards.tolist(), rows.tolist(), strict=True))
    assert pairs[:100] != pairs[100:]
    assert sorted(pairs[:100]) == sorted(pairs[100:])


@pytest.mark.parametrize(("lanes", "chunk"), [(1, 1), (2, 3), (5, 2), (16, 4), (150, 1)])
def test_places_lead_to_the_same_rows_and_tracks_go_forward(lanes: int, chunk: int) -> None:
    """Track, lane and offset, resolved, are the row that ``rows_at`` says; along a track, (lane, offset) only grows."""
    order = make(SMALL_ROWS, phases_of((0, [4, 1, 9, 1]), (500, [1, 1, 1, 1])), lanes=lanes, chunk=chunk)
    positions = upto(1500)
    places = order.places(positions)
    in_lanes = positions // chunk % lanes
    sources, _ = order.sources_at(positions)
    assert places.tracks.tolist() == (sources * lanes + in_lanes).tolist()
    expected = zip(*(a.tolist() for a in order.rows_at(positions)), strict=True)
    last: dict[int, tuple[int, int]] = {}
    for track, number, offset, row in zip(*(a.tolist() for a in places), expected, strict=True):
        assert last.get(track, (-1, 0)) < (number, offset)
        last[track] = (number, offset)
        lane = order.lane(track, number)
        block = lane.order.block_at(lane.number, offset)
        stored = [(p.shard, i) for p in block.pieces for i in range(p.lo, p.hi)]
        shard_row = stored[int(lane.order.permutation(block)[offset - block.start])]
        assert (lane.source, lane.order.epoch, *shard_row) == row


def test_rows_name_the_shards_of_the_index() -> None:
    """Where a source is a part of its index's shards, ``rows_at`` and the blocks of its lanes name them as the index
    does; all else is as without."""
    numbers = [int64([7, 3, 11, 4]), None, int64([2, 0, 9])]
    plain = sources_of([3, 1, 4, 1], [1, 1], [40, 30, 50])
    named = [replace(source, shards=shards) for source, shards in zip(plain, numbers, strict=True)]
    phases, chosen = phases_of([4, 1, 9]), MixtureSettings(seed=3, lanes=3, chunk=2)
    order, bare = (MixtureOrder(rows, phases, chosen, epoch=0, num_samples=600) for rows in (named, plain))
    rows = list(zip(*(a.tolist() for a in order.rows_at(upto(600))), strict=True))
    seen = {(source, shard) for source, _, shard, _ in rows}
    assert seen == {(0, 7), (0, 3), (0, 11), (0, 4), (1, 0), (1, 1), (2, 2), (2, 0), (2, 9)}
    real = [range(n) if shards is None else shards.tolist() for shards, n in zip(numbers, (4, 2, 3), strict=True)]
    unnamed = zip(*(a.tolist() for a in bare.rows_at(upto(600))), strict=True)
    assert rows == [(source, epoch, real[source][shard], row) for source, epoch, shard, row in unnamed]
    for track, number, offset, row in zip(*(a.tolist() for a in order.places(upto(600))), rows, strict=True):
        lane = order.lane(track, number)
        block = lane.order.block_at(lane.number, offset)
        stored = [(p.shard, i) for p in block.pieces for i in range(p.lo, p.hi)]
        assert stored[int(lane.order.permutation(block)[offset - block.start])] == row[2:]


def test_a_mixture_lane_reads_one_lane_of_a_source() -> None:
    """During an epoch of a source, each lane of the mixture stays in one lane of it, but for fewer than K tail rows."""
    lanes = 8
    order = make([[100] * 12 + [5], [77] * 9], phases_of([2, 1]), lanes=lanes, chunk=4)
    places = order.places(upto(9000))
    sources, samples = order.sources_at(upto(9000))
    sizes = int64([source.num_samples for source in order.sources])[sources]
    in_tail = samples % sizes >= sizes // lanes * lanes
    followed: dict[tuple[int, int], set[int]] = {}
    for track, number in zip(places.tracks[~in_tail].tolist(), places.lanes[~in_tail].tolist(), strict=True):
        followed.setdefault((track, number // lanes), set()).add(number)
    assert {len(numbers) for numbers in followed.values()} == {1}
    assert len({key[1] for key in followed}) > 3


# -- how long a pass is ------------------------------------------------------------------------------------------------


def sized(sizes: Sequence[int]) -> list[SourceRows]:
    return sources_of(*[[n] for n in sizes])


def assert_stops_as_naive(phases: Sequence[Phase], chosen: MixtureSettings, sizes: Sequence[int]) -> None:
    plain = [(phase.from_sample, phase.weights) for phase in phases]

    def walk() -> Any:
        return naive_mixture.stream(plain, seed=chosen.seed, lanes=chosen.lanes, chunk=chosen.chunk)

    first = pass_length("first_exhausted", sized(sizes), phases, chosen)
    assert first == naive_mixture.first_exhausted(walk(), sizes)
    if all(phases[-1].weights):
        assert pass_length("all_exhausted", sized(sizes), phases, chosen) == naive_mixture.all_exhausted(walk(), sizes)


def test_small_passes_end_where_walking_finds_it() -> None:
    """For every pair of sizes up to 5 and some larger, and several lanes and chunks, both stop rules are exact."""
    sizes = [*itertools.product(range(1, 6), repeat=2), (1, 900), (701, 299), (2100, 30)]
    for (a, b), (lanes, chunk) in itertools.product(sizes, ((1, 1), (3, 2), (8, 5))):
        for phases in (phases_of([0.7, 0.3]), phases_of((0, [9, 1]), (40, [1, 9]), (900, [1, 1]))):
            assert_stops_as_naive(phases, MixtureSettings(seed=1, lanes=lanes, chunk=chunk), (a, b))


@given(mixtures(), st.data())
@settings(deadline=None, max_examples=40)
def test_passes_end_where_walking_finds_it(mixture: Any, data: st.DataObject) -> None:
    """Under any phases and settings, both stop rules are exact, across blocks, phases and lanes."""
    phases, chosen = mixture
    if min(phases[-1].weights) < Fraction(1, 50):  # or the walk is long
        last = phases_of([1] * len(phases[-1].weights))[0].weights
        phases = (*phases[:-1], Phase(phases[-1].from_sample, last))
    sizes = data.draw(st.lists(st.integers(1, 2000), min_size=len(last := phases[-1].weights), max_size=len(last)))
    assert_stops_as_naive(phases, chosen, sizes)


@pytest.mark.parametrize(("lanes", "chunk"), [(2048, 1), (64, 32), (3, 5000)])
@pytest.mark.parametrize("phases", [WEIGHTS["thirds"], phases_of((0, [5, 3, 2]), (60_001, [1, 3, 5]))], ids=[1, 2])
def test_larger_passes_end_where_the_order_shows_it(lanes: int, chunk: int, phases: tuple[Phase, ...]) -> None:
    """With up to 2,048 lanes: the first sample that comes again, and the last that is new, stand at the pass's end."""
    sizes = [90_000, 50_001, 21_000]
    chosen = MixtureSettings(seed=1, lanes=lanes, chunk=chunk)
    first = pass_length("first_exhausted", sized(sizes), phases, chosen)
    last = pass_length("all_exhausted", sized(sizes), phases, chosen)
    order = MixtureOrder(sized(sizes), phases, chosen, epoch=0, num_samples=last + 50_000)
    sources, samples = order.sources_at(upto(order.num_samples))
    is_new = samples < int64(sizes)[sources]
    assert first == int((~is_new).argmax())
    assert last == int(np.flatnonzero(is_new)[-1]) + 1
    assert int(is_new.sum()) == sum(sizes)


def test_passes_end_exactly_wherever_in_its_block_a_use_may_stand() -> None:
    """With sources of 1 to 80 samples in 16 lanes, some of one block and some of several, and 30 seeds, both stop rules
    find the very position, be it the first or the last that its use can have in its block."""
    at_bounds = 0
    for seed in range(30):
        for phases in (phases_of([1, 999]), phases_of([1, 1]), phases_of((0, [1, 8]), (70, [8, 1]))):
            chosen = MixtureSettings(seed=seed, lanes=16, chunk=1)
            sizes = [1 + seed % 16, 16 * (1 + seed % 5)]
            order = MixtureOrder(sized(sizes), phases, chosen, epoch=0, num_samples=16 * 2 * M)
            sources, samples = order.sources_at(upto(order.num_samples))
            is_new = samples < int64(sizes)[sources]
            assert pass_length("first_exhausted", sized(sizes), phases, chosen) == int((~is_new).argmax())
            last = int(np.flatnonzero(is_new)[-1])
            assert pass_length("all_exhausted", sized(sizes), phases, chosen) == last + 1
            at_bounds += last // 16 % M >= M - 4
    assert at_bounds > 0


def test_huge_passes_end_where_the_order_shows_it() -> None:
    """Sources of 10¹¹ samples, and one in 100,000: found without a walk."""
    sizes = [10**11, 7 * 10**10 + 1, 10**6 + 3]
    phases = phases_of((0, [6, 4, 1e-5]), (10**9 + 1, [5, 5, 1e-5]))
    chosen = MixtureSettings(seed=1, lanes=48, chunk=32)
    first = pass_length("first_exhausted", sized(sizes), phases, chosen)
    last = pass_length("all_exhausted", sized(sizes), phases, chosen)
    order = MixtureOrder(sized(sizes), phases, chosen, epoch=0, num_samples=last + 1)
    (at_first, at_last), (x_first, x_last) = order.sources_at(int64([first, last - 1]))
    assert x_first >= sizes[at_first]
    assert x_last < sizes[at_last]
    assert all(count <= n for count, n in zip(order.counts(first).tolist(), sizes, strict=True))
    assert all(count >= n for count, n in zip(order.counts(last).tolist(), sizes, strict=True))


def test_a_number_is_its_own_length() -> None:
    """A pass of a given number of samples has that many; anything but a number or a rule's name is refused."""
    phases, chosen = WEIGHTS["two"], MixtureSettings(seed=1, lanes=2, chunk=1)
    assert pass_length(12_345, sized([1, 1]), phases, chosen) == 12_345
    for stop in (0, -1, True, 1.0, None, "exhausted"):
        with pytest.raises(OptionInvalid, match="stop"):
            pass_length(stop, sized([1, 1]), phases, chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_source_without_weight_is_never_exhausted(lanes: int) -> None:
    """all_exhausted is refused, by name, if a source's last weight is 0 before it is used up, and found if after;
    first_exhausted goes by the other sources."""
    chosen = MixtureSettings(seed=1, lanes=lanes, chunk=1)
    fades = phases_of((0, [1, 1]), (2000, [1, 0]))
    for size in (400, 990, 1010, 5000):
        plain = [(phase.from_sample, phase.weights) for phase in fades]
        used = {
            x for s, x in itertools.islice(naive_mixture.stream(plain, seed=1, lanes=lanes, chunk=1), 2400) if s == 1
        }
        sources = sized([3000, size])
        if used >= set(range(size)):
            assert pass_length("all_exhausted", sources, fades, chosen) > 3000
        else:
            with pytest.raises(OptionInvalid, match=f"never come: the weight of source 'b' .* {size:,} samples"):
                pass_length("all_exhausted", sources, fades, chosen)
        walk = naive_mixture.stream(plain, seed=1, lanes=lanes, chunk=1)
        assert pass_length("first_exhausted", sources, fades, chosen) == naive_mixture.first_exhausted(
            walk, [3000, size]
        )
    with pytest.raises(OptionInvalid, match="'b'"):
        pass_length("all_exhausted", sized([5, 5]), phases_of([1, 0]), chosen)
    assert pass_length("first_exhausted", sized([5, 5]), phases_of([1, 0]), chosen) == 5


def test_what_is_next_to_never_is_refused() -> None:
    """A weight so small that the pass would not fit 64 bits is refused, not waited for."""
    chosen = MixtureSettings(seed=1, lanes=2, chunk=1)
    with pytest.raises(OptionInvalid, match=r"source 'b' is 0, or next to 0"):
        pass_length("all_exhausted", sized([5, 5]), phases_of([1, 1e-300]), chosen)
    assert pass_length("first_exhausted", sized([5, 5]), phases_of([1, 1e-300]), chosen) == 5
    with pytest.raises(OptionInvalid, match="64 bits"):
        pass_length("first_exhausted", sized([2**62, 2**62]), phases_of([1, 1]), chosen)


def test_an_unused_empty_source_is_no_hindrance() -> None:
    """A source without samples is refused by name if it has a weight in any phase, and else ignored."""
    chosen = MixtureSettings(seed=1, lanes=3, chunk=1)
    for phases in (phases_of([1, 1]), phases_of((0, [1, 0]), (50, [1, 1]))):
        with pytest.raises(OptionInvalid, match="source 'b' has no samples"):
            pass_length("first_exhausted", sized([5, 0]), phases, chosen)
        with pytest.raises(OptionInvalid, match="source 'b' has no samples"):
            MixtureOrder(sized([5, 0]), phases, chosen, epoch=0, num_samples=9)
    assert pass_length("all_exhausted", sized([5, 0]), phases_of([1, 0]), chosen) == 5
    order = MixtureOrder(sized([5, 0]), phases_of([1, 0]), chosen, epoch=0, num_samples=9)
    assert order.rows_at(upto(9))[0].tolist() == [0] * 9


# -- wishes ------------------------------------------------------------------------------------------------------------


def test_weights_mean_what_they_print() -> None:
    """Floats are read as their decimals, of any sum; names may come in any sequence."""
    assert parse_weights({"b": 0.3, "a": 0.7}, "ab") == (Phase(0, (Fraction(7, 10), Fraction(3, 10))),)
    assert parse_weights({"a": 1, "b": Fraction(1, 2)}, "ab") == (Phase(0, (Fraction(2, 3), Fraction(1, 3))),)
    numpy_scalars: Any = {"a": np.float64(0.1), "b": np.float32(0.1), "c": np.int64(1)}
    assert parse_weights(numpy_scalars, "abc")[0].weights == (Fraction(1, 12), Fraction(1, 12), Fraction(5, 6))
    tiny = parse_weights({"a": 1e-5, "b": 0.99999, "c": 0}, "abc")[0].weights
    assert tiny == (Fraction(1, 100_000), Fraction(99_999, 100_000), 0)
    huge = parse_weights({"a": 10**5000, "b": 3 * 10**5000}, "ab")[0].weights
    assert huge == (Fraction(1, 4), Fraction(3, 4))
    schedule = parse_weights([(0, {"a": 1, "b": 0}), (10, {"a": 1, "b": 1})], ["a", "b"])
    assert [(phase.from_sample, phase.weights[1]) for phase in schedule] == [(0, 0), (10, Fraction(1, 2))]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "x": 1}, "weights: there is no source 'x'; the sources are 'a', 'b'"),
        ({"a": 1}, "weights: no weight for 'b'"),
        ({"a": -1, "b": 2}, "weights: 'a': weight -1 must be"),
        ({"a": -0.5, "b": 2}, "'a': weight -0.5 must be"),
        ({"a": 1, "b": float("nan")}, "'b': weight nan"),
        ({"a": 1, "b": float("inf")}, "'b': weight inf"),
        ({"a": 1, "b": True}, "'b': weight True"),
        ({"a": 1, "b": "0.5"}, "'b': weight '0.5'"),
        ({"a": 1, "b": None}, "'b': weight None"),
        ({"a": 0, "b": 0.0}, "weights: at least one weight must be above 0"),
        ([(0, {"a": 1, "b": 1}), (5, {"a": 0, "b": 0})], r"weights\[1\] \(from sample 5\): at least one"),
        ([(0, {"a": 1, "b": 1}), (5, {"a": 1})], r"weights\[1\] \(from sample 5\): no weight for 'b'"),
        ([(5, {"a": 1, "b": 1})], "begin with a phase from sample 0"),
        ([], "begin with a phase from sample 0"),
        ([(0, {"a": 1, "b": 1}), (0, {"a": 1, "b": 2})], "from_sample=0 stands after 0"),
        ([(0, {"a": 1, "b": 1}), (9, {"a": 1, "b": 2}), (8, {"a": 1, "b": 2})], "from_sample=8 stands after 9"),
        ([(-1, {"a": 1, "b": 1})], r"from_sample of weights\[0\]=-1"),
        ([(0.0, {"a": 1, "b": 1})], r"from_sample of weights\[0\]=0.0"),
        ([{"a": 1, "b": 1}], r"weights\[0\]=.* must be a pair"),
        ("ab", "must be a dict of weights"),
        (None, "must be a dict of weights"),
    ],
)
def test_wrong_weights_are_refused_by_name(weights: Any, message: str) -> None:
    """The error names the phase, the source and the value."""
    with pytest.raises(OptionInvalid, match=message):
        parse_weights(weights, ["a", "b"])


def test_what_does_not_fit_together_is_refused() -> None:
    """Phases of other sources, phases that are not normalised, settings and passes out of range."""
    two, chosen = WEIGHTS["two"], MixtureSettings(seed=1, lanes=2, chunk=1)
    with pytest.raises(OptionInvalid, match="2 for 3 sources"):
        pass_length(5, sized([1, 1, 1]), two, chosen)
    with pytest.raises(OptionInvalid, match="0 sources"):
        pass_length(5, [], two, chosen)
    with pytest.raises(OptionInvalid, match="from sample 0"):
        pass_length(5, sized([1]), (), chosen)
    for weights in ((Fraction(1, 2),), (), (Fraction(2), Fraction(-1))):
        with pytest.raises(OptionInvalid, match="sum 1"):
            Phase(0, weights)
    with pytest.raises(OptionInvalid, match="from_sample"):
        Phase(-1, (Fraction(1),))
    for name, value in itertools.product(("seed", "lanes", "chunk"), (-1, 1.0, True, None, 2**63)):
        with pytest.raises(OptionInvalid, match=name):
            MixtureSettings(**{"seed": 1, "lanes": 1, "chunk": 1, name: value})  # type: ignore[arg-type]
    for changes in ({"epoch": -1}, {"num_samples": 0}, {"epoch": 2**62, "num_samples": 2}):
        with pytest.raises(OptionInvalid, match=r"epoch|num_samples"):
            large(two, **changes)


# -- size --------------------------------------------------------------------------------------------------------------


def test_a_seek_touches_nothing_large() -> None:
    """At position 10¹², finding places and counts allocates under 2 MiB, and with one lane the sample of a source is
    the number of its samples before."""
    phases = phases_of((0, _EIGHT), (10**9 + 7, _EIGHT[::-1]), (10**11, _EIGHT))
    for lanes, chunk in ((1, 1), (64, 32)):
        order = large(phases, lanes=lanes, chunk=chunk, epoch=10**5, num_samples=10**7)
        tracemalloc.start()
        order.places(int64([5_000_000, 5_000_001, 9_999_999]))
        counts = order.counts(5_000_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * MiB
        assert int(counts.sum()) == order.epoch * order.num_samples + 5_000_000
        sources, samples = order.sources_at(5_000_000 + upto(3000))
        came = np.bincount(sources, minlength=8)
        assert (order.counts(5_003_000) - counts).tolist() == came.tolist()
        if lanes == 1:
            for source in range(8):
                expected = int(counts[source]) + upto(int(came[source]))
                assert samples[sources == source].tolist() == expected.tolist()


def test_an_order_says_what_it_is() -> None:
    """The repr names the pass, its size, and what shapes it."""
    assert repr(large(WEIGHTS["phases"], epoch=4, lanes=2, chunk=3)) == (
        "MixtureOrder(epoch=4, samples=1,000,000, sources=2, phases=4, seed=3, lanes=2, chunk=3)"
    )


# -- golden ------------------------------------------------------------------------------------------------------------


def test_the_literal_mixture_never_changes() -> None:
    """Orders of mixtures are those in golden/mixture.json; make_golden.py says when that may change."""
    pinned = json.loads(make_golden.GOLDEN_MIXTURE.read_text(encoding="utf-8"))
    assert make_golden.golden_mixture() == pinned


@pytest.mark.parametrize("name", make_golden.MIXTURES)
def test_golden_mixtures_are_the_naive_mixture(name: str) -> None:
    """What the golden file pins is what dealing gives."""
    pinned = json.loads(make_golden.GOLDEN_MIXTURE.read_text(encoding="utf-8"))["cases"][name]
    phases, chosen = make_golden.MIXTURES[name]
    order = make_golden.mixture(name)
    for start, lines in pinned["from"].items():
        samples = naive(phases, chosen, int(start), int(start) + make_golden.MIXTURE_WINDOW)
        assert [tuple(map(int, row.split(":"))) for row in " ".join(lines).split()] == naive_rows(order, samples)


@given(mixtures(max_phases=3), st.integers(1, 12_000), st.data())
@settings(deadline=None, max_examples=60)
def test_settled_phases_are_those_that_shaped_what_came(
    mixture: tuple[tuple[Phase, ...], MixtureSettings], position: int, data: st.DataObject
) -> None:
    """Whatever becomes of the phases that are not settled, the positions before stay what they were; and a phase that
    begins at the earliest change is never settled."""
    phases, shape = mixture
    settled = settled_phases(phases, shape, position)
    assert 1 <= settled <= len(phases)
    before = np.arange(position, dtype=np.int64)
    kept = list(phases[:settled])
    later = earliest_change(phases, shape, position)
    assert (
        settled_phases([*kept, Phase(max(later, kept[-1].from_sample + 1), kept[0].weights)], shape, position)
        == settled
    )
    changed = [*kept, Phase(max(later, kept[-1].from_sample + 1) + data.draw(st.integers(0, 5000)), kept[0].weights)]
    found = large(phases, lanes=shape.lanes, chunk=shape.chunk, seed=shape.seed).sources_at(before)
    for others in (kept, changed):
        again = large(others, lanes=shape.lanes, chunk=shape.chunk, seed=shape.seed).sources_at(before)
        assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_phase_is_settled_once_the_block_that_it_cuts_has_begun() -> None:
    """One lane: a phase from sample 2,500 makes the third block 500 slots long, so it matters from sample 2,000 on."""
    phases = parse_weights([(0, {"a": 1, "b": 1}), (2500, {"a": 1, "b": 3})], ["a", "b"])
    shape = MixtureSettings(seed=0, lanes=1, chunk=1)
    assert [settled_phases(phases, shape, at) for at in (0, 1, 2000, 2001, 2500, 9999)] == [1, 1, 1, 2, 2, 2]
    assert [earliest_change(phases, shape, at) for at in (0, 1, 1000, 1001, 2001, 2501)] == [
        0,
        1000,
        1000,
        2000,
        2500,
        3500,
    ]
