"""StreamingDataset: shards in a store, as an iterable of samples or batches in one exact order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from operator import index as whole_number
from typing import Any, Final, Literal, TypeVar

from streamshards.clock import unix_ns
from streamshards.engine.access import RandomAccess
from streamshards.engine.blocks import loaded_sizes
from streamshards.engine.cache import NodeCache
from streamshards.engine.cachefolder import CacheFolder
from streamshards.engine.catalog import load_index
from streamshards.engine.eviction import Pass, Shards
from streamshards.engine.fetch import Fetcher
from streamshards.engine.labels import Labels
from streamshards.engine.prefetch import BatchStream
from streamshards.engine.source import LossPolicy, Source
from streamshards.epochs import EpochDataset, Sample
from streamshards.errors import OptionInvalid
from streamshards.events import Counters, Event, Observer
from streamshards.options import (
    CacheOptions,
    GiB,
    OrderOptions,
    PrefetchOptions,
    RetryOptions,
    require_int,
    require_options,
)
from streamshards.plan.assignment import Assignment
from streamshards.plan.index import Index
from streamshards.plan.order import EpochOrder, OrderSettings, resolve_order
from streamshards.plan.state import State
from streamshards.plan.subset import Cut, Skip, Subset, Take, require_split
from streamshards.plan.topology import Topology
from streamshards.runtime import RankSource, cache_directory, current_slot
from streamshards.shard.columns import Columns, to_samples
from streamshards.shard.payload import FramedShard
from streamshards.shard.reader import ShardReader
from streamshards.shard.schema import Schema
from streamshards.starts import Start
from streamshards.storage import open_store

_MAX_SHARD_RAW_BYTES: Final = 64 * GiB
"""``open_shard`` has no index that says how large a shard may be."""

DatasetT = TypeVar("DatasetT", bound="StreamingDataset")


@dataclass(frozen=True, slots=True)
class _View:
    """The dataset as one epoch reads it: as it is, or as it was before shards were appended."""

    index: Index
    subset: Subset


class StreamingDataset(EpochDataset):
    """The samples of a dataset in one global order that never depends on the cluster's shape.

    Iterating starts the next epoch: 0, 1, 2, … or what ``set_epoch`` or ``load_state_dict`` said. Threads in the
    background fetch, verify, decode and shuffle; leaving the loop early stops them.

    Args:
        url: A local folder, ``s3://bucket/prefix``, ``memory://x``, or anything else that fsspec knows.
        batch_size: Samples in a batch of one rank. None yields single samples: dicts of tensors and Python values.
        shuffle: Permute the shards, and the rows within blocks of shards, anew in each epoch.
        seed: Of the shuffle; the same on all ranks.
        columns: Names of the fields to read: ``["image", "meta.id"]``; a nested dict's name takes all of it.
        transform: Applied to each sample, on the thread that iterates. With a batch size, the results are collated by
            ``torch.utils.data.default_collate``.
        batch_transform: Applied to each batch, on the thread that iterates.
        tail: What becomes of the last, short global batch. ``"pad"``: filled with the epoch's first samples;
            ``"drop"``: left out; ``"uneven"``: given out short, some ranks get one batch less (evaluation).
        on_corrupt: ``"skip"`` refills the rows of a corrupt or missing shard from its block, and logs an error;
            ``"raise"`` raises.
        max_corrupt: With "skip": the part of an epoch's samples that one reader may lose before ``TooManyCorrupt``;
            one shard may always be lost, unless this is 0.
        order: What shapes the order besides the seed.
        topology: This process's data-parallel rank; by default from ``torch.distributed`` or the environment. Also a
            one-dimensional ``DeviceMesh``, ``mesh["dp"]``, or a function that returns a Topology, asked when needed.
        retry: How long a store may fail.
        prefetch: Memory and threads.
        cache: Keep shards on this machine's disk; shared by all ranks, workers and jobs. None: no cache.
        storage_options: For fsspec: ``{"endpoint_url": …, "key": …, "secret": …}``, ``{"anon": True}``.
        observer: Receives each :mod:`streamshards.events` value, on the thread where it happened.
        trust_pickle: Let foreign ``.pt`` files run code when they are loaded. Shards of our own never do.
        with_keys: Add to each sample, as ``"key"``, a dict of where it comes from: ``"shard"`` and ``"row"`` in
            ``ds.index``, and the ``"epoch"`` and ``"position"`` in the global order at which it is delivered.
        with_mask: Add to each sample, as ``"mask"``, whether it is one: False where ``tail="pad"`` filled up the last
            global batch.

    Raises:
        IndexInvalid: There is no dataset at *url*, or its index does not hold.
        StoreUnavailable: The store did not answer within ``retry.first_contact_s``.
        AccessDenied: The store refused us.
        OptionInvalid: An argument cannot be what it is.

    In a batch: a tensor field is ``(batch, *shape)``; a field whose size varies is a list of tensors; str, bytes and
    JSON are lists; an optional tensor field comes with a bool mask named ``"name?"``.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        columns: Sequence[str] | None = None,
        transform: Callable[[Sample], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        tail: Literal["pad", "drop", "uneven"] = "pad",
        on_corrupt: Literal["skip", "raise"] = "skip",
        max_corrupt: float = 0.01,
        order: OrderOptions | None = None,
        topology: RankSource = None,
        retry: RetryOptions | None = None,
        prefetch: PrefetchOptions | None = None,
        cache: CacheOptions | None = None,
        storage_options: Mapping[str, Any] | None = None,
        observer: Observer | None = None,
        trust_pickle: bool = False,
        with_keys: bool = False,
        with_mask: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            transform=transform,
            batch_transform=batch_transform,
            tail=tail,
            labels=Labels(keys=with_keys, mask=with_mask),
            topology=topology,
            prefetch=prefetch,
            observer=observer,
        )
        if on_corrupt not in ("skip", "raise"):
            raise OptionInvalid(f'on_corrupt={on_corrupt!r} must be "skip" or "raise"')
        if isinstance(max_corrupt, bool) or not isinstance(max_corrupt, (int, float)) or not 0 <= max_corrupt <= 1:
            raise OptionInvalid(f"max_corrupt={max_corrupt!r} must be a part of the epoch, from 0 to 1")
        self._on_corrupt = on_corrupt
        self._max_corrupt = max_corrupt
        self._order = require_options(order, OrderOptions, name="order")
        self._retry = require_options(retry, RetryOptions, name="retry")
        self._cache_options = None if cache is None else require_options(cache, CacheOptions, name="cache")
        self._trust_pickle = trust_pickle
        if isinstance(url, (list, tuple, Mapping)):
            raise OptionInvalid(f"url={url!r} must be one url; to read several datasets together, use Mixture")
        self._store = open_store(url, storage_options)
        self._index = load_index(
            self._store,
            retry=self._retry,
            clock=self._clock,
            cancelled=threading.Event(),
            on_retry=self._emitter(0),
        )
        self._full_schema = Schema.from_json(self._index.schema)
        if columns is not None and not columns:
            raise OptionInvalid("columns=[] selects nothing; leave it out for all columns, or name some")
        self._schema = self._full_schema if columns is None else self._full_schema.select(columns)
        self._labels.require_free(self._schema, url=self.url)
        self._choose(())

    def _choose(self, cuts: Sequence[Cut]) -> None:
        """Consist of what *cuts* leave of the dataset."""
        self._subset = Subset(self._index.rows, cuts)
        self._earlier: dict[int, _View] = {}
        # A small part of a dataset has as many lanes as it can; a whole one says so at once.
        if not cuts and self._order.lanes is not None and self._order.lanes > max(1, self.num_samples):
            raise OptionInvalid(
                f"lanes={self._order.lanes:,} is more than the {self.num_samples:,} samples of {self.url}"
            )

    def _forget_process(self) -> None:
        super()._forget_process()
        self._access: RandomAccess | None = None
        self._cache: NodeCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_access": None, "_cache": None}

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where the dataset is, without credentials."""
        return self._store.url

    @property
    def index(self) -> Index:
        """The index that was read when this dataset was opened; it stays the same however long this object lives."""
        return self._index

    @property
    def schema(self) -> Schema:
        """The fields of a sample, as selected by ``columns``."""
        return self._schema

    @property
    def num_samples(self) -> int:
        """Samples of the whole dataset, or of the part of it that ``take``, ``skip`` and ``split`` left."""
        return self._subset.num_samples

    def __getitem__(self, number: int) -> Any:
        """Return sample *number* in the order of the index, after ``transform``; negative numbers count from the end.

        For inspection and map-style use: the frames of one shard that hold the sample are fetched and decoded; the
        whole shard if it is small, or goes through the node cache.

        Raises:
            IndexError: There is no such sample.
            ShardCorrupt: Its shard is bad.
        """
        try:
            number = whole_number(number)
        except TypeError:
            raise TypeError(f"ds[i] takes a whole number, not {number!r}") from None
        if not -self.num_samples <= number < self.num_samples:
            raise IndexError(f"sample {number} of {self.num_samples:,} in {self.url}")
        self._own()
        if self._access is None:
            slot = current_slot()
            whole = Pass(self._kept(_View(self._index, self._subset)), unix_ns())
            fetcher = self._fetcher(self._index, whole, threading.Event(), slot, self._emitter(slot))
            self._access = RandomAccess(fetcher, self._schema, self._subset)
        reader, row = self._access.find(number % self.num_samples)
        (sample,) = to_samples(reader.columns(self._schema, row, row + 1))
        return sample if self._transform is None else self._transform(sample)

    def __repr__(self) -> str:
        start = self._start.peek()
        part = f".{self._subset.name}" if self._subset.cuts else ""
        return (
            f"StreamingDataset({self.url!r}, samples={self.num_samples:,}, shards={len(self._subset.shards):,}, "
            f"batch_size={self.batch_size}, shuffle={self.shuffle}, seed={self.seed}, "
            f"next epoch={start.epoch} from {start.position:,}){part}"
        )

    # -- parts of it -----------------------------------------------------------------------------------------------

    def take(self: DatasetT, n: int) -> DatasetT:
        """Return a dataset of the first *n* samples, in the order of the index; of all, if there are fewer.

        It is the same *n* samples in every epoch, whatever the shuffle: ``take`` and ``skip`` share none.
        """
        return self._cut(Take(require_int(n, name="take", minimum=0)))

    def skip(self: DatasetT, n: int) -> DatasetT:
        """Return a dataset of all but the first *n* samples, in the order of the index."""
        return self._cut(Skip(require_int(n, name="skip", minimum=0)))

    def split(
        self: DatasetT, fraction: float, *, seed: int = 0, by: Literal["sample", "shard"] = "sample"
    ) -> tuple[DatasetT, DatasetT]:
        """Return two datasets that share no sample and together hold all: ``train, valid = ds.split(0.9)``.

        Args:
            fraction: Of the samples that the first one gets: ``floor(fraction * num_samples)`` of them.
            seed: Which samples.
            by: ``"sample"`` draws from each shard its share, so that both sides look alike, and both read every shard
                whole; shards that are appended leave every sample on its side. ``"shard"`` draws whole shards (and cuts
                one), so that each side reads its own shards only, and samples packed side by side stay on one side;
                an append makes another draw.
        """
        first, second = require_split(fraction, seed=seed, by=by)
        return self._cut(first), self._cut(second)

    def _cut(self: DatasetT, cut: Cut) -> DatasetT:
        """Return the same dataset anew, at the beginning of epoch 0, with *cut* applied."""
        part = copy(self)
        part._begin_life()
        part._choose((*self._subset.cuts, cut))
        return part

    # -- for EpochDataset ------------------------------------------------------------------------------------------

    def _view(self, start: Start) -> _View:
        """Return the dataset as the epoch that begins at *start* reads it."""
        count = start.num_shards
        if not count or count == self._index.num_shards:
            return _View(self._index, self._subset)
        if count not in self._earlier:
            index = self._index.head(count)
            self._earlier[count] = _View(index, Subset(index.rows, self._subset.cuts))
        return self._earlier[count]

    def _identity(self, start: Start) -> dict[str, Any]:
        index = self._view(start).index
        subset = {"subset": self._subset.name} if self._subset.cuts else {}
        return {"fingerprint": index.fingerprint, "num_shards": index.num_shards, **subset}

    def _num_samples_of(self, start: Start, topology: Topology) -> int:  # noqa: ARG002 -- a mixture needs it
        return self._view(start).subset.num_samples

    _forgiven = "shards appended since, if they changed no field, and "

    def _advice(self, loaded: State, differences: Mapping[str, Any]) -> str:
        if "subset" in differences:
            theirs = loaded.identity.get("subset")
            return f"Take the same part as then: {'all of it' if theirs is None else str(theirs)[:200]}"
        return super()._advice(loaded, differences)

    def _start_of_other(self, loaded: State, differences: Mapping[str, Any]) -> Start | None:
        """Return where to go on from a state of this dataset before shards were appended to it."""
        count = loaded.identity.get("num_shards")
        grown = {"num_samples", "num_shards", "fingerprint"}
        if not set(differences) <= grown or type(count) is not int or not 0 < count < self._index.num_shards:
            return None
        start = Start(loaded.epoch, loaded.position, loaded.worker_batches, loaded.order, count)
        is_prefix = not loaded.differences(self._state(Start(0, 0, 0, None, count), Topology()))
        return start if is_prefix else None

    def _first_order(self, start: Start, topology: Topology) -> OrderSettings:
        view = self._view(start)
        index, subset = view.index, view.subset
        return resolve_order(
            self._order,
            shuffle=self.shuffle,
            seed=self.seed,
            num_samples=subset.num_samples,
            # Not of the selected columns: the order must not depend on which are read.
            raw_bytes=int(loaded_sizes(index, self._full_schema)[subset.shards].sum()),
            global_batch=(self.batch_size or 1) * topology.world_size,
            topology=topology,
        )

    def _open(
        self, state: State, start: Start, assignment: Assignment, slot: int, convert: Callable[[Columns], Any]
    ) -> BatchStream[Any]:
        view = self._view(start)
        cancelled = threading.Event()
        emit = self._emitter(slot)
        reader = Pass(self._kept(view), self._begin_pass(slot))
        return self._reading(
            EpochOrder(view.subset.rows, state.order, state.epoch, shards=view.subset.shards),
            assignment,
            period=state.order.lanes * state.order.chunk,
            sources=[self._source(view, self._schema, reader, cancelled, slot, emit)],
            schema=self._schema,
            skip=state.worker_batches,
            cancelled=cancelled,
            slot=slot,
        ).open(convert)

    def _source(
        self,
        view: _View,
        schema: Schema,
        reader: Pass,
        cancelled: threading.Event,
        slot: int,
        emit: Callable[[Event], None],
    ) -> Source:
        """Return *view* as the engine reads it.

        Args:
            view: Of this dataset.
            schema: The fields to read, each at or above ours.
            reader: Who reads.
            cancelled: Set to stop.
            slot: Of this process, for its counters.
            emit: Receives each event.
        """
        policy = LossPolicy(skip=self._on_corrupt == "skip", max_rows=self._max_lost_rows(view))
        fetcher = self._fetcher(view.index, reader, cancelled, slot, emit)
        return Source(
            index=view.index,
            subset=view.subset,
            schema=schema,
            fetcher=fetcher,
            policy=policy,
            counters=Counters(self._counts[slot]),
            emit=emit,
        )

    def _fetcher(
        self, index: Index, reader: Pass, cancelled: threading.Event, slot: int, emit: Callable[[Event], None]
    ) -> Fetcher:
        return Fetcher(
            self._store,
            index,
            self._full_schema,
            retry=self._retry,
            clock=self._clock,
            cancelled=cancelled,
            counters=Counters(self._counts[slot]),
            emit=emit,
            trust_pickle=self._trust_pickle,
            cache=self._node_cache(),
            reader=reader,
        )

    def _kept(self, view: _View) -> tuple[Shards, ...]:
        """Return the shards of *view* as the node cache keeps them; nothing if there is none."""
        cache = self._node_cache()
        return () if cache is None else (cache.shards_of(view.index, view.subset.shards),)

    def _node_cache(self) -> NodeCache | None:
        """Return this process's view of the node cache; None if there is to be none."""
        options = self._cache_options
        if options is None or (self._cache is not None and self._cache.is_ours):
            return self._cache
        folder = CacheFolder(
            cache_directory(None if options.directory is None else str(options.directory)),
            budget_bytes=int(options.budget_bytes),
            keep_free_bytes=int(options.keep_free_bytes),
        )
        self._cache = NodeCache(folder, mode=options.mode, clock=self._clock)
        return self._cache

    def _max_lost_rows(self, view: _View) -> int:
        """Return the rows a reader may lose in one epoch: its part, or one shard where that part is less than one."""
        if not self._max_corrupt:
            return 0
        return max(int(self._max_corrupt * view.subset.num_samples), int(view.subset.rows.max(initial=0)))


def open_shard(url: str, *, storage_options: Mapping[str, Any] | None = None) -> ShardReader:
    """Return one shard, open for reading: its ``schema``, ``num_rows`` and ``columns()``.

    Args:
        url: Of a ``.pt.zst`` object that ``ShardWriter`` wrote.
        storage_options: For fsspec.

    Raises:
        ShardCorrupt: It is not such a shard. There is no index here to check its digest against; every frame's own
            checksum is verified.
        StoreError: It could not be read.
    """
    folder, _, name = url.rpartition("/")
    store = open_store(folder or ".", storage_options)
    data = store.get(name, timeout_s=RetryOptions().attempt_timeout_s, max_bytes=_MAX_SHARD_RAW_BYTES)
    return FramedShard(data, name=url, max_raw_bytes=_MAX_SHARD_RAW_BYTES)
