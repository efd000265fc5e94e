"""The closed forms of the order against a naive reference, for every small case and for random larger ones.

Each of the four steps is tried exhaustively by itself, because each depends on few numbers: the interleave on (samples,
lanes, chunk), the blocks on (shards, lanes, shuffle_block). Then they are tried together, on fewer cases.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import make_golden
import naive_order
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamshards.errors import OptionInvalid
from streamshards.options import MiB, OrderOptions
from streamshards.plan import order as order_module
from streamshards.plan.assignment import Assignment
from streamshards.plan.order import (
    Block,
    Draw,
    EpochOrder,
    Int64Array,
    OrderSettings,
    Piece,
    keyed_permutation,
    philox_words,
    resolve_order,
)
from streamshards.plan.schedule import schedule
from streamshards.plan.topology import Topology


def every_shard_vector(max_shards: int, max_rows: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to give up to *max_shards* shards up to *max_rows* rows each, empty ones included."""
    for num_shards in range(max_shards + 1):
        yield from itertools.product(range(max_rows + 1), repeat=num_shards)


def make(rows: Any, *, epoch: int = 0, **changes: Any) -> EpochOrder:
    chosen = {"shuffle": True, "seed": 3, "lanes": 1, "chunk": 1, "shuffle_block": 4, **changes}
    return EpochOrder(np.array(rows, dtype=np.int64), OrderSettings(**chosen), epoch)


def whole(order: EpochOrder) -> list[tuple[int, int]]:
    shards, rows = order.rows_at(np.arange(order.num_samples, dtype=np.int64))
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


def as_naive(order: EpochOrder, rows: Any) -> list[naive_order.Row]:
    s = order.settings
    return naive_order.epoch_order(
        list(rows),
        shuffle=s.shuffle,
        seed=s.seed,
        epoch=order.epoch,
        lanes=s.lanes,
        chunk=s.chunk,
        shuffle_block=s.shuffle_block,
    )


def rows_of(blocks: Iterator[Block]) -> list[tuple[int, int, list[tuple[int, int]]]]:
    return [(b.number, b.start, [(p.shard, row) for p in b.pieces for row in range(p.lo, p.hi)]) for b in blocks]


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], EpochOrder]:
    """Draw up to 30 shards of up to 40 rows, and any settings that fit them."""
    rows = draw(st.lists(st.integers(0, 40), max_size=30))
    assume(sum(rows) > 0)
    order = make(
        rows,
        shuffle=draw(st.booleans()),
        seed=draw(st.integers(0, 2**63 - 1)),
        epoch=draw(st.integers(0, 2**63 - 1)),
        lanes=draw(st.integers(1, min(sum(rows), 20))),
        chunk=draw(st.integers(1, 30)),
        shuffle_block=draw(st.integers(1, 300)),
    )
    return rows, order


# -- each step, every small case -----------------------------------------------------------------------------------


def test_interleave_is_what_a_simulation_deals() -> None:
    """For every number of samples up to 20, of lanes and any chunk: each position is where dealing in turn puts it."""
    for n in range(1, 21):
        positions = np.arange(n, dtype=np.int64)
        for lanes, chunk in itertools.product(range(1, n + 1), range(1, n + 2)):
            lane, offset = make([n], lanes=lanes, chunk=chunk).locate(positions)
            places = naive_order.cut_lanes(range(n), lanes)
            dealt = naive_order.interleave([[(i, j) for j in range(len(p))] for i, p in enumerate(places)], chunk)
            assert list(zip(lane.tolist(), offset.tolist(), strict=True)) == dealt, (n, lanes, chunk)


def test_lanes_share_the_tape_evenly() -> None:
    """Lanes follow each other without a gap, cover the tape, and differ by at most one row."""
    for n in range(1, 40):
        for lanes in range(1, n + 1):
            order = make([n], lanes=lanes)
            edges = [order.lane_interval(lane) for lane in range(lanes)]
            assert [edges[0][0], edges[-1][1]] == [0, n]
            assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
            assert {stop - start for start, stop in edges} <= {n // lanes, n // lanes + 1}


def test_blocks_are_what_walking_the_lane_cuts() -> None:
    """For every vector of up to 4 shards of up to 3 rows, every number of lanes, and ramps of all shapes: the blocks
    of a lane, and the block found at each of its offsets, are those that a walk along the lane cuts."""
    for rows in every_shard_vector(4, 3):
        tape = naive_order.tape(rows, shuffle=False, seed=0, epoch=0)
        for lanes, block_rows in itertools.product(range(1, len(tape) + 1), (1, 4, 7)):
            order = make(rows, shuffle=False, lanes=lanes, shuffle_block=block_rows)
            for lane, lane_rows in enumerate(naive_order.cut_lanes(tape, lanes)):
                walked = [(b.number, b.start, b.rows) for b in naive_order.cut_blocks(lane_rows, block_rows)]
                blocks = list(order.blocks(lane))
                assert rows_of(iter(blocks)) == walked, (rows, lanes, block_rows, lane)
                for block in blocks:
                    assert all(piece.num_rows > 0 for piece in block.pieces), "an empty shard would be fetched"
                    assert all(order.block_at(lane, i) == block for i in range(block.start, block.stop))


def test_every_step_together_is_the_naive_order() -> None:
    """For every vector of up to 3 shards of up to 3 rows, every number of lanes, and some chunks and blocks: the
    shuffled order is the naive one, and each row of the dataset has one position."""
    for rows in every_shard_vector(3, 3):
        for lanes, chunk, block_rows in itertools.product(range(1, sum(rows) + 1), (1, 2), (1, 16)):
            order = make(rows, lanes=lanes, chunk=chunk, shuffle_block=block_rows)
            delivered = whole(order)
            assert delivered == as_naive(order, rows), (rows, lanes, chunk, block_rows)
            assert sorted(delivered) == [(shard, row) for shard, n in enumerate(rows) for row in range(n)]


def test_blocks_are_about_as_large_as_asked() -> None:
    """The first three blocks hold T/8, T/4 and T/2 rows, each later one T, give or take a shard."""
    order = make([10] * 1000, lanes=2, shuffle_block=800)
    for lane in range(2):
        sizes = [block.num_rows for block in order.blocks(lane)]
        assert sizes[:-1] == [100, 200, 400, 800, 800, 800, 800, 800]
        assert sum(sizes) == 5000


# -- larger cases --------------------------------------------------------------------------------------------------


@given(plans())
@settings(deadline=None, max_examples=80)
def test_larger_orders_are_the_naive_order(plan: tuple[list[int], EpochOrder]) -> None:
    """The order of larger datasets, under any settings, seed and epoch, is the naive one."""
    rows, order = plan
    assert whole(order) == as_naive(order, rows)


@given(plans(), st.data())
@settings(deadline=None, max_examples=50)
def test_any_selection_of_positions_is_found_alone(plan: tuple[list[int], EpochOrder], data: st.DataObject) -> None:
    """What is at a position depends on nothing that was asked before or beside it."""
    _, order = plan
    everything = whole(order)
    chosen = data.draw(st.lists(st.integers(0, order.num_samples - 1), max_size=20))
    shards, rows = order.rows_at(np.array(chosen, dtype=np.int64))
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == [everything[p] for p in chosen]


@given(plans())
@settings(deadline=None, max_examples=50)
def test_without_shuffle_lanes_are_read_as_stored(plan: tuple[list[int], EpochOrder]) -> None:
    """Without shuffling, one lane is the dataset as stored, and each of several lanes a stretch of it."""
    rows, order = plan
    stored = [(shard, row) for shard, n in enumerate(rows) for row in range(n)]
    assert whole(make(rows, shuffle=False)) == stored
    plain = make(rows, shuffle=False, lanes=order.settings.lanes, chunk=order.settings.chunk)
    lane, _ = plain.locate(np.arange(len(stored), dtype=np.int64))
    by_lane = [row for _, row in sorted(zip(lane.tolist(), whole(plain), strict=True), key=lambda pair: pair[0])]
    assert by_lane == stored


@pytest.mark.parametrize("rows", [[1], [0, 1], [1, 0, 0], [0, 0, 1, 0]])
def test_a_single_row_is_found_among_empty_shards(rows: list[int]) -> None:
    """One row is the whole epoch, wherever empty shards stand."""
    assert whole(make(rows)) == [(rows.index(1), 0)]
    assert next(make(rows).blocks(0)).pieces == (Piece(rows.index(1), 0, 1),)


@pytest.mark.parametrize("rows", [[], [0], [0, 0, 0]])
def test_nothing_has_an_order_too(rows: list[int]) -> None:
    """A dataset without rows has an order of no positions, and lanes without blocks."""
    order = make(rows)
    assert order.num_samples == 0
    assert whole(order) == []
    assert list(order.blocks(0)) == []
    assert order.max_block_bytes(0, np.full(len(rows), 100, dtype=np.int64)) == 0


@pytest.mark.parametrize(("rows", "lanes"), [([], 2), ([0, 0], 2), ([1], 2), ([2, 3], 6), ([5], 2**62)])
def test_no_more_lanes_than_samples(rows: list[int], lanes: int) -> None:
    """More lanes than samples are refused, in words that name both."""
    with pytest.raises(OptionInvalid, match=f"lanes={lanes:,} .* {sum(rows)} samples"):
        make(rows, lanes=lanes)


@pytest.mark.parametrize("field", ["lanes", "chunk", "shuffle_block"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, 2**63])
def test_settings_are_right_once_they_exist(field: str, value: object) -> None:
    """Lanes, chunk and shuffle_block are whole numbers from 1, a seed from 0; anything else is refused by its name."""
    with pytest.raises(OptionInvalid, match=field):
        make([5], **{field: value})
    with pytest.raises(OptionInvalid, match="seed"):
        make([5], seed=-1)


# -- chance --------------------------------------------------------------------------------------------------------


def test_keyed_permutation_is_one_for_every_small_n() -> None:
    """For n up to 300 it holds each of 0 … n-1 once, and is the naive sort by leading bits."""
    for n in range(301):
        permutation = keyed_permutation(n, seed=1, epoch=2, draw=Draw.BLOCK, lane=3, block=4)
        assert permutation.dtype == np.int64
        assert sorted(permutation.tolist()) == list(range(n))
        assert permutation.tolist() == naive_order.permutation(n, (1, 2, naive_order.BLOCK_DRAW, 3, 4))


def test_only_the_bits_that_number_the_items_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each word just the low ⌈log₂ n⌉ bits give way to the item's number: items whose words differ above are sorted
    by them, the others stay in sequence. No real stream is likely to show this, so the words here are made up."""
    words = {4: [4, 0, 11, 9], 5: [8, 7, 0, 31, 24]}
    monkeypatch.setattr(order_module, "philox_words", lambda n, **_: np.array(words[n], dtype=np.uint64))
    found = {n: keyed_permutation(n, seed=0, epoch=0, draw=Draw.BLOCK).tolist() for n in words}
    assert found == {4: [1, 0, 2, 3], 5: [1, 2, 0, 3, 4]}


def test_every_part_of_the_key_counts() -> None:
    """Changing the seed, the epoch, the purpose, the lane or the block, even in a high bit, changes the stream."""
    key: dict[str, Any] = {"seed": 1, "epoch": 2, "draw": Draw.BLOCK, "lane": 3, "block": 4}
    others: list[dict[str, Any]] = [{"draw": Draw.SHARDS}, {"draw": Draw.REFILL}]
    others += [
        {name: key[name] + change} for name in ("seed", "epoch", "lane", "block") for change in (1, 2**32, 2**40)
    ]
    others += [{"seed": 2, "epoch": 1}, {"lane": 4, "block": 3}]
    streams = {tuple(philox_words(4, **{**key, **other}).tolist()) for other in ({}, *others)}
    assert len(streams) == 1 + len(others)


def test_small_permutations_are_fair() -> None:
    """Over 6,000 keys, each of the 24 permutations of 4 items comes up about as often as any other."""
    counts: dict[tuple[int, ...], int] = {}
    for block in range(6_000):
        drawn = tuple(keyed_permutation(4, seed=0, epoch=0, draw=Draw.BLOCK, block=block).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 24
    assert all(abs(count - 250) < 5 * 250**0.5 for count in counts.values())


def test_epochs_and_seeds_give_different_orders() -> None:
    """Two epochs, or two seeds, never share an order; the same epoch and seed always do."""
    rows = [5] * 8
    orders = {(seed, epoch): whole(make(rows, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len({tuple(order) for order in orders.values()}) == 25
    assert all(whole(make(rows, seed=seed, epoch=epoch)) == order for (seed, epoch), order in orders.items())


def test_no_shard_keeps_its_place() -> None:
    """Over 64 epochs each of 32 shards opens the tape in many places, early and late about equally often."""
    num_shards, num_epochs = 32, 64
    places = np.empty((num_epochs, num_shards))
    for epoch in range(num_epochs):
        shards, _ = make([1] * num_shards, epoch=epoch).rows_at(np.arange(num_shards, dtype=np.int64))
        places[epoch, shards] = np.arange(num_shards)
    assert all(len(set(places[:, shard])) > num_shards // 2 for shard in range(num_shards))
    standard_error = num_shards / 12**0.5 / num_epochs**0.5
    assert np.abs(places.mean(axis=0) - (num_shards - 1) / 2).max() < 5 * standard_error


def test_rows_mix_across_the_shards_of_a_block() -> None:
    """Neighbours in the order come from different shards, about as often as the shards of a block let them."""
    shards, _ = make([100] * 8, shuffle_block=10_000).rows_at(np.arange(800, dtype=np.int64))
    changes = int((np.diff(shards) != 0).sum())
    assert abs(changes / 799 - 7 / 8) < 0.06


# -- golden --------------------------------------------------------------------------------------------------------


def test_the_literal_order_never_changes() -> None:
    """Streams, permutations and orders are those in golden/order.json; make_golden.py says when that may change."""
    assert make_golden.golden() == json.loads(make_golden.GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", make_golden.SMALL)
def test_golden_orders_are_the_naive_order(name: str) -> None:
    """What the golden file pins is what the definition says, each row once."""
    small = json.loads(make_golden.GOLDEN.read_text(encoding="utf-8"))["small"]
    rows = [int(n) for n in small["rows"].split()]
    chosen, epoch = make_golden.SMALL[name]
    pinned = [tuple(map(int, row.split(":"))) for row in " ".join(small["cases"][name]["order"]).split()]
    assert pinned == as_naive(EpochOrder(np.array(rows), chosen, epoch), rows)
    assert sorted(pinned) == [(shard, row) for shard, n in enumerate(rows) for row in range(n)]


# -- what a block takes --------------------------------------------------------------------------------------------


@given(plans(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=80)
def test_max_block_bytes_bounds_every_block(plan: tuple[list[int], EpochOrder], seed: int) -> None:
    """No block's shards are larger together, and if no shard is empty, some block's shards are exactly as large."""
    rows, order = plan
    raw_bytes = np.random.default_rng(seed).integers(0, 1000, len(rows))
    for lane in range(order.settings.lanes):
        largest = max(sum(int(raw_bytes[p.shard]) for p in block.pieces) for block in order.blocks(lane))
        bound = order.max_block_bytes(lane, raw_bytes)
        assert bound >= largest
        assert bound == largest or 0 in rows


def test_max_block_bytes_is_tight_for_every_small_case() -> None:
    """For every vector of up to 4 shards of 1 to 3 rows, of all lanes and ramps, it is exactly the largest block."""
    for rows in every_shard_vector(4, 2):
        full = np.array(rows, dtype=np.int64) + 1
        raw_bytes = 10 ** np.arange(len(rows), dtype=np.int64)
        for lanes, block_rows in itertools.product(range(1, min(4, int(full.sum())) + 1), (1, 3, 8, 17)):
            order = make(full, shuffle=False, lanes=lanes, shuffle_block=block_rows)
            for lane in range(lanes):
                blocks = order.blocks(lane)
                largest = max((sum(int(raw_bytes[p.shard]) for p in block.pieces) for block in blocks), default=0)
                assert order.max_block_bytes(lane, raw_bytes) == largest, (rows, lanes, block_rows, lane)


# -- size ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge() -> EpochOrder:
    """A million shards, 5·10⁹ rows, in 256 lanes."""
    return make(np.full(10**6, 5_000), lanes=256, chunk=1024, shuffle_block=100_000)


def peak_bytes(work: Any) -> int:
    """Return the most that *work* had allocated at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_finding_a_position_touches_nothing_large(huge: EpochOrder) -> None:
    """In 10⁶ shards and 5·10⁹ rows, finding a position and its block allocates under 64 KiB: no array as long as the
    dataset, nor as the list of shards (8 MB)."""
    last = huge.num_samples - 1

    def find() -> None:
        for position in (0, 1, last // 3, last // 2 + 12_345, last - 1, last):
            lane, offset = huge.locate(np.array([position], dtype=np.int64))
            block = huge.block_at(int(lane[0]), int(offset[0]))
            assert block.start <= offset[0] < block.stop
            assert len(block.pieces) <= 22

    assert peak_bytes(find) < 64 * 1024


def test_resuming_touches_nothing_large(huge: EpochOrder) -> None:
    """The first steps after a resume at 90 % of such an epoch allocate under 2 MiB."""
    assignment = Assignment(
        num_samples=huge.num_samples,
        start=huge.num_samples // 10 * 9,
        batch_size=1024,
        topology=Topology(rank=5, world_size=64, worker=1, num_workers=4),
        tail="pad",
    )
    assert peak_bytes(lambda: list(itertools.islice(schedule(huge, assignment), 20))) < 2 * MiB


def test_a_block_of_a_huge_plan_holds_the_rows_it_promises(huge: EpochOrder) -> None:
    """Deep in the plan, a block's pieces follow each other in the lane and make up its rows."""
    lane, offset = huge.locate(np.array([4_321_987_654], dtype=np.int64))
    block = huge.block_at(int(lane[0]), int(offset[0]))
    assert sum(piece.num_rows for piece in block.pieces) == block.num_rows == 100_000
    assert len({piece.shard for piece in block.pieces}) == len(block.pieces) == 20
    assert huge.block_at(block.lane, block.stop).number == block.number + 1
    assert huge.block_at(block.lane, block.start - 1).number == block.number - 1


@pytest.mark.parametrize("block_rows", [1, 2**62])
def test_max_block_bytes_costs_what_the_lanes_shards_cost(huge: EpochOrder, block_rows: int) -> None:
    """Even if every row could begin a block, bounding a lane's blocks takes memory for its shards, not for its rows."""
    shards = np.full(1_000, 5_000)
    order = make(shards, lanes=2, shuffle_block=block_rows)
    assert peak_bytes(lambda: order.max_block_bytes(1, shards * 8)) < 256 * 1024
    sizes = np.full(10**6, 40_000)
    assert peak_bytes(lambda: huge.max_block_bytes(255, sizes)) < MiB


def test_a_huge_shuffle_block_is_one_block() -> None:
    """A shuffle_block of more rows than there are, however many, shuffles each lane as a whole."""
    for block_rows in (10**6, 2**40, 2**63 - 1):
        order = make([3, 4, 5], lanes=2, shuffle_block=block_rows)
        assert [block.num_rows for lane in range(2) for block in order.blocks(lane)] == [6, 6]


_PLANNING = """
import sys
from fractions import Fraction
import numpy as np
from streamshards.plan.assignment import Assignment
from streamshards.plan.mixture import MixtureOrder, MixtureSettings, SourceRows, pass_length
from streamshards.plan.order import EpochOrder, OrderSettings
from streamshards.plan.schedule import schedule, tracks_read
from streamshards.plan.subset import Split, Subset
from streamshards.plan.topology import Topology
from streamshards.plan.weights import parse_weights

rows = np.full(9, 10, dtype=np.int64)
order = EpochOrder(rows, OrderSettings(shuffle=True, seed=1, lanes=4, chunk=2, shuffle_block=20), 0)
order.max_block_bytes(0, rows)
share = Assignment(num_samples=90, start=0, batch_size=6, topology=Topology(), tail="pad")
list(schedule(order, share))
tracks_read(order, share, period=8)
subset = Subset(rows, [Split(fraction=Fraction(1, 2), seed=1, side=0, by="sample")])
subset.rows_of(0), subset.num_samples
sources, phases = [SourceRows("a", rows, True, 1, 20)], parse_weights({"a": 1}, "a")
settings = MixtureSettings(seed=1, lanes=2, chunk=1)
mixture = MixtureOrder(sources, phases, settings, epoch=0, num_samples=90)
list(schedule(mixture, share))
mixture.rows_at(np.arange(50))
mixture.counts(45), [pass_length(stop, sources, phases, settings) for stop in ("first_exhausted", "all_exhausted")]
print(len(list(schedule(order, share))), "numpy.ma" in sys.modules)
"""


def test_planning_imports_no_masked_arrays() -> None:
    """Nothing that plans an epoch or a mixture imports ``numpy.ma``, which costs a start 14 to 35 ms."""
    done = subprocess.run([sys.executable, "-c", _PLANNING], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("15 False\n", "")


@given(st.lists(st.integers(-5, 5)))
def test_distinct_is_what_a_set_holds(values: list[int]) -> None:
    """Each value once, ascending."""
    assert order_module.distinct(int64(values)).tolist() == sorted(set(values))


# -- what the order is at a first start ----------------------------------------------------------------------------


def resolve(options: OrderOptions | None = None, **changes: Any) -> OrderSettings:
    chosen: dict[str, Any] = {
        "shuffle": True,
        "seed": 3,
        "num_samples": 10_000,
        "raw_bytes": 10_000 * 1024,
        "global_batch": 256,
        "topology": Topology(world_size=4, num_workers=2),
        **changes,
    }
    return resolve_order(options or OrderOptions(), **chosen)


def test_nothing_asked_gives_a_lane_to_every_reader() -> None:
    """Left open: as many lanes as readers, a chunk of one rank's batch, and a block of 64 MiB of raw data."""
    assert resolve() == OrderSettings(shuffle=True, seed=3, lanes=8, chunk=64, shuffle_block=64 * 1024)
    assert resolve(topology=Topology()).lanes == 1
    assert resolve(shuffle=False, seed=0).shuffle is False


def test_given_lanes_make_the_order_of_every_cluster_the_same() -> None:
    """With lanes given, the settings depend on the global batch and not on ranks or workers."""
    for lanes, chunk in ((8, 32), (256, 1), (3, 85), (1000, 1)):
        clusters = [Topology(world_size=w, num_workers=n) for w in (1, 2, 4, 8) for n in (1, 3)]
        found = {resolve(OrderOptions(lanes=lanes), topology=cluster) for cluster in clusters}
        assert found == {OrderSettings(shuffle=True, seed=3, lanes=lanes, chunk=chunk, shuffle_block=64 * 1024)}


def test_what_is_given_is_taken() -> None:
    """Lanes, chunk and shuffle_block are what the user says, together or alone."""
    for lanes, chunk, block in itertools.product((None, 5), (None, 7), (None, 11)):
        found = resolve(OrderOptions(lanes=lanes, chunk=chunk, shuffle_block=block))
        assert found.lanes == lanes or (lanes is None and found.lanes == 8)
        assert found.chunk == chunk or (chunk is None and found.chunk == (51 if lanes else 64))
        assert found.shuffle_block == block or (block is None and found.shuffle_block == 64 * 1024)


def test_default_lanes_never_outnumber_samples() -> None:
    """A dataset smaller than the cluster, or empty, still starts: with a lane for each sample, and at least one."""
    for num_samples in range(12):
        found = resolve(num_samples=num_samples, raw_bytes=num_samples * 10)
        assert found.lanes == min(8, max(1, num_samples))
        EpochOrder(np.array([num_samples]), found, 0)


def test_rows_of_any_size_fill_a_block() -> None:
    """The default block holds at least one row however large rows are, and is finite however small they are."""
    assert resolve(raw_bytes=10_000 * 10**9).shuffle_block == 1
    assert resolve(raw_bytes=0).shuffle_block == 64 * MiB
    assert resolve(num_samples=0, raw_bytes=0).shuffle_block == 64 * MiB


def test_an_order_says_what_it_is() -> None:
    """The repr names the epoch, the size and every setting."""
    assert repr(make([1500, 7], epoch=4, lanes=2, chunk=3, shuffle_block=4096)) == (
        "EpochOrder(epoch=4, samples=1,507, shuffle=True, seed=3, lanes=2, chunk=3, shuffle_block=4,096)"
    )


def int64(values: Any) -> Int64Array:
    return np.array(values, dtype=np.int64)


def test_locate_keeps_the_shape_and_the_input() -> None:
    """Positions in, lanes and offsets of the same length out; the positions given are not written to."""
    order = make([9, 8], lanes=3, chunk=2)
    positions = int64([16, 0, 5])
    lane, offset = order.locate(positions)
    assert lane.dtype == offset.dtype == np.int64
    assert lane.shape == offset.shape == (3,)
    assert positions.tolist() == [16, 0, 5]
    assert order.locate(int64([]))[0].shape == (0,)
