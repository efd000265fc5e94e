"""StreamingDataset: shards in a store, as an iterable of samples or batches in one exact order."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import index as whole_number
from typing import Any, Final, Literal, TypeVar

from torch.utils.data import IterableDataset, default_collate

from streamshards.clock import SystemClock
from streamshards.engine.access import RandomAccess
from streamshards.engine.blocks import loaded_sizes
from streamshards.engine.catalog import load_index
from streamshards.engine.fetch import Fetcher
from streamshards.engine.guard import end_with_parent
from streamshards.engine.loading import BlockLoader, LossPolicy
from streamshards.engine.prefetch import BatchStream
from streamshards.errors import OptionInvalid, StreamShardsError
from streamshards.events import Counters, Event, Observer, emit, summarize
from streamshards.options import GiB, MiB, OrderOptions, PrefetchOptions, RetryOptions, require_int, require_options
from streamshards.plan.assignment import Assignment, require_tail
from streamshards.plan.index import Index
from streamshards.plan.order import EpochOrder, OrderSettings, resolve_order
from streamshards.plan.schedule import lanes_read, schedule
from streamshards.plan.state import State
from streamshards.plan.topology import Topology
from streamshards.runtime import (
    RankSource,
    SharedStart,
    Start,
    answered_rank,
    chosen_rank,
    current_rank,
    current_slot,
    current_worker,
    shared_counters,
    usable_cores,
)
from streamshards.shard.columns import Columns, to_batch, to_owned_samples, to_samples
from streamshards.shard.payload import FramedShard
from streamshards.shard.reader import ShardReader
from streamshards.shard.schema import Schema
from streamshards.storage import open_store

T = TypeVar("T")
Sample = dict[str, Any]

_SAMPLES_PER_STEP: Final = 1024
"""Samples gathered at once when there is no batch size; the fixed cost of a step is then under 0.1 µs a sample."""
_STEP_BYTES: Final = 4 * MiB
"""Fewer of them when they are large."""
_READY_SHARE: Final = 4
"""Ready batches may take a quarter of ``memory_bytes``; blocks get the rest."""
_MAX_SHARD_RAW_BYTES: Final = 64 * GiB
"""``open_shard`` has no index that says how large a shard may be."""


class StreamingDataset(IterableDataset[Any]):
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
        storage_options: For fsspec: ``{"endpoint_url": …, "key": …, "secret": …}``, ``{"anon": True}``.
        observer: Receives each :mod:`streamshards.events` value, on the thread where it happened.
        trust_pickle: Let foreign ``.pt`` files run code when they are loaded. Shards of our own never do.

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
        storage_options: Mapping[str, Any] | None = None,
        observer: Observer | None = None,
        trust_pickle: bool = False,
    ) -> None:
        super().__init__()
        if batch_size is not None:
            require_int(batch_size, name="batch_size", minimum=1)
        elif batch_transform is not None:
            raise OptionInvalid("batch_transform needs a batch_size; without one, pass transform")
        self.batch_size = batch_size
        self.shuffle = bool(shuffle)
        self.seed = require_int(seed, name="seed", minimum=0)
        self.tail = require_tail(tail)
        if on_corrupt not in ("skip", "raise"):
            raise OptionInvalid(f'on_corrupt={on_corrupt!r} must be "skip" or "raise"')
        if isinstance(max_corrupt, bool) or not isinstance(max_corrupt, (int, float)) or not 0 <= max_corrupt <= 1:
            raise OptionInvalid(f"max_corrupt={max_corrupt!r} must be a part of the epoch, from 0 to 1")
        self._on_corrupt = on_corrupt
        self._max_corrupt = max_corrupt
        self._transform = transform
        self._batch_transform = batch_transform
        self._order = require_options(order, OrderOptions, name="order")
        self._chosen_rank = chosen_rank(topology)
        self._told_rank: tuple[int, Topology] | None = None
        self._retry = require_options(retry, RetryOptions, name="retry")
        self._prefetch = require_options(prefetch, PrefetchOptions, name="prefetch")
        self._observer = observer
        self._trust_pickle = trust_pickle
        self._store = open_store(url, storage_options)
        self._counts = shared_counters()
        self._start = SharedStart(seed=self.seed, shuffle=self.shuffle)
        self._clock = SystemClock()
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
        if self._order.lanes is not None and self._order.lanes > max(1, self.num_samples):
            raise OptionInvalid(
                f"lanes={self._order.lanes:,} is more than the {self.num_samples:,} samples of {self.url}"
            )
        self._forget_process()

    def _forget_process(self) -> None:
        """Set what belongs to one process and is never carried to another."""
        self._progress: _Progress | None = None
        self._access: RandomAccess | None = None
        self._followed_generation = -1
        """Of ``_start``, when a StreamingDataLoader last began to iterate."""

    def __getstate__(self) -> dict[str, Any]:
        self._own()
        # A spawned worker has no process group: it must learn the rank from us, if we know it.
        try:
            told = (os.getpid(), self._rank())
        except OptionInvalid:
            told = None
        chosen = self._chosen_rank if told is None or not callable(self._chosen_rank) else partial(answered_rank, *told)
        return {**self.__dict__, "_progress": None, "_access": None, "_told_rank": told, "_chosen_rank": chosen}

    def _own(self) -> None:
        """Part from what a parent process shares with its other children: each rank has its own epochs and counts."""
        if self._start.own():
            self._counts = shared_counters()
            self._forget_process()

    def _rank(self) -> Topology:
        return current_rank(self._chosen_rank, told=self._told_rank)

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
        """Samples of the whole dataset."""
        return self._index.num_samples

    def __len__(self) -> int:
        """Return what a whole epoch yields on this rank: batches, or samples if there is no batch size."""
        return self._assignment(self._rank(), 0).rank_batches

    def __getitem__(self, number: int) -> Any:
        """Return sample *number* in the order of the index, after ``transform``; negative numbers count from the end.

        For inspection and map-style use: one shard is fetched, and the frames that hold the sample are decoded.

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
        if self._access is None:
            self._access = RandomAccess(self._fetcher(threading.Event(), current_slot()), self._index.rows)
        reader, row = self._access.find(number % self.num_samples)
        (sample,) = to_samples(reader.columns(self._schema, row, row + 1))
        return sample if self._transform is None else self._transform(sample)

    def stats(self) -> dict[str, int | float]:
        """Return what has been counted since this dataset was opened, over this rank's process and all its workers."""
        return summarize(self._counts)

    def __repr__(self) -> str:
        start = self._start.peek()
        return (
            f"StreamingDataset({self.url!r}, samples={self.num_samples:,}, shards={self._index.num_shards:,}, "
            f"batch_size={self.batch_size}, shuffle={self.shuffle}, seed={self.seed}, "
            f"next epoch={start.epoch} from {start.position:,})"
        )

    # -- where we are ----------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be *epoch*, also in persistent workers.

        A place in the middle of that very epoch, loaded by ``load_state_dict`` and not yet used, is kept.
        """
        require_int(epoch, name="epoch", minimum=0)
        start = self._start.peek()
        resumes_in_it = start.epoch == epoch and start.position + start.batches > 0
        if not resumes_in_it:
            self._own()
            self._start.restart(epoch)
            self._progress = None

    def state_dict(self) -> dict[str, Any]:
        """Return where this dataset's latest iteration is, as a small flat dict of JSON values.

        It counts what ``next`` returned in this process; with DataLoader workers, the ``StreamingDataLoader`` counts.

        Raises:
            StreamShardsError: A StreamingDataLoader iterates, or workers of a plain DataLoader do: the dataset in this
                process does not know how far they are.
        """
        if self._progress is not None:
            return self._progress.state().to_dict()
        if self._followed_generation == self._start.generation:
            raise StreamShardsError(
                f"{self.url}: a StreamingDataLoader iterates this dataset and knows its place; ask loader.state_dict()"
            )
        if current_slot() == 0 and self._start.have_workers_begun:
            raise StreamShardsError(
                f"{self.url}: the place is known in the DataLoader's workers, not here; "
                "iterate a StreamingDataLoader(dataset, num_workers=…) and ask it for its state_dict()"
            )
        worker = current_worker()
        topology = self._rank()
        return self._state(self._start.peek(), topology.with_worker(*(worker or (0, 1)))).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on from *state*, on any number of ranks; later ones follow with the next epochs.

        Raises:
            ResumeMismatch: It is not a state of this dataset and these order settings.
        """
        loaded = self._checked(state)
        worker = current_worker()
        loaded.require_workers(1 if worker is None else worker[1])
        if worker is None:
            self._own()
            self._start.restart(loaded.epoch, position=loaded.position, order=loaded.order)
        else:
            self._start.restart_worker(Start(loaded.epoch, loaded.position, loaded.worker_batches, loaded.order))
        self._progress = None

    def __iter__(self) -> Iterator[Any]:
        self._own()
        slot = current_slot()
        topology = self._rank().with_worker(*(current_worker() or (0, 1)))
        iterator = self._iterate(self._start.take(), topology, slot)
        # Not the iterator: whoever iterates owns it, and leaving the loop must be the end of its threads.
        self._progress = iterator.progress
        return iterator

    # -- for the loader --------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Note that a loader iterates from now on: it knows the place, we don't."""
        self._own()
        if self._start.peek().position:  # a place that was loaded into us has been used now
            self._start.restart(self._start.peek().epoch + 1)
        self._progress = None
        self._followed_generation = self._start.generation

    def _checked(self, state: Mapping[str, Any]) -> State:
        loaded = State.from_dict(state)
        loaded.require_match(
            url=self.url,
            fingerprint=self._index.fingerprint,
            num_samples=self.num_samples,
            seed=self.seed,
            shuffle=self.shuffle,
        )
        return loaded

    def _settings(self, start: Start, topology: Topology) -> OrderSettings:
        """Return the order that *start* asks for, or that a first start on *topology* has."""
        return start.order or resolve_order(
            self._order,
            shuffle=self.shuffle,
            seed=self.seed,
            num_samples=self.num_samples,
            # Not of the selected columns: the order must not depend on which are read.
            raw_bytes=int(loaded_sizes(self._index, self._full_schema).sum()),
            global_batch=(self.batch_size or 1) * topology.world_size,
            topology=topology,
        )

    def _state(self, start: Start, topology: Topology) -> State:
        return State(
            epoch=start.epoch,
            position=start.position,
            num_samples=self.num_samples,
            fingerprint=self._index.fingerprint,
            order=self._settings(start, topology),
            worker_batches=start.batches,
            num_workers=topology.num_workers,
        )

    def _assignment(self, topology: Topology, start: int) -> Assignment:
        return Assignment(
            num_samples=self.num_samples,
            start=start,
            batch_size=self.batch_size or 1,
            topology=topology,
            tail=self.tail,
        )

    def _iterate(self, start: Start, topology: Topology, slot: int) -> _Iterator:
        """Return an iterator of one reader that begins at *start*; its threads are running."""
        if slot:
            end_with_parent()
        assignment = self._assignment(topology, start.position)
        if self.tail == "drop" and self.num_samples and not self._assignment(topology, 0).rank_batches:
            raise OptionInvalid(
                f"{self.url}: tail='drop' leaves nothing of {self.num_samples:,} samples: one global batch is "
                f"{assignment.global_batch:,}. Use a smaller batch_size, or tail='pad'"
            )
        state = self._state(start, topology)
        return _Iterator(self, _Progress(state, assignment), self._stream(assignment, state, slot))

    # -- wiring ----------------------------------------------------------------------------------------------------

    def _emitter(self, slot: int) -> Callable[[Event], None]:
        return partial(emit, observer=self._observer, counters=Counters(self._counts[slot]))

    def _fetcher(self, cancelled: threading.Event, slot: int) -> Fetcher:
        return Fetcher(
            self._store,
            self._index,
            self._full_schema,
            retry=self._retry,
            clock=self._clock,
            cancelled=cancelled,
            counters=Counters(self._counts[slot]),
            emit=self._emitter(slot),
            trust_pickle=self._trust_pickle,
        )

    def _stream(self, assignment: Assignment, state: State, slot: int) -> BatchStream[Any]:
        order = EpochOrder(self._index.rows, state.order, state.epoch)
        row_bytes = max(1, int(self._index.raw_sizes.sum()) // max(1, self.num_samples))
        per_step = 1 if self.batch_size else max(1, min(_SAMPLES_PER_STEP, _STEP_BYTES // row_bytes))
        step_bytes = row_bytes * assignment.batch_size * per_step
        ready = self._ready_steps(step_bytes)
        budget_bytes = self._block_budget(order, assignment, (ready + 1) * step_bytes)
        cancelled = threading.Event()
        counters = Counters(self._counts[slot])
        cores = usable_cores(assignment.topology.num_workers)
        loader = BlockLoader(
            order,
            self._index,
            self._schema,
            self._fetcher(cancelled, slot),
            policy=LossPolicy(
                skip=self._on_corrupt == "skip",
                max_rows=self._max_lost_rows(),
            ),
            threads=self._prefetch.threads or min(8, max(2, 2 * cores)),
            cores=cores,
            budget_bytes=budget_bytes,
            cancelled=cancelled,
            clock=self._clock,
            counters=counters,
            emit=self._emitter(slot),
        )
        return BatchStream(
            schedule(order, assignment, skip=state.worker_batches, per_step=per_step),
            loader,
            self._schema,
            convert=self._converter(),
            ready_batches=ready,
            ready_bytes=ready * step_bytes,
            slow_s=self._prefetch.slow_s,
            url=self.url,
            clock=self._clock,
            counters=counters,
            emit=self._emitter(slot),
        )

    def _max_lost_rows(self) -> int:
        """Return the rows a reader may lose in one epoch: its part, or one shard where that part is less than one."""
        if not self._max_corrupt:
            return 0
        return max(int(self._max_corrupt * self.num_samples), int(self._index.rows.max(initial=0)))

    def _converter(self) -> Callable[[Columns], Any]:
        """Return what turns columns into a batch, or into samples where each is handed out or transformed singly."""
        if self.batch_size is not None and self._transform is None:
            return to_batch
        # In a worker, samples travel to another process: a view would take all its siblings along.
        return to_samples if current_worker() is None or self.batch_size else to_owned_samples

    def _ready_steps(self, step_bytes: int) -> int:
        memory_bytes = int(self._prefetch.memory_bytes)
        return max(1, min(self._prefetch.ready_batches, memory_bytes // _READY_SHARE // step_bytes))

    def _block_budget(self, order: EpochOrder, assignment: Assignment, reserved_bytes: int) -> int:
        """Return the bytes that blocks may take.

        Raises:
            OptionInvalid: One block of each lane that this reader interleaves does not fit.
        """
        memory_bytes = int(self._prefetch.memory_bytes)
        sizes = loaded_sizes(self._index, self._schema) + self._index.sizes
        lanes = lanes_read(order, assignment)
        needed = sum(order.max_block_bytes(lane, sizes) for lane in lanes) + reserved_bytes
        if needed > memory_bytes:
            raise OptionInvalid(
                f"{self.url}: this order interleaves {len(lanes)} lanes here, and a block of each needs "
                f"{needed / MiB:,.0f} MiB at once; PrefetchOptions.memory_bytes is {memory_bytes / MiB:,.0f} MiB. "
                f'Set memory_bytes="{-(-needed // MiB)}MiB", or use fewer lanes, a smaller shuffle_block or batch_size'
            )
        return memory_bytes - reserved_bytes


class _Progress:
    """How much of one pass has been handed out."""

    def __init__(self, start: State, assignment: Assignment) -> None:
        self._start = start
        self._assignment = assignment
        self.batches = 0
        self.is_over = False

    def state(self) -> State:
        """Return the place after the last item that was handed out."""
        return self._start.after(self._assignment, self.batches, is_over=self.is_over)


class _Iterator:
    """One pass of one reader. A class, not a generator: it survives an exception that the user's code catches."""

    def __init__(self, dataset: StreamingDataset, progress: _Progress, stream: BatchStream[Any]) -> None:
        self.progress = progress
        self._stream = stream
        self._samples: Iterator[Any] = iter(())
        self._drawn = 0
        self._yields_samples = dataset.batch_size is None
        self._transform = dataset._transform
        self._batch_transform = dataset._batch_transform
        self._finalizer = weakref.finalize(self, stream.close)

    def __iter__(self) -> _Iterator:
        return self

    def __next__(self) -> Any:
        try:
            item = self._next_sample() if self._yields_samples else self._stream.next()
        except StopIteration:
            self.progress.is_over = True
            raise
        self._drawn += 1
        item = self._transformed(item)
        # Only now: what a transform failed on has not been handed out.
        self.progress.batches = self._drawn
        return item

    def _transformed(self, item: Any) -> Any:
        try:
            if self._transform is not None:
                if self._yields_samples:
                    item = self._transform(item)
                else:
                    item = default_collate([self._transform(sample) for sample in item])
            if self._batch_transform is not None:
                item = self._batch_transform(item)
        except StopIteration as error:  # it would end the loop as if the epoch were over
            raise RuntimeError("transform raised StopIteration") from error
        return item

    def _next_sample(self) -> Any:
        for sample in self._samples:
            return sample
        self._samples = iter(self._stream.next())
        return next(self._samples)


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
