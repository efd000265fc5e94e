"""The order of a mixture: position → lane → slot → source and its sample. Pure, O(log) to seek, never materialised.

Theory
------
1. **Sources.** Source s is an endless stream: its stream sample x is position ``x mod N_s`` of its epoch ``x // N_s``,
   in an ``EpochOrder`` of its own (its rows, shuffle, seed and shuffle_block) with ``K_s = min(K, N_s)`` lanes and
   chunk 1.
2. **Positions.** The mixture is an endless stream of positions P = 0, 1, 2, …, dealt to K lanes in chunks of b:
   position P is slot ``(P // b // K)·b + P mod b`` of lane ``(P // b) mod K``.
3. **Uses.** The i-th use of source s in lane ℓ, counted from the stream's begin, takes ``x = i·K + ℓ``. So two lanes
   never take the same x, and lane ℓ stays in one lane of the source during each of its epochs (because K_s = K), but
   for the fewer than K rows of the epoch's tail.
4. **Blocks.** A lane's slots are cut into blocks of M = ``MIXTURE_BLOCK``; the last block of a phase (see 7) has the
   R ≤ M slots that are left. In block q of a phase source s has c_s(q) slots, the same in every lane. The list "source
   0 c_0 times, source 1 c_1 times, …" is permuted by the key (seed, lane, block); in the key, blocks are numbered over
   all phases, so no key comes twice.
5. **Counts.** Weights w_s are exact fractions of sum 1. In a block of R slots, with ``w_s·R = ⌊w_s·R⌋ + f_s``, the
   F = Σf_s slots that rounding leaves over go to distinct sources by systematic sampling: with A_s = f_0 + … + f_{s-1}
   and u_q the van der Corput radical inverse of q in base 2, ``e_s(q) = ⌈A_{s+1} − u_q⌉ − ⌈A_s − u_q⌉``. As f_s < 1,
   e_s is 0 or 1; the sum telescopes to F. So ``|c_s(q) − w_s·R| < 1`` in every block.
6. **Sums of counts** over whole blocks are closed form: ``Σ_{q<Q} ⌈A − u_q⌉ = Q·⌊A⌋ + #{q < Q: u_q < A mod 1}``. For
   the last count, Q is cut by its binary digits into aligned runs; the u_q of a run of 2^j are a lattice of spacing
   2^-j that begins at the radical inverse of the run's first number. The error ``#{q < Q: u_q < a} − Q·a`` lies in
   [0, 1 + log₂(Q)/3] (Béjian and Faure 1977), and e_s is the difference of two such counts, so after Q whole blocks of
   a phase every source has its share to within 1 + log₂(Q)/3 slots a lane.
7. **Phases.** Weights may change: a phase begins, in every lane, with the first whole round of the interleave (K·b
   positions) at or after its ``from_sample``: at slot ``⌈from_sample / (K·b)⌉·b``. Its blocks start with q = 0.
8. **Passes.** What a training loop calls epoch e is the positions ``[e·T, (e+1)·T)``. Later passes go on where the
   earlier ended; sources do not begin anew.

What follows: wherever all lanes are through the same blocks, so also where a phase begins, the x that source s has used
are ``0 … C·K − 1``, and use i of a source is in the same block in every lane. Within a block, lanes differ by what
their permutations bring early: no x is used twice, but some are used before smaller ones. So a pass that stops at
"first_exhausted" leaves a few samples of that source for the next pass. And as passes go on, a later pass may use the
end of one epoch of a source and the begin of its next: only the first pass promises what its stop rule says.

Not elegant yet: finding where a source ends, and counting at a place within a block, permute one block for every lane
(about 50 µs each).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise
from math import lcm
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from streamshards.errors import OptionInvalid
from streamshards.options import require_int
from streamshards.plan.order import Draw, EpochOrder, Int64Array, Lane, OrderSettings, Places, keyed_permutation
from streamshards.plan.weights import Phase, require_ascending

MIXTURE_BLOCK: Final = 1000
"""Slots of a block: weights of up to three decimals hold exactly in every block."""

_INT64_MAX: Final = 2**63 - 1
_MAX_SOURCES: Final = 2**16
"""Blocks hold a source in 16 bits: small, and numpy sorts them by radix."""
_SPARE_TABLES: Final = 64
_MOST_TABLES: Final = 4096
"""A reader of L lanes needs L block tables (2 KB each) to hand, and a few for lanes already in their next block."""

Stop: TypeAlias = int | Literal["first_exhausted", "all_exhausted"]
Uint16Array: TypeAlias = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True, eq=False)
class SourceRows:
    """One source of a mixture, as far as its order depends on it."""

    name: str
    rows: Int64Array
    """Rows of each shard, int64 ``(num_shards,)``, in the order of the index."""
    shuffle: bool
    seed: int
    shuffle_block: int
    shards: Int64Array | None = None
    """The numbers of the shards in the index, int64 ``(num_shards,)``; None: 0, 1, 2, …"""

    @property
    def num_samples(self) -> int:
        """Samples of one epoch of the source."""
        return int(self.rows.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSettings:
    """All that shapes the mixture besides its sources and weights; saved in every checkpoint."""

    seed: int
    lanes: int
    chunk: int

    def __post_init__(self) -> None:
        require_int(self.seed, name="seed", minimum=0)
        for name in ("lanes", "chunk"):
            require_int(getattr(self, name), name=name, minimum=1)


def _require_sources(sources: Sequence[SourceRows], phases: Sequence[Phase]) -> None:
    """Check that phases and sources fit together."""
    if not 1 <= len(sources) <= _MAX_SOURCES:
        raise OptionInvalid(f"a mixture of {len(sources):,} sources: it takes 1 to {_MAX_SOURCES:,}")
    require_ascending(phases)
    for phase in phases:
        if len(phase.weights) != len(sources):
            raise OptionInvalid(
                f"weights from sample {phase.from_sample:,} are {len(phase.weights)} for {len(sources)} sources"
            )
    for number, source in enumerate(sources):
        if source.num_samples == 0 and any(phase.weights[number] for phase in phases):
            raise OptionInvalid(f"source {source.name!r} has no samples; give it weight 0, or leave it out")


# -- how many slots of a block a source has ----------------------------------------------------------------------------


class _Stretch:
    """Consecutive blocks of one phase and of one length. All in whole numbers of any size: exact.

    Args:
        weights: Of each source; sum 1.
        num_slots: Of a block.
        number: Of the first block in its phase: the q of theory 5.
        first_block: The same block, numbered over all phases.
        start: Its first slot.
        before: The slots of each source in a lane before that.
    """

    def __init__(
        self, weights: Sequence[Fraction], num_slots: int, number: int, first_block: int, start: int, before: list[int]
    ) -> None:
        self.first_block = first_block
        self.start = start
        self._number = number
        self._before = before
        shares = [weight * num_slots for weight in weights]
        self._whole = [share.numerator // share.denominator for share in shares]
        parts = [share - whole for share, whole in zip(shares, self._whole, strict=True)]
        self._unit = lcm(*(part.denominator for part in parts))
        self._sums = list(accumulate((int(part * self._unit) for part in parts), initial=0))
        """A_0 … A_S, in units of 1/unit."""

    def block_of(self, slot: int) -> int:
        return self.first_block + (slot - self.start) // MIXTURE_BLOCK

    def start_of(self, block: int) -> int:
        return self.start + (block - self.first_block) * MIXTURE_BLOCK

    def uses_before(self, block: int, sources: range) -> list[int]:
        """Return how many slots each of *sources* has in a lane before *block*."""
        count = block - self.first_block
        extras = [self._ceils(a, count) for a in self._sums[sources.start : sources.stop + 1]]
        return [
            self._before[source] + count * self._whole[source] + b - a
            for source, (a, b) in zip(sources, pairwise(extras), strict=True)
        ]

    def _ceils(self, a: int, count: int) -> int:
        """Return Σ ⌈a/unit − u_q⌉ over *count* numbers q, from that of the first block on."""
        whole, part = divmod(a, self._unit)
        return count * whole + self._num_below(part, self._number + count) - self._num_below(part, self._number)

    def _num_below(self, part: int, count: int) -> int:
        """Return how many of the q below *count* have u_q < part/unit."""
        if part == 0:
            return 0
        bits = count.bit_length()
        first = 0  # the radical inverse of the run's first number, times 2**bits
        found = 0
        for j in reversed(range(bits)):
            if count >> j & 1:  # the run: 2**j numbers, their u at first/2**bits + t/2**j
                room = ((part << bits) - first * self._unit) << j
                found += -(-room // (self._unit << bits))  # never below 0: the lattice begins below its spacing
                first += 1 << (bits - 1 - j)
        return found


def _stretches(phases: Sequence[Phase], settings: MixtureSettings) -> list[_Stretch]:
    """Return the whole blocks of each phase, then its last block if that is shorter. The last phase has no end."""
    starts = _start_slots(phases, settings)
    stops = [*starts[1:], starts[-1] + MIXTURE_BLOCK * _INT64_MAX]
    out: list[_Stretch] = []
    block, before = 0, [0] * len(phases[0].weights)
    for phase, start, stop in zip(phases, starts, stops, strict=True):
        whole, rest = divmod(stop - start, MIXTURE_BLOCK)
        for number, count, num_slots in ((0, whole, MIXTURE_BLOCK), (whole, 1, rest)):
            if count > 0 and num_slots > 0:
                first_slot = start + number * MIXTURE_BLOCK
                out.append(_Stretch(phase.weights, num_slots, number, block, first_slot, before))
                block += count
                before = out[-1].uses_before(block, range(len(before)))
    return out


def _start_slots(phases: Sequence[Phase], settings: MixtureSettings) -> list[int]:
    """Return the slot of every lane with which each phase begins."""
    period = settings.lanes * settings.chunk
    return [min(-(-phase.from_sample // period) * settings.chunk, _INT64_MAX) for phase in phases]


# -- the stream: position → source, use --------------------------------------------------------------------------------


class _Block(NamedTuple):
    """One block as it is in every lane: its list, see Theory, 4."""

    start: int
    """The first slot."""
    counts: Int64Array
    """Items of each source, int64 ``(S,)``."""
    before: Int64Array
    """Uses of each source in the lane before the block, int64 ``(S,)``."""
    sources: Uint16Array
    """The source of each item, ``(R,)``."""
    uses: Int64Array
    """The number of each item among its source's uses in the lane, int64 ``(R,)``."""


class _Uses(NamedTuple):
    """One use of a source in each of some lanes: where they are in the same block."""

    lanes: range
    block: int
    item: int
    """Of the block's list."""
    slots: range
    """All slots that it may have, whatever the permutation."""


class _Stream:
    """The endless stream of a mixture: which source a position has, and which of its samples. See Theory, 2 to 7.

    Blocks are numbered over all phases.
    """

    def __init__(self, phases: Sequence[Phase], settings: MixtureSettings) -> None:
        self.settings = settings
        self.num_phases = len(phases)
        self.num_sources = len(phases[0].weights)
        self.last_position = _INT64_MAX // settings.lanes
        """Up to here nothing leaves int64."""
        self._stretches = _stretches(phases, settings)
        self._starts = np.array([stretch.start for stretch in self._stretches], dtype=np.int64)
        self._first_blocks = np.array([stretch.first_block for stretch in self._stretches], dtype=np.int64)
        self._block: Callable[[int], _Block] = lru_cache(_SPARE_TABLES)(self._make_block)
        num_tables = min(settings.lanes, _MOST_TABLES) + _SPARE_TABLES
        self._table: Callable[[int, int], Uint16Array] = lru_cache(num_tables)(self._make_table)

    def at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return the lane, the source and the source's stream sample of each position."""
        lanes, chunk = self.settings.lanes, self.settings.chunk
        chunks, within = np.divmod(positions, chunk)
        rounds, lane = np.divmod(chunks, lanes)
        slots = rounds * chunk + within
        stretches = self._starts.searchsorted(slots, "right") - 1
        blocks, slots = np.divmod(slots - self._starts[stretches], MIXTURE_BLOCK)
        blocks += self._first_blocks[stretches]
        source, sample = np.empty_like(positions), np.empty_like(positions)
        for number, here in _groups(blocks):
            of_block, lane_here, slots_here = self._block(number), lane[here], slots[here]
            items = np.empty(len(here), dtype=np.uint16)
            for of_lane, there in _groups(lane_here):
                items[there] = self._table(of_lane, number)[slots_here[there]]
            source[here] = of_block.sources[items]
            sample[here] = of_block.uses[items] * lanes + lane_here
        return lane, source, sample

    def counts(self, position: int) -> Int64Array:
        """Return how many of the positions before *position* each source has: int64 ``(S,)``."""
        lanes, chunk = self.settings.lanes, self.settings.chunk
        rounds, rest = divmod(position, lanes * chunk)
        full, part = divmod(rest, chunk)  # lanes that are through the round; slots of the next lane in it
        slot = rounds * chunk
        uses = np.zeros(self.num_sources, dtype=np.int64)
        groups = ((range(full), slot + chunk), (range(full, full + 1), slot + part), (range(full + 1, lanes), slot))
        for of_lanes, stop in groups:
            if of_lanes:  # else *stop* may not fit 64 bits
                uses += self._uses_before(of_lanes, stop)
        return uses

    def _uses_before(self, lanes: range, slot: int) -> Int64Array:
        """Return how many slots each source has before slot *slot* of all *lanes*: int64 ``(S,)``."""
        number = self._stretch_at(slot).block_of(slot)
        block = self._block(number)
        uses = block.before * len(lanes)
        if slot > block.start:
            came = np.zeros(len(block.sources), dtype=np.int64)  # in how many lanes, for each item of the list
            for lane in lanes:
                came[self._permutation(lane, number)[: slot - block.start]] += 1
            uses += np.bincount(block.sources, came, self.num_sources).astype(np.int64)
        return uses

    # -- finding a use of a source ---------------------------------------------------------------------------------

    def uses(self, source: int, use: int, lanes: range) -> list[_Uses]:
        """Return where each of *lanes* comes to use *use* of *source*.

        Nothing if *lanes* are none, or if it never comes or beyond the last position.
        """
        slot = self.last_position // self.settings.lanes
        last = self._stretch_at(slot).block_of(slot)
        number = bisect_right(range(last + 1), use, key=lambda block: self._uses_before_block(block, source)) - 1
        if not lanes or number == last:
            return []
        block = self._block(number)
        nth = use - int(block.before[source])
        slots = range(block.start + nth, block.start + nth + len(block.sources) - int(block.counts[source]) + 1)
        return [_Uses(lanes, number, int(block.counts[:source].sum()) + nth, slots)]

    def slot_of(self, uses: _Uses, lane: int) -> int:
        """Return the slot in *lane* of what *uses* has there."""
        return self._block(uses.block).start + int((self._table(lane, uses.block) == uses.item).argmax())

    def position_of(self, lane: int, slot: int) -> int:
        """Return the position of slot *slot* of *lane*."""
        rounds, within = divmod(slot, self.settings.chunk)
        return (rounds * self.settings.lanes + lane) * self.settings.chunk + within

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _stretch_at(self, slot: int) -> _Stretch:
        return self._stretches[int(self._starts.searchsorted(slot, "right")) - 1]

    def _stretch_of(self, block: int) -> _Stretch:
        return self._stretches[int(self._first_blocks.searchsorted(block, "right")) - 1]

    def _uses_before_block(self, block: int, source: int) -> int:
        return self._stretch_of(block).uses_before(block, range(source, source + 1))[0]

    def _make_block(self, block: int) -> _Block:
        stretch, everything = self._stretch_of(block), range(self.num_sources)
        before = np.array(stretch.uses_before(block, everything), dtype=np.int64)
        counts = np.array(stretch.uses_before(block + 1, everything), dtype=np.int64) - before
        sources = np.arange(self.num_sources, dtype=np.uint16).repeat(counts)
        nth = np.arange(len(sources)) - (counts.cumsum() - counts).repeat(counts)
        return _Block(stretch.start_of(block), counts, before, sources, before[sources] + nth)

    def _make_table(self, lane: int, block: int) -> Uint16Array:
        """Return which item each slot of *block* in *lane* has, if a source's items come in the list's order."""
        sources = self._block(block).sources[self._permutation(lane, block)]
        items = np.empty_like(sources)
        items[sources.argsort(kind="stable")] = np.arange(len(sources))
        return items

    def _permutation(self, lane: int, block: int) -> Int64Array:
        """Return which item of the list comes to each slot of *block* in *lane*."""
        num_slots, seed = len(self._block(block).sources), self.settings.seed
        return keyed_permutation(num_slots, seed=seed, epoch=0, draw=Draw.MIXTURE, lane=lane, block=block)


def _groups(keys: Int64Array | Uint16Array) -> Iterator[tuple[int, Int64Array]]:
    """Yield each key once, ascending, with where it stands in *keys*.

    Fast for 16 bits (radix sort), and for keys that ascend over long stretches (timsort).
    """
    places = keys.argsort(kind="stable")
    ordered = keys[places]
    begins = np.flatnonzero(np.append(len(keys) > 0, ordered[1:] != ordered[:-1]))
    for key, (begin, stop) in zip(ordered[begins].tolist(), pairwise([*begins.tolist(), len(keys)]), strict=True):
        yield key, places[begin:stop]


# -- which weights have shaped what -----------------------------------------------------------------------------------


def settled_phases(phases: Sequence[Phase], settings: MixtureSettings, position: int) -> int:
    """Return how many of *phases* have had a part in the positions before *position*; the others may still change.

    A phase shapes more than its own positions: the block before it is as long as it leaves it.
    """
    lanes, chunk = settings.lanes, settings.chunk
    starts = _start_slots(phases, settings)
    for number, (before, start) in enumerate(pairwise(starts), 1):
        rounds, within = divmod(start - (start - before) % MIXTURE_BLOCK, chunk)
        if rounds * chunk * lanes + within >= position:
            return number
    return len(phases)


def earliest_change(phases: Sequence[Phase], settings: MixtureSettings, position: int) -> int:
    """Return a ``from_sample`` that is about the first at which a phase can begin that does not change what came before
    *position*: where the block under way ends."""
    lanes, chunk = settings.lanes, settings.chunk
    settled = phases[: settled_phases(phases, settings, position)]
    start = _start_slots(settled, settings)[-1]
    reached = max(-(-position // (lanes * chunk)) * chunk, start)
    end = start + -(-(reached - start) // MIXTURE_BLOCK) * MIXTURE_BLOCK
    return -(-end // chunk) * chunk * lanes


# -- how long a pass is ------------------------------------------------------------------------------------------------


def pass_length(stop: Stop, sources: Sequence[SourceRows], phases: Sequence[Phase], settings: MixtureSettings) -> int:
    """Return how many positions a pass has.

    Args:
        stop: A number: that many. "first_exhausted": as many as come before the first sample that some source gives a
            second time. "all_exhausted": as few as use every sample of every source at least once.
        sources: In the order of the weights.
        phases: As ``parse_weights`` gives them.
        settings: What shapes the mixture.

    Raises:
        OptionInvalid: No such stop rule, or it would never come; sources and phases that don't fit.
    """
    _require_sources(sources, phases)
    if stop == "first_exhausted":
        return _first_exhausted(sources, _Stream(phases, settings))
    if stop == "all_exhausted":
        return _all_exhausted(sources, _Stream(phases, settings))
    return require_int(stop, name='stop ("first_exhausted", "all_exhausted" or a number of samples)', minimum=1)


def _first_exhausted(sources: Sequence[SourceRows], stream: _Stream) -> int:
    lanes = stream.settings.lanes
    again: list[_Uses] = []  # the first use in each lane with i·K + ℓ ≥ N
    for number, source in enumerate(sources):
        rounds, rest = divmod(source.num_samples, lanes)
        again += stream.uses(number, rounds + 1, range(rest)) + stream.uses(number, rounds, range(rest, lanes))
    first = stream.last_position + 1
    for uses in sorted(again, key=lambda uses: uses.slots[0]):
        for lane in uses.lanes:
            if stream.position_of(lane, uses.slots[0]) >= first:
                break  # so it is in all later lanes
            first = min(first, stream.position_of(lane, stream.slot_of(uses, lane)))
    if first > stream.last_position:
        raise OptionInvalid('stop="first_exhausted" would come after more positions than fit 64 bits')
    return first


def _all_exhausted(sources: Sequence[SourceRows], stream: _Stream) -> int:
    lanes = stream.settings.lanes
    ends: list[_Uses] = []  # the last use in each lane with i·K + ℓ < N
    for number, source in enumerate(sources):
        rounds, rest = divmod(source.num_samples, lanes)
        groups = [(rounds, range(rest)), (rounds - 1, range(rest, lanes) if rounds else range(0))]
        found = [uses for use, of_lanes in groups for uses in stream.uses(number, use, of_lanes)]
        if len(found) < sum(len(of_lanes) > 0 for _, of_lanes in groups):
            raise OptionInvalid(
                f'stop="all_exhausted" would never come: the weight of source {source.name!r} is 0, or next to 0, '
                f"before its {source.num_samples:,} samples are used; raise it, or leave the source out"
            )
        ends += found
    last = -1
    for uses in sorted(ends, key=lambda uses: uses.slots[-1], reverse=True):
        for lane in reversed(uses.lanes):
            if stream.position_of(lane, uses.slots[-1]) <= last:
                break  # so it is in all earlier lanes
            last = max(last, stream.position_of(lane, stream.slot_of(uses, lane)))
    return last + 1


# -- the order of a pass -----------------------------------------------------------------------------------------------


class MixtureOrder:
    """The order of one pass over a mixture.

    Args:
        sources: In the order of the weights.
        phases: As ``parse_weights`` gives them.
        settings: What shapes the mixture.
        epoch: Which pass, from 0.
        num_samples: Positions of every pass, as ``pass_length`` gives it.

    Raises:
        OptionInvalid: Sources and phases that don't fit, an empty source that has a weight, or a pass so late that its
            positions don't fit 64 bits.
    """

    def __init__(
        self,
        sources: Sequence[SourceRows],
        phases: Sequence[Phase],
        settings: MixtureSettings,
        *,
        epoch: int,
        num_samples: int,
    ) -> None:
        _require_sources(sources, phases)
        self.sources = tuple(sources)
        self.settings = settings
        self.epoch = require_int(epoch, name="epoch", minimum=0)
        self.num_samples = require_int(num_samples, name="num_samples", minimum=1)
        self.num_sources = len(sources)
        self._start = epoch * num_samples
        self._stream = _Stream(phases, settings)
        if self._start + num_samples > self._stream.last_position:
            raise OptionInvalid(f"epoch={epoch:,} of {num_samples:,} samples: its positions don't fit 64 bits")
        self._num_samples = [source.num_samples for source in sources]
        self._order_settings = [
            OrderSettings(
                shuffle=source.shuffle,
                seed=source.seed,
                lanes=max(1, min(settings.lanes, source.num_samples)),
                chunk=1,
                shuffle_block=source.shuffle_block,
            )
            for source in sources
        ]
        # Lanes and offsets depend on the number of rows only: one shard of that many rows stands for all epochs.
        self._locators = [
            EpochOrder(np.array([n], dtype=np.int64), order, 0)
            for n, order in zip(self._num_samples, self._order_settings, strict=True)
        ]
        # At most two epochs of a large source are under way at once; a few more of small ones.
        self._order: Callable[[int, int], EpochOrder] = lru_cache(2 * len(sources) + 16)(self._make_order)

    def sources_at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the source's number and the source's stream sample of each position, int64 ``(n,)`` both.

        Positions, int64 ``(n,)``, are in ``[0, num_samples)`` here and below; others give nonsense.
        """
        _, source, sample = self._stream.at(positions + self._start)
        return source, sample

    def places(self, positions: Int64Array) -> Places:
        """Return where each position lies.

        Tracks are ``source * lanes + lane`` of the mixture, lanes are ``source epoch * K_s + lane`` of that epoch's
        order, offsets are in that lane.
        """
        lane, source, sample = self._stream.at(positions + self._start)
        lanes, offsets = np.empty_like(positions), np.empty_like(positions)
        for number, here in _groups(source.astype(np.uint16)):
            epochs, within = np.divmod(sample[here], self._num_samples[number])
            in_epoch, offsets[here] = self._locators[number].locate(within)
            lanes[here] = epochs * self._order_settings[number].lanes + in_epoch
        return Places(source * self.settings.lanes + lane, lanes, offsets)

    def lane(self, track: int, number: int) -> Lane:
        """Return the lane that number *number* of ``Places.lanes`` stands for on *track*."""
        source = track // self.settings.lanes
        epoch, lane = divmod(number, self._order_settings[source].lanes)
        return Lane(source, self._order(source, epoch), lane)

    def counts(self, position: int) -> Int64Array:
        """Return how many samples each source gives before *position* of this pass, earlier passes included.

        int64 ``(num_sources,)``, exact; *position* from 0 to ``num_samples``. Permutes one block for each lane
        that is within a block.
        """
        return self._stream.counts(self._start + position)

    def rows_at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
        """Return the source, the source's epoch, the shard and the row in it of each position: int64 ``(n,)`` each.

        For tests, inspection and provenance. O(rows of the source blocks touched).
        """
        source, sample = self.sources_at(positions)
        epochs, shards, rows = np.empty_like(source), np.empty_like(source), np.empty_like(source)
        for number, here in _groups(source.astype(np.uint16)):
            epochs[here], within = np.divmod(sample[here], self._num_samples[number])
            for epoch, of_epoch in _groups(epochs[here]):
                shards[here[of_epoch]], rows[here[of_epoch]] = self._order(number, epoch).rows_at(within[of_epoch])
        return source, epochs, shards, rows

    def _make_order(self, source: int, epoch: int) -> EpochOrder:
        found = self.sources[source]
        return EpochOrder(found.rows, self._order_settings[source], epoch, shards=found.shards)

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"MixtureOrder(epoch={self.epoch}, samples={self.num_samples:,}, sources={self.num_sources}, "
            f"phases={self._stream.num_phases}, seed={s.seed}, lanes={s.lanes}, chunk={s.chunk})"
        )
