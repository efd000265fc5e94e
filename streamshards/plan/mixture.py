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
4. **Blocks.** A lane's slots are cut into blocks of M = ``MIXTURE_BLOCK``. In block q source s has c_s(q) slots, the
   same in every lane. The list "source 0 c_0 times, source 1 c_1 times, …" is permuted by the key (seed, lane, block);
   in the key, blocks are numbered over all phases, so no key comes twice.
5. **Counts.** Weights w_s are exact fractions of sum 1. With ``w_s·M = ⌊w_s·M⌋ + f_s``, the F = Σf_s slots that
   rounding leaves over go to distinct sources by systematic sampling: with A_s = f_0 + … + f_{s-1} and u_q the van der
   Corput radical inverse of q in base 2, ``e_s(q) = ⌈A_{s+1} − u_q⌉ − ⌈A_s − u_q⌉``. As f_s < 1, e_s is 0 or 1; the
   sum telescopes to F. So ``|c_s(q) − w_s·M| < 1`` in every block.
6. **Sums of counts** are closed form: ``Σ_{q<Q} ⌈A − u_q⌉ = Q·⌊A⌋ + #{q < Q: u_q < A mod 1}``. For the last count, Q
   is cut by its binary digits into aligned runs; the u_q of a run of 2^j are a lattice of spacing 2^-j that begins at
   the radical inverse of the run's first number. The error ``#{q < Q: u_q < a} − Q·a`` lies in [0, 1 + log₂(Q)/3]
   (Béjian and Faure 1977), and e_s is the difference of two such counts, so after Q blocks every source has its share
   to within 1 + log₂(Q)/3 slots a lane.
7. **Phases.** Weights may change: a phase begins, in every lane, with the first whole round of the interleave (K·b
   positions) at or after its ``from_sample``: at slot ``⌈from_sample / (K·b)⌉·b``. Its blocks start with q = 0. Its
   last block may be cut short: a prefix of the permuted slots is used. What a prefix holds differs from lane to lane,
   so the uses before a later phase are counted per lane, from one block table for each phase before it.
8. **Passes.** What a training loop calls epoch e is the positions ``[e·T, (e+1)·T)``. Later passes go on where the
   earlier ended; sources do not begin anew.

What follows: in the first phase, once all lanes are through the same number of blocks, the x that source s has used
are ``0 … C·K − 1``. In between, and after a phase that ended within a block, lanes differ by what their block tables
happen to hold early: no x is used twice, but some are used before smaller ones. So a pass that stops at
"first_exhausted" leaves a few samples of that source for the next pass. And as passes go on, a later pass may use the
end of one epoch of a source and the begin of its next: only the first pass promises what its stop rule says.

Not elegant yet: finding where a source ends builds a block table for every lane (about 50 µs each), and so does
counting; after P phases, P tables a lane.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise
from math import isfinite, lcm
from numbers import Rational, Real
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from streamshards.errors import OptionInvalid
from streamshards.options import require_int
from streamshards.plan.order import Draw, EpochOrder, Int64Array, Lane, OrderSettings, Places, keyed_permutation

MIXTURE_BLOCK: Final = 1000
"""Slots of a block: weights of up to three decimals hold exactly in every block."""

_INT64_MAX: Final = 2**63 - 1
_MAX_SOURCES: Final = 2**16
"""Block tables hold a source in 16 bits: small, and numpy sorts them by radix."""
_SPARE_TABLES: Final = 64
_MOST_TABLES: Final = 4096
"""A reader of L lanes needs L block tables (4 KB each) to hand, and a few for lanes already in their next block."""

Number: TypeAlias = int | float | Fraction
Weights: TypeAlias = Mapping[str, Number] | Sequence[tuple[int, Mapping[str, Number]]]
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


@dataclass(frozen=True, slots=True)
class Phase:
    """The weights from one stream position on (about: see Theory, 7)."""

    from_sample: int
    weights: tuple[Fraction, ...]
    """One for each source, in their order; none negative, sum 1."""

    def __post_init__(self) -> None:
        require_int(self.from_sample, name="from_sample", minimum=0)
        if min(self.weights, default=Fraction(0)) < 0 or sum(self.weights) != 1:
            raise OptionInvalid(f"weights={self.weights!r} of a phase must not be negative, and have the sum 1")


# -- wishes → phases ---------------------------------------------------------------------------------------------------


def parse_weights(weights: Weights, names: Sequence[str]) -> tuple[Phase, ...]:
    """Return the phases that *weights* asks for.

    Args:
        weights: One weight for each source, of any sum: ``{"web": 0.7, "code": 0.3}``; or, to change them, a list of
            (from_sample, weights), the first from 0, ascending. A float means what it prints: 0.7 is 7/10.
        names: The sources, in order.

    Raises:
        OptionInvalid: An unknown or missing source; a weight that is not a number of at least 0; no weight above 0;
            phases out of order.
    """
    if isinstance(weights, Mapping):
        return (Phase(0, _normalised(weights, names, of="weights")),)
    if not isinstance(weights, (list, tuple)):
        raise OptionInvalid(f"weights={weights!r} must be a dict of weights, or a list of (from_sample, weights)")
    phases = tuple(_phase(number, item, names) for number, item in enumerate(weights))
    _require_ascending(phases)
    return phases


def _phase(number: int, item: object, names: Sequence[str]) -> Phase:
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[1], Mapping):
        raise OptionInvalid(f"weights[{number}]={item!r} must be a pair (from_sample, weights by source)")
    from_sample = require_int(item[0], name=f"from_sample of weights[{number}]", minimum=0)
    return Phase(from_sample, _normalised(item[1], names, of=f"weights[{number}] (from sample {from_sample:,})"))


def _normalised(weights: Mapping[str, Number], names: Sequence[str], *, of: str) -> tuple[Fraction, ...]:
    unknown = [name for name in weights if name not in names]
    missing = [name for name in names if name not in weights]
    if unknown:
        raise OptionInvalid(f"{of}: there is no source {unknown[0]!r}; the sources are {', '.join(map(repr, names))}")
    if missing:
        raise OptionInvalid(f"{of}: no weight for {missing[0]!r}; write 0 to leave a source out")
    exact = [_exact(weights[name], name=f"{of}: {name!r}") for name in names]
    total = sum(exact)
    if total == 0:
        raise OptionInvalid(f"{of}: at least one weight must be above 0")
    return tuple(weight / total for weight in exact)


def _exact(weight: object, *, name: str) -> Fraction:
    exact = None
    if isinstance(weight, Rational):
        exact = Fraction(int(weight.numerator), int(weight.denominator))
    elif isinstance(weight, Real) and isfinite(weight):
        exact = Fraction(str(weight))
    if exact is None or exact < 0 or type(weight) is bool:
        raise OptionInvalid(f"{name}: weight {weight!r} must be a number of at least 0")
    return exact


def _require_ascending(phases: Sequence[Phase]) -> None:
    if not phases or phases[0].from_sample != 0:
        raise OptionInvalid(f"weights must begin with a phase from sample 0; they begin {phases[:1]!r}")
    for before, after in pairwise(phases):
        if after.from_sample <= before.from_sample:
            raise OptionInvalid(
                f"phases of weights must ascend: from_sample={after.from_sample:,} stands after {before.from_sample:,}"
            )


def _require_sources(sources: Sequence[SourceRows], phases: Sequence[Phase]) -> None:
    """Check that phases and sources fit together."""
    if not 1 <= len(sources) <= _MAX_SOURCES:
        raise OptionInvalid(f"a mixture of {len(sources):,} sources: it takes 1 to {_MAX_SOURCES:,}")
    _require_ascending(phases)
    for phase in phases:
        if len(phase.weights) != len(sources):
            raise OptionInvalid(
                f"weights from sample {phase.from_sample:,} are {len(phase.weights)} for {len(sources)} sources"
            )
    for number, source in enumerate(sources):
        if source.num_samples == 0 and any(phase.weights[number] for phase in phases):
            raise OptionInvalid(f"source {source.name!r} has no samples; give it weight 0, or leave it out")


# -- how many slots of a block a source has ----------------------------------------------------------------------------


def _radical_inverse(number: int) -> tuple[int, int]:
    """Return (v, bits): the van der Corput number of *number* in base 2 is ``v / 2**bits``."""
    bits = number.bit_length()
    return int(f"{number:b}"[::-1], 2), bits


class _Shares:
    """How many slots each source has in the blocks of a phase. All in whole numbers of any size: exact.

    Args:
        weights: Of each source; sum 1.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        shares = [weight * MIXTURE_BLOCK for weight in weights]
        self._shares = shares
        self._whole = [share.numerator // share.denominator for share in shares]
        parts = [share - whole for share, whole in zip(shares, self._whole, strict=True)]
        self._unit = lcm(*(part.denominator for part in parts))
        self._sums = list(accumulate((int(part * self._unit) for part in parts), initial=0))
        """A_0 … A_S, in units of 1/unit."""

    def in_block(self, block: int) -> Int64Array:
        """Return the slots of each source in block *block*: int64 ``(S,)``, together M."""
        v, bits = _radical_inverse(block)
        ceils = [-((v * self._unit - (a << bits)) // (self._unit << bits)) for a in self._sums]
        return self._with_extras(1, ceils)

    def before(self, block: int) -> Int64Array:
        """Return the slots of each source in all blocks before *block*: int64 ``(S,)``."""
        return self._with_extras(block, [self._ceils(a, block) for a in self._sums])

    def of_source_before(self, source: int, block: int) -> int:
        """Return the same for one source, as large as it may be."""
        extras = self._ceils(self._sums[source + 1], block) - self._ceils(self._sums[source], block)
        return block * self._whole[source] + extras

    def block_of_use(self, source: int, use: int, *, last: int) -> int:
        """Return the block that holds use *use* (from 0) of a source whose weight is above 0.

        If that block lies after *last*, return ``last + 1``.
        """
        share = self._shares[source]
        about = int((use + 1) / share) + 1
        slack = about.bit_length() + 4  # more than 1 + log₂(blocks)/3, the bound of Theory, 6
        lo, hi = max(0, int((use - slack) / share)), int((use + slack) / share) + 1
        if lo > last or (hi > last and self.of_source_before(source, last + 1) <= use):
            return last + 1
        hi = min(hi, last + 1)
        while hi - lo > 1:  # invariant: as many uses before lo as fit, more than *use* before hi
            middle = (lo + hi) // 2
            if self.of_source_before(source, middle) <= use:
                lo = middle
            else:
                hi = middle
        return lo

    def _with_extras(self, num_blocks: int, ceils: Sequence[int]) -> Int64Array:
        counts = [num_blocks * whole + b - a for whole, (a, b) in zip(self._whole, pairwise(ceils), strict=True)]
        return np.array(counts, dtype=np.int64)

    def _ceils(self, a: int, num_blocks: int) -> int:
        """Return Σ ⌈a/unit − u_q⌉ over the q below *num_blocks*."""
        whole, part = divmod(a, self._unit)
        return num_blocks * whole + self._num_below(part, num_blocks)

    def _num_below(self, part: int, num_blocks: int) -> int:
        """Return how many of the q below *num_blocks* have u_q < part/unit."""
        if part == 0:
            return 0
        bits = num_blocks.bit_length()
        first = 0  # the radical inverse of the run's first number, times 2**bits
        found = 0
        for j in reversed(range(bits)):
            if num_blocks >> j & 1:  # the run: 2**j numbers, their u at first/2**bits + t/2**j
                room = ((part << bits) - first * self._unit) << j
                found += -(-room // (self._unit << bits))  # never below 0: the lattice begins below its spacing
                first += 1 << (bits - 1 - j)
        return found


# -- the stream: position → source, use --------------------------------------------------------------------------------


class _Counts(NamedTuple):
    """Slots of each source, int64 ``(S,)``, the same in every lane."""

    in_block: Int64Array
    before: Int64Array
    """In the blocks of the same phase before it."""


class _Table(NamedTuple):
    """One block of one lane."""

    sources: Uint16Array
    """Which source each slot has, ``(M,)``."""
    nth: Uint16Array
    """The number of this use among its source's uses in the block, ``(M,)``, from 0."""
    before: Int64Array
    """Uses of each source in the lane before the block, ``(S,)``."""


class _Stream:
    """The endless stream of a mixture: which source a position has, and which of its samples. See Theory, 2 to 7.

    Blocks are numbered over all phases.
    """

    def __init__(self, phases: Sequence[Phase], settings: MixtureSettings) -> None:
        self.settings = settings
        self.phases = phases
        self.num_sources = len(phases[0].weights)
        self.last_position = _INT64_MAX // settings.lanes
        """Up to here nothing leaves int64."""
        lanes, chunk = settings.lanes, settings.chunk
        self._starts = [min(-(-p.from_sample // (lanes * chunk)) * chunk, _INT64_MAX) for p in phases]
        num_blocks = [-(-(stop - start) // MIXTURE_BLOCK) for start, stop in pairwise(self._starts)]
        self._first_blocks = list(accumulate(num_blocks, initial=0))
        self._starts_array = np.array(self._starts, dtype=np.int64)
        self._first_blocks_array = np.array(self._first_blocks, dtype=np.int64)
        self._shares = [_Shares(phase.weights) for phase in phases]
        self._uses_by_lane: dict[int, list[Int64Array]] = {}
        self._counts: Callable[[int], _Counts] = lru_cache(_SPARE_TABLES)(self._make_counts)
        num_tables = min(lanes, _MOST_TABLES) + _SPARE_TABLES
        self._table: Callable[[int, int], _Table] = lru_cache(num_tables)(self._make_table)

    def at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return the lane, the source and the source's stream sample of each position."""
        lanes, chunk = self.settings.lanes, self.settings.chunk
        chunks, within = np.divmod(positions, chunk)
        rounds, lane = np.divmod(chunks, lanes)
        slots = rounds * chunk + within
        phases = self._starts_array.searchsorted(slots, "right") - 1
        blocks, slots = np.divmod(slots - self._starts_array[phases], MIXTURE_BLOCK)
        blocks += self._first_blocks_array[phases]
        source, sample = np.empty_like(positions), np.empty_like(positions)
        for key, here in _groups(blocks * lanes + lane):
            block, of_lane = divmod(key, lanes)
            table = self._table(of_lane, block)
            at = slots[here]
            source[here] = sources = table.sources[at]
            sample[here] = (table.before[sources] + table.nth[at]) * lanes + of_lane
        return lane, source, sample

    def counts(self, position: int) -> Int64Array:
        """Return how many of the positions before *position* each source has: int64 ``(S,)``."""
        lanes, chunk = self.settings.lanes, self.settings.chunk
        rounds, rest = divmod(position, lanes * chunk)
        total = np.zeros(self.num_sources, dtype=np.int64)
        for lane in range(lanes):
            slot = rounds * chunk + min(max(rest - lane * chunk, 0), chunk)
            total += self._uses_before_slot(lane, slot)
        return total

    # -- finding a use of a source ---------------------------------------------------------------------------------

    def blocks_of_uses(self, source: int, uses: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the block with use ``uses[ℓ]`` of *source* of each lane ℓ, and that use's number in the block.

        The block is −1 where that use never comes, or beyond the last position.
        """
        blocks = np.full(len(uses), -1, dtype=np.int64)
        nth = np.zeros(len(uses), dtype=np.int64)
        left = np.arange(len(uses), dtype=np.int64)
        for phase, shares in enumerate(self._shares):
            before = self._uses_of_source_before_phase(left, source, phase)
            here = np.ones(len(left), dtype=np.bool_)
            if phase + 1 < len(self.phases):
                here = uses[left] < self._uses_of_source_before_phase(left, source, phase + 1)
            if self.phases[phase].weights[source] > 0:
                wanted, which = np.unique((uses[left] - before)[here], return_inverse=True)
                found = [self._block_of_use(shares, source, phase, use) for use in wanted.tolist()]
                pairs = np.array(found, dtype=np.int64).reshape(-1, 2)[which]
                blocks[left[here]], nth[left[here]] = pairs[:, 0], pairs[:, 1]
            left = left[~here]
            if len(left) == 0:
                break
        return blocks, nth

    def first_position(self, block: int) -> int:
        """Return a position at or before all that *block* holds, in any lane."""
        chunk = self.settings.chunk
        return self._first_slot(block) // chunk * chunk * self.settings.lanes

    def stop_position(self, block: int) -> int:
        """Return a position after all that *block* holds, in any lane."""
        chunk = self.settings.chunk
        return ((self._first_slot(block) + MIXTURE_BLOCK - 1) // chunk + 1) * chunk * self.settings.lanes

    def position_of(self, lane: int, block: int, source: int, nth: int) -> int:
        """Return the position of the *nth* use of *source* in *block* of *lane*."""
        within = int(np.flatnonzero(self._table(lane, block).sources == source)[nth])
        rounds, rest = divmod(self._first_slot(block) + within, self.settings.chunk)
        return (rounds * self.settings.lanes + lane) * self.settings.chunk + rest

    def _block_of_use(self, shares: _Shares, source: int, phase: int, use: int) -> tuple[int, int]:
        last = (self.last_position // self.settings.lanes - self._starts[phase]) // MIXTURE_BLOCK - 1
        block = shares.block_of_use(source, use, last=last)
        if block > last:
            return -1, 0
        return self._first_blocks[phase] + block, use - shares.of_source_before(source, block)

    # -- blocks, phases --------------------------------------------------------------------------------------------

    def _phase_of(self, block: int) -> int:
        return bisect_right(self._first_blocks, block) - 1

    def _first_slot(self, block: int) -> int:
        phase = self._phase_of(block)
        return self._starts[phase] + (block - self._first_blocks[phase]) * MIXTURE_BLOCK

    def _make_counts(self, block: int) -> _Counts:
        phase = self._phase_of(block)
        number = block - self._first_blocks[phase]
        return _Counts(self._shares[phase].in_block(number), self._shares[phase].before(number))

    def _make_table(self, lane: int, block: int) -> _Table:
        counts = self._counts(block)
        sources = self._sources_of(lane, block)
        nth = np.empty(MIXTURE_BLOCK, dtype=np.uint16)
        starts = counts.in_block.cumsum() - counts.in_block
        nth[sources.argsort(kind="stable")] = np.arange(MIXTURE_BLOCK) - starts.repeat(counts.in_block)
        before = self._uses_before_phase(lane, self._phase_of(block)) + counts.before
        return _Table(sources, nth, before)

    def _sources_of(self, lane: int, block: int) -> Uint16Array:
        """Return the source of each slot of *block* in *lane*."""
        in_list = np.arange(self.num_sources, dtype=np.uint16).repeat(self._counts(block).in_block)
        return in_list[
            keyed_permutation(
                MIXTURE_BLOCK, seed=self.settings.seed, epoch=0, draw=Draw.MIXTURE, lane=lane, block=block
            )
        ]

    def _uses_before_slot(self, lane: int, slot: int) -> Int64Array:
        """Return how often *lane* uses each source in its slots before *slot*: int64 ``(S,)``."""
        phase = bisect_right(self._starts, slot) - 1
        return self._uses_before_phase(lane, phase) + self._uses_in_phase(lane, phase, slot - self._starts[phase])

    def _uses_before_phase(self, lane: int, phase: int) -> Int64Array:
        """Return how often *lane* uses each source before *phase*: int64 ``(S,)``."""
        known = self._uses_by_lane.get(lane, [np.zeros(self.num_sources, dtype=np.int64)])
        if len(known) <= phase:
            known = known.copy()  # another thread may read the old list, or extend it too
            for last in range(len(known) - 1, phase):
                length = self._starts[last + 1] - self._starts[last]
                known.append(known[-1] + self._uses_in_phase(lane, last, length))
            self._uses_by_lane[lane] = known
        return known[phase]

    def _uses_of_source_before_phase(self, lanes: Int64Array, source: int, phase: int) -> Int64Array:
        """Return how often each of *lanes* uses *source* before *phase*: int64, of the same length."""
        if phase == 0:
            return np.zeros(len(lanes), dtype=np.int64)
        uses = [self._uses_before_phase(lane, phase)[source] for lane in lanes.tolist()]
        return np.array(uses, dtype=np.int64)

    def _uses_in_phase(self, lane: int, phase: int, num_slots: int) -> Int64Array:
        """Return how often *lane* uses each source in the first *num_slots* slots of *phase*: int64 ``(S,)``."""
        whole, rest = divmod(num_slots, MIXTURE_BLOCK)
        uses = self._shares[phase].before(whole)
        if rest:
            cut = self._sources_of(lane, self._first_blocks[phase] + whole)[:rest]
            uses += np.bincount(cut, minlength=self.num_sources)
        return uses


def _groups(keys: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """Yield each key once, ascending, with where it stands in *keys*. Fast if equal keys stand in runs."""
    if len(keys) == 0:
        return
    begins = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1])
    lengths = np.diff(begins, append=len(keys))
    by_key = keys[begins].argsort(kind="stable")
    begins, lengths = begins[by_key], lengths[by_key]
    stops = lengths.cumsum()
    places = (begins - (stops - lengths)).repeat(lengths) + np.arange(len(keys))
    run_keys = keys[begins]
    last = np.flatnonzero(np.append(run_keys[1:] != run_keys[:-1], True))
    start = 0
    for key, stop in zip(run_keys[last].tolist(), stops[last].tolist(), strict=True):
        yield key, places[start:stop]
        start = stop


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


class _Use(NamedTuple):
    """A use of a source in a lane, as far as it is found without a block table."""

    block: int
    lane: int
    source: int
    nth: int


def _uses_per_epoch(source: SourceRows, lanes: int) -> Int64Array:
    """Return how many samples of the source's first epoch each lane takes: the i with i·K + ℓ < N."""
    rounds, rest = divmod(source.num_samples, lanes)
    uses = np.full(lanes, rounds, dtype=np.int64)
    uses[:rest] += 1
    return uses


def _found_uses(stream: _Stream, source: int, lanes: Int64Array, uses: Int64Array) -> Iterable[_Use]:
    """Return where each lane of *lanes* comes to its use *uses* of *source*."""
    blocks, nth = stream.blocks_of_uses(source, uses)
    return map(_Use, blocks[lanes].tolist(), lanes.tolist(), (source,) * len(lanes), nth[lanes].tolist())


def _first_exhausted(sources: Sequence[SourceRows], stream: _Stream) -> int:
    lanes = np.arange(stream.settings.lanes, dtype=np.int64)
    uses: list[_Use] = []
    for number, source in enumerate(sources):
        found = _found_uses(stream, number, lanes, _uses_per_epoch(source, len(lanes)))
        uses += (use for use in found if use.block >= 0)
    first = stream.last_position + 1
    for use in sorted(uses):
        if stream.first_position(use.block) >= first:
            break
        first = min(first, stream.position_of(use.lane, use.block, use.source, use.nth))
    if first > stream.last_position:
        raise OptionInvalid('stop="first_exhausted" would come after more positions than fit 64 bits')
    return first


def _all_exhausted(sources: Sequence[SourceRows], stream: _Stream) -> int:
    uses: list[_Use] = []
    for number, source in enumerate(sources):
        per_epoch = _uses_per_epoch(source, stream.settings.lanes)
        found = list(_found_uses(stream, number, np.flatnonzero(per_epoch), np.maximum(per_epoch - 1, 0)))
        if any(use.block < 0 for use in found):
            raise OptionInvalid(
                f'stop="all_exhausted" would never come: the weight of source {source.name!r} is 0, or next to 0, '
                f"before its {source.num_samples:,} samples are used; raise it, or leave the source out"
            )
        uses += found
    last = -1
    for use in sorted(uses, reverse=True):
        if stream.stop_position(use.block) <= last:
            break
        last = max(last, stream.position_of(use.lane, use.block, use.source, use.nth))
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
        for number, here in _groups_of_sources(source):
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

        int64 ``(num_sources,)``, exact; *position* from 0 to ``num_samples``. Costs a block table a lane.
        """
        return self._stream.counts(self._start + position)

    def rows_at(self, positions: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
        """Return the source, the source's epoch, the shard and the row in it of each position: int64 ``(n,)`` each.

        For tests, inspection and provenance. O(rows of the source blocks touched).
        """
        source, sample = self.sources_at(positions)
        epochs, shards, rows = np.empty_like(source), np.empty_like(source), np.empty_like(source)
        for number, here in _groups_of_sources(source):
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
            f"phases={len(self._stream.phases)}, seed={s.seed}, lanes={s.lanes}, chunk={s.chunk})"
        )


def _groups_of_sources(source: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """Yield each source once, with where it stands; neighbours are seldom equal, so this sorts by radix."""
    order = source.astype(np.uint16).argsort(kind="stable")
    numbers, counts = np.unique(source, return_counts=True)
    stop = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        yield number, order[stop : stop + count]
        stop += count
