"""Mixture: several datasets, drawn from by weight, as one iterable in one exact order."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
import xxhash

from streamshards.dataset import StreamingDataset
from streamshards.engine.eviction import Pass
from streamshards.engine.labels import Labels
from streamshards.engine.prefetch import BatchStream
from streamshards.engine.source import Source
from streamshards.epochs import EpochDataset, Sample
from streamshards.errors import OptionInvalid
from streamshards.events import Event, Observer, summarize
from streamshards.options import OrderOptions, PrefetchOptions, require_options
from streamshards.plan.assignment import Assignment
from streamshards.plan.mixture import (
    MIXTURE_BLOCK,
    MixtureOrder,
    MixtureSettings,
    SourceRows,
    Stop,
    earliest_change,
    pass_length,
    settled_phases,
)
from streamshards.plan.order import OrderSettings, resolve_order
from streamshards.plan.state import State
from streamshards.plan.topology import Topology
from streamshards.plan.weights import Phase, Weights, parse_weights
from streamshards.runtime import RankSource
from streamshards.shard.columns import Columns
from streamshards.shard.schema import Schema, unite
from streamshards.starts import Start

_ROUNDS: Final = 32
"""Rounds (samples: lanes times chunk) that a pass has at least, by default, if it ends with a source."""
_MAX_LANES: Final = 1 << 16
"""Finding where a mixture stops, and counting, costs about 50 µs a lane."""


class Mixture(EpochDataset):
    """Several datasets as one: of every 1,000 samples of a lane, each source has its share, to within one sample.

    Each source is read in its own shuffled order, each of its samples once, before its next epoch begins with
    another shuffle. An epoch of the mixture is called a *pass* here: it ends by ``stop``, and the next pass goes on
    with each source where the last one ended.

    Args:
        sources: Datasets by name. What they say about columns, shuffle, seed, retry, corrupt shards and storage holds;
            batches, order and ranks are the mixture's business. ``ds.take(n)`` and the like may be sources.
        weights: A number for each name, of any sum: ``{"web": 0.7, "code": 0.3}``. A list of ``(from_sample,
            weights)``, the first from 0, changes them: from the first whole round of lanes × chunk samples (by default
            one step of all workers) at or after that many samples, counted over all ranks and passes. A resume refuses
            other weights for what lies behind; those ahead may change, if ``stop`` is a number.
        stop: When a pass ends: before the first sample that a source repeats (``"first_exhausted"``), once every
            sample of every source has come (``"all_exhausted"``), or after a number of samples. The first two
            depend on lanes and chunk: the first lane to be through a source ends the pass, so the longer the lanes, the
            less is missing of what could have come. By default there are so few that it is a few percent at most; the
            length is known exactly to the loader, or with ``OrderOptions(lanes=…)``.
        batch_size: Samples in a batch of one rank. By default what all sources say.
        seed: Of which place of the 1,000 is whose; the same on all ranks.
        transform: Applied to each sample, as in StreamingDataset.
        batch_transform: Applied to each batch.
        tail: As in StreamingDataset.
        order: As in StreamingDataset; ``shuffle_block`` is in samples of any source.
        topology: As in StreamingDataset.
        prefetch: Memory and threads for all sources together.
        observer: Receives each event of every source.
        with_keys: As in StreamingDataset; shard, row and epoch are the source's, position is the mixture's.
        with_mask: As in StreamingDataset.

    Raises:
        OptionInvalid: An argument cannot be what it is, or the sources' fields don't fit together.

    Each sample says where it comes from: ``"source"`` is its number in ``mix.names``; in a batch, int64 ``(batch,)``.
    A field that a source does not have is absent there: None, or zeros where ``"name?"`` is False.
    """

    def __init__(
        self,
        sources: Mapping[str, StreamingDataset],
        *,
        weights: Weights,
        stop: Stop = "first_exhausted",
        batch_size: int | None = None,
        seed: int = 0,
        transform: Callable[[Sample], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        tail: Literal["pad", "drop", "uneven"] = "pad",
        order: OrderOptions | None = None,
        topology: RankSource = None,
        prefetch: PrefetchOptions | None = None,
        observer: Observer | None = None,
        with_keys: bool = False,
        with_mask: bool = False,
    ) -> None:
        _require_sources(sources)
        super().__init__(
            batch_size=_batch_size(sources) if batch_size is None else batch_size,
            shuffle=True,
            seed=seed,
            transform=transform,
            batch_transform=batch_transform,
            tail=tail,
            labels=Labels(keys=with_keys, mask=with_mask, source=True),
            topology=topology,
            prefetch=prefetch,
            observer=observer,
        )
        self._sources = dict(sources)
        self._order = require_options(order, OrderOptions, name="order")
        self._phases = parse_weights(weights, self.names)
        self._stop = stop
        self._schema = unite({name: source.schema for name, source in sources.items()})
        self._labels.require_free(self._schema, url=self.url)
        self._lengths: dict[tuple[int, int], int] = {}
        self._num_samples_of(Start(0, 0, 0, None), Topology())  # refuses what cannot be, before anything starts

    def _own(self) -> None:
        super()._own()
        for source in self._sources.values():
            source._own()

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The sources' names and urls, for messages."""
        return f"Mixture({', '.join(f'{name}={source.url}' for name, source in self._sources.items())})"

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names; ``"source"`` in a sample is a number in this tuple."""
        return tuple(self._sources)

    @property
    def sources(self) -> Mapping[str, StreamingDataset]:
        """The sources by name; ``mix.sources[name].stats()`` counts what was read of each."""
        return MappingProxyType(self._sources)

    @property
    def schema(self) -> Schema:
        """The fields of a sample: those of all sources."""
        return self._schema

    @property
    def num_samples(self) -> int:
        """Samples of a whole pass, over all ranks."""
        return self._num_samples_of(self._start.peek(), self._rank())

    def source_counts(self, state: Mapping[str, Any] | None = None) -> dict[str, int]:
        """Return how many samples each source has given, over all ranks and passes, up to *state*; None: to here.

        Exact, and the same on every rank: it follows from the place alone.

        Args:
            state: Of this mixture, as ``state_dict`` returns it; that of a StreamingDataLoader knows where it is.

        Raises:
            ResumeMismatch: It is not a state of this mixture.
        """
        start = self._checked(self.state_dict() if state is None else state, strict=True, num_workers=1)
        assert start.order is not None  # a state always has one
        order = self._mixture_order(start.order, start.epoch, self._num_samples_of(start, Topology()))
        return dict(zip(self.names, order.counts(start.position).tolist(), strict=True))

    def stats(self) -> dict[str, int | float]:
        """Return what has been counted, over all sources, this rank's process and all its workers."""
        distinct = {id(source): source._counts for source in self._sources.values()}  # one may have two names
        return summarize(torch.cat([self._counts, *distinct.values()]))

    def __repr__(self) -> str:
        start = self._start.peek()
        weights = ", ".join(f"{name}: {weight:.4g}" for name, weight in self._weights_at(0).items())
        return (
            f"Mixture({{{weights}}}, stop={self._stop!r}, batch_size={self.batch_size}, seed={self.seed}, "
            f"next epoch={start.epoch} from {start.position:,})"
        )

    # -- for EpochDataset ------------------------------------------------------------------------------------------

    def _num_samples_of(self, start: Start, topology: Topology) -> int:
        order = self._settings(start, topology)
        key = (order.lanes, order.chunk)
        if key not in self._lengths:
            if order.lanes > _MAX_LANES:
                raise OptionInvalid(f"{self.url}: lanes={order.lanes:,}; a mixture has at most {_MAX_LANES:,}")
            shape = MixtureSettings(seed=self.seed, lanes=order.lanes, chunk=order.chunk)
            self._lengths[key] = pass_length(self._stop, self._rows(order.shuffle_block), self._phases, shape)
        return self._lengths[key]

    def _first_order(self, start: Start, topology: Topology) -> OrderSettings:  # noqa: ARG002 -- the same for all
        row_bytes = max(
            int(source._index.raw_sizes.sum()) // max(1, source._index.num_samples) for source in self._sources.values()
        )
        num_samples = sum(source.num_samples for source in self._sources.values())
        options = self._order
        if isinstance(self._stop, int):
            num_samples = min(num_samples, self._stop)
        elif options.lanes is None:
            # Where a source ends, each lane has given its share only to within a part of a block; the first to be
            # through ends the pass. So lanes must be long, and a round of them short, for little to be missing.
            options = replace(options, lanes=max(1, min(topology.num_readers, num_samples // (2 * MIXTURE_BLOCK))))
        if not isinstance(self._stop, int) and options.chunk is None:
            chunk = self.batch_size or 1
            while chunk > 1 and (options.lanes or 1) * chunk * _ROUNDS > num_samples:
                chunk = -(-chunk // 2)
            options = replace(options, chunk=chunk)
        return resolve_order(
            options,
            shuffle=True,
            seed=self.seed,
            num_samples=num_samples,
            # A reader holds blocks of every source side by side: together they take what one dataset's would.
            raw_bytes=row_bytes * len(self._sources) * num_samples,
            global_batch=(self.batch_size or 1) * topology.world_size,
            topology=topology,
        )

    def _identity(self, start: Start) -> dict[str, Any]:
        sources = {name: _identity_of(source) for name, source in self._sources.items()}
        settled = self._settled_phases(start)
        return {
            "kind": "mixture",
            "fingerprint": self._fingerprint(settled),
            "stop": self._stop,
            "weights": {name: float(weight) for name, weight in zip(self.names, settled[-1].weights, strict=True)},
            "sources": sources,
        }

    def _fingerprint(self, settled: Sequence[Phase]) -> str:
        sources = [(name, _identity_of(source)) for name, source in self._sources.items()]
        exact = [[phase.from_sample, [str(weight) for weight in phase.weights]] for phase in settled]
        return _digest([self._stop, sources, exact])

    def _named(self, state: State) -> State:
        return replace(
            state, identity=self._identity(Start(state.epoch, state.position, state.worker_batches, state.order))
        )

    def _advice(self, loaded: State, differences: Mapping[str, Any]) -> str:
        if any(name.split(".")[0] not in ("fingerprint", "weights") for name in differences):
            return "Open the mixture as it was then: sources, seed, stop, and the weights up to this place"
        shape = MixtureSettings(seed=self.seed, lanes=loaded.order.lanes, chunk=loaded.order.chunk)
        at = loaded.epoch * loaded.num_samples + loaded.position
        old = self._phases[: max(1, settled_phases(self._phases, shape, at) - 1)]
        if len(old) < len(self._phases) and loaded.identity["fingerprint"] == self._fingerprint(old):
            early, earliest = self._phases[len(old)].from_sample, earliest_change(old, shape, at)
            return f"The weights from sample {early} begin too early: they can from sample {earliest} on"
        return "The sources stood in another order, or had other weights before this place, and those stay as they were"

    def _settled_phases(self, start: Start) -> Sequence[Phase]:
        """Return the weights that have had a part in the stream before *start*; later ones may change."""
        order = start.order
        assert order is not None  # a state always has one
        num_samples = self._num_samples_of(start, Topology())
        # How far a single worker is within its pass does not follow from its batches alone: all of it counts.
        at = start.epoch * num_samples + (num_samples if start.batches else start.position)
        shape = MixtureSettings(seed=order.seed, lanes=order.lanes, chunk=order.chunk)
        return self._phases[: settled_phases(self._phases, shape, at)]

    def _weights_at(self, sample: int) -> dict[str, float]:
        phase = [phase for phase in self._phases if phase.from_sample <= sample][-1]
        return {name: float(weight) for name, weight in zip(self.names, phase.weights, strict=True)}

    def _rows(self, shuffle_block: int) -> list[SourceRows]:
        return [
            SourceRows(
                name,
                source._subset.rows,
                source.shuffle,
                source.seed,
                source._order.shuffle_block or shuffle_block,
                source._subset.shards,
            )
            for name, source in self._sources.items()
        ]

    def _mixture_order(self, order: OrderSettings, epoch: int, num_samples: int) -> MixtureOrder:
        shape = MixtureSettings(seed=order.seed, lanes=order.lanes, chunk=order.chunk)
        rows = self._rows(order.shuffle_block)
        return MixtureOrder(rows, self._phases, shape, epoch=epoch, num_samples=num_samples)

    def _open(
        self, state: State, start: Start, assignment: Assignment, slot: int, convert: Callable[[Columns], Any]
    ) -> BatchStream[Any]:
        cancelled = threading.Event()
        lanes, chunk = state.order.lanes, state.order.chunk
        if lanes > state.num_samples:  # no state of it could be loaded
            raise OptionInvalid(
                f"{self.url}: a pass of {state.num_samples:,} samples is too short for {lanes:,} lanes; "
                "use fewer (OrderOptions.lanes; by default one for each reader), or let it stop later"
            )
        kept = (shards for source in self._sources.values() for shards in source._kept(source._view(start)))
        reader = Pass(tuple(kept), self._begin_pass(slot))
        return self._reading(
            self._mixture_order(state.order, state.epoch, state.num_samples),
            assignment,
            period=lanes * chunk * -(-MIXTURE_BLOCK // chunk),
            sources=[self._opened(source, start, reader, cancelled, slot) for source in self._sources.values()],
            schema=self._schema,
            skip=state.worker_batches,
            cancelled=cancelled,
            slot=slot,
        ).open(convert)

    def _opened(
        self, source: StreamingDataset, start: Start, reader: Pass, cancelled: threading.Event, slot: int
    ) -> Source:
        """Return *source* as the engine reads it: in the mixture's form of its fields, its events told to both."""
        fields = tuple(field for field in self._schema.fields if source.schema.field(field.path) is not None)
        of_source = source._emitter(slot)
        observer = self._observer

        def emit(event: Event) -> None:
            of_source(event)
            if observer is not None:
                observer(event)

        return source._source(source._view(start), Schema(fields, source.schema.empty), reader, cancelled, slot, emit)


def _require_sources(sources: object) -> None:
    if not isinstance(sources, Mapping) or not sources:
        raise OptionInvalid('a Mixture takes a dict of datasets by name: {"web": ds_a, "code": ds_b}')
    for name, source in sources.items():
        if not isinstance(name, str) or not name:
            raise OptionInvalid(f"sources: {name!r} must be a name")
        if isinstance(source, Mixture):
            raise OptionInvalid(
                f"source {name!r} is a Mixture itself: give its sources to this one, with their weights multiplied"
            )
        if not isinstance(source, StreamingDataset):
            raise OptionInvalid(f"source {name!r} is a {type(source).__name__}, not a StreamingDataset")
        if source._transform is not None or source._batch_transform is not None:
            raise OptionInvalid(
                f"source {name!r} has a transform: give it to the Mixture, where sample['source'] tells sources apart"
            )
        if source._labels:
            raise OptionInvalid(f"source {name!r} has with_keys or with_mask: give them to the Mixture")
        if source._order.lanes is not None or source._order.chunk is not None:
            raise OptionInvalid(f"source {name!r} has OrderOptions with lanes or chunk: give them to the Mixture")


def _batch_size(sources: Mapping[str, StreamingDataset]) -> int | None:
    sizes = {source.batch_size for source in sources.values()}
    if len(sizes) > 1:
        said = ", ".join(f"{name!r} {source.batch_size}" for name, source in sources.items())
        raise OptionInvalid(f"the sources have different batch sizes ({said}): say batch_size to the Mixture")
    return sizes.pop()


def _identity_of(source: StreamingDataset) -> dict[str, Any]:
    block = source._order.shuffle_block
    return {
        **source._identity(Start(0, 0, 0, None)),
        "num_samples": source.num_samples,
        "seed": source.seed,
        "shuffle": source.shuffle,
        **({"shuffle_block": block} if block is not None else {}),
    }


def _digest(value: Sequence[object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
