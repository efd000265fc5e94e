"""EpochDataset: what StreamingDataset and Mixture have in common - epochs that begin, are counted, and are resumed."""

from __future__ import annotations

import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import IterableDataset, default_collate

from streamshards.clock import SystemClock, unix_ns
from streamshards.engine.guard import end_with_parent
from streamshards.engine.labels import Labels
from streamshards.engine.prefetch import BatchStream
from streamshards.engine.reading import Reading
from streamshards.engine.signals import obey_parent_alone
from streamshards.engine.source import Source
from streamshards.errors import OptionInvalid, ResumeMismatch, StreamShardsError
from streamshards.events import Counters, Event, Observer, emit, logger, summarize
from streamshards.options import PrefetchOptions, require_int, require_options
from streamshards.plan.assignment import Assignment, require_tail
from streamshards.plan.order import OrderSettings
from streamshards.plan.schedule import SampleOrder
from streamshards.plan.state import MAX_EPOCH, State, mismatch
from streamshards.plan.topology import Topology
from streamshards.runtime import (
    MAX_WORKERS,
    RankSource,
    answered_rank,
    chosen_rank,
    current_rank,
    current_slot,
    current_worker,
    is_shared,
    shared_counters,
    shared_zeros,
    usable_cores,
)
from streamshards.shard.columns import Columns, to_batch, to_owned_samples, to_samples
from streamshards.shard.schema import Schema
from streamshards.starts import SharedStart, Start

EpochDatasetT = TypeVar("EpochDatasetT", bound="EpochDataset")
Sample = dict[str, Any]


class EpochDataset(IterableDataset[Any]):
    """An IterableDataset of numbered epochs, in one order that does not depend on the cluster's shape.

    Iterating starts the next epoch: 0, 1, 2, … or what ``set_epoch`` or ``load_state_dict`` said. Threads in the
    background fetch, verify, decode and shuffle; leaving the loop early stops them.
    """

    def __init__(
        self,
        *,
        batch_size: int | None,
        shuffle: bool,
        seed: int,
        transform: Callable[[Sample], Any] | None,
        batch_transform: Callable[[Any], Any] | None,
        tail: str,
        labels: Labels,
        topology: RankSource,
        prefetch: PrefetchOptions | None,
        observer: Observer | None,
    ) -> None:
        super().__init__()
        if batch_size is not None:
            require_int(batch_size, name="batch_size", minimum=1)
        elif batch_transform is not None:
            raise OptionInvalid("batch_transform needs a batch_size; without one, pass transform")
        self.batch_size = batch_size
        if not isinstance(shuffle, bool):
            raise OptionInvalid(f"shuffle={shuffle!r} must be True or False")
        self.shuffle = shuffle
        self.seed = require_int(seed, name="seed", minimum=0)
        self.tail = require_tail(tail)
        self._transform = transform
        self._batch_transform = batch_transform
        self._labels = labels
        self._chosen_rank = chosen_rank(topology)
        self._told_rank: tuple[int, Topology] | None = None
        self._prefetch = require_options(prefetch, PrefetchOptions, name="prefetch")
        self._observer = observer
        self._clock = SystemClock()
        self._begin_life()

    def _begin_life(self) -> None:
        """Set what no other dataset shares with this one: where it stands, and what it has counted."""
        self._counts = shared_counters()
        self._start = SharedStart(seed=self.seed, shuffle=self.shuffle)
        self._forget_process()

    def _forget_process(self) -> None:
        """Set what belongs to one process and is never carried to another."""
        self._progress: _Progress | None = None
        self._followed_generation = -1
        """Of ``_start``, when a StreamingDataLoader last began to iterate."""
        self._begun = shared_zeros(1 + MAX_WORKERS, 2)
        """When the latest two passes of each slot began, as ``unix_ns``: workers that are made anew don't know it."""

    def __getstate__(self) -> dict[str, Any]:
        self._own()
        # A spawned worker has no process group: it must learn the rank from us, if we know it.
        try:
            told = (os.getpid(), self._rank())
        except OptionInvalid:
            told = None
        chosen = self._chosen_rank if told is None or not callable(self._chosen_rank) else partial(answered_rank, *told)
        return {**self.__dict__, "_progress": None, "_told_rank": told, "_chosen_rank": chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not is_shared(self._counts):  # copied or unpickled: workers that are made here would not see it
            self._counts = shared_counters()
        if not is_shared(self._begun):
            self._begun = shared_zeros(1 + MAX_WORKERS, 2)

    def __copy__(self: EpochDatasetT) -> EpochDatasetT:
        """Return the same dataset at the same place, which from now on has epochs of its own."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._begin_life()
        other._start.restart(self._start.peek())
        return other

    def _own(self) -> None:
        """Part from what a parent process shares with its other children: each rank has its own epochs and counts."""
        if self._start.own():
            self._counts = shared_counters()
            self._forget_process()

    def _rank(self) -> Topology:
        return current_rank(self._chosen_rank, told=self._told_rank)

    # -- what a subclass is ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the data is, without credentials; names the dataset in messages."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Samples of a whole epoch, over all ranks."""

    @abstractmethod
    def _identity(self, start: Start) -> dict[str, Any]:
        """Return what a state must say for a resume from *start* to be exact, besides seed and shuffle."""

    @abstractmethod
    def _num_samples_of(self, start: Start, topology: Topology) -> int:
        """Return the samples of the epoch that begins at *start*; *topology* shapes the order if *start* does not."""

    @abstractmethod
    def _first_order(self, start: Start, topology: Topology) -> OrderSettings:
        """Return the order of a first start on *topology*."""

    @abstractmethod
    def _open(
        self, state: State, start: Start, assignment: Assignment, slot: int, convert: Callable[[Columns], Any]
    ) -> BatchStream[Any]:
        """Return the batches of one reader, its threads running."""

    _forgiven = ""
    """What ``strict=False`` forgives in the middle of an epoch, for messages."""

    def _start_of_other(self, loaded: State, differences: Mapping[str, Any]) -> Start | None:  # noqa: ARG002
        """Return where a state that differs from what is open here can be gone on from all the same, if it can."""
        return None

    def _advice(self, loaded: State, differences: Mapping[str, Any]) -> str:  # noqa: ARG002 -- a mixture needs them
        """Return what to do about a state that has those *differences* from what is open here."""
        return "Open the dataset as it was then, with the same seed and shuffle"

    # -- what there is ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return what a whole epoch yields on this rank: batches, or samples if there is no batch size."""
        return self._assignment(self._rank(), Start(0, 0, 0, self._start.peek().order)).rank_batches

    def stats(self) -> dict[str, int | float]:
        """Return what has been counted since this dataset was opened, over this rank's process and all its workers."""
        return summarize(self._counts)

    # -- where we are ----------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be *epoch*, also in persistent workers.

        A place in the middle of that very epoch, loaded by ``load_state_dict`` and not yet used, is kept.
        """
        require_int(epoch, name="epoch", minimum=0, maximum=MAX_EPOCH)
        start = self._start.peek()
        resumes_in_it = start.epoch == epoch and start.position + start.batches > 0
        if not resumes_in_it or self._start.have_workers_begun:
            self._own()
            self._start.restart(Start(epoch, 0, 0, None))
            self._progress = None

    def state_dict(self) -> dict[str, Any]:
        """Return where this dataset's latest iteration is, as a small dict of JSON values.

        It counts what ``next`` returned in this process; with DataLoader workers, the ``StreamingDataLoader`` counts.

        Raises:
            StreamShardsError: A StreamingDataLoader iterates, or workers of a plain DataLoader do: the dataset in this
                process does not know how far they are.
        """
        if self._progress is not None:
            return self._named(self._progress.state()).to_dict()
        if self._followed_generation == self._start.generation:
            raise StreamShardsError(
                f"{self.url}: a StreamingDataLoader iterates this dataset and knows the place: use loader.state_dict()"
            )
        if current_slot() == 0 and self._start.have_workers_begun:
            raise StreamShardsError(
                f"{self.url}: the place is known in the DataLoader's workers, not here; "
                "iterate a StreamingDataLoader(dataset, num_workers=…) and ask it for its state_dict()"
            )
        worker = current_worker()
        topology = self._rank()
        return self._state(self._start.peek(), topology.with_worker(*(worker or (0, 1)))).to_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Let the next iteration go on from *state*, on any number of ranks; later ones follow with the next epochs.

        Args:
            state: What ``state_dict`` returned, here or on any other cluster.
            strict: False also takes a state of other data or another order, where nothing can go wrong by it:

                - Shards have been appended since, whose fields are of the types and sizes that stood: the state's epoch
                  ends with the samples it began with, and the next ones have all.
                - The state lies between two epochs: the next epoch is one of what is open here.

        Raises:
            ResumeMismatch: It is no state of this dataset and order, in more than *strict* forgives. The text lists
                each difference.
        """
        start = self._checked(state, strict=strict)
        if current_worker() is None:
            self._own()
            self._start.restart(start)
        else:
            self._start.restart_worker(start)
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
        start = self._start.peek()
        if start.position:  # a place that was loaded into us has been used now
            self._start.restart(Start(start.epoch + 1, 0, 0, None))
        self._progress = None
        self._followed_generation = self._start.generation

    def _checked(self, state: Mapping[str, Any], *, strict: bool, num_workers: int | None = None) -> Start:
        """Return where *state* says to begin.

        Args:
            state: As for ``load_state_dict``.
            strict: As for ``load_state_dict``.
            num_workers: Of the reader that will go on; None: of this process.
        """
        loaded = State.from_dict(state)
        if num_workers is None:
            worker = current_worker()
            num_workers = 1 if worker is None else worker[1]
        if loaded.worker_batches:
            loaded.require_workers(num_workers, (self.batch_size or 1) * self._rank().world_size)
        here = Start(loaded.epoch, loaded.position, loaded.worker_batches, loaded.order)
        ours = replace(loaded.order, seed=self.seed, shuffle=self.shuffle)
        try:
            differences = loaded.differences(self._state(here._replace(order=ours), Topology()))
        except OptionInvalid as error:  # an order that cannot be
            raise ResumeMismatch(f"{self.url}: the state cannot be right: {error}") from error
        if not differences:
            return here
        advice = self._advice(loaded, differences)
        if not strict:
            other = self._start_of_other(loaded, differences)
            if other is None and loaded.is_between_epochs:
                other = Start(loaded.epoch + (loaded.position > 0), 0, 0, None)
            if other is not None:
                logger.warning("strict=False: goes on all the same. %s", mismatch(self.url, differences, ""))
                return other
            advice = (
                f"strict=False forgives {self._forgiven}any difference between two epochs; this state lies in the "
                f"middle of epoch {loaded.epoch}, at {loaded.position:,} of {loaded.num_samples:,}"
            )
        elif self._start_of_other(loaded, differences) is not None:
            advice = "Shards have been appended since: strict=False ends the state's epoch without them"
        raise mismatch(self.url, differences, advice)

    def _named(self, state: State) -> State:
        """Return *state*, which came from an earlier one, with the identity that belongs to its own place."""
        return state

    def _settings(self, start: Start, topology: Topology) -> OrderSettings:
        """Return the order that *start* asks for, or that a first start on *topology* has."""
        return start.order or self._first_order(start, topology)

    def _state(self, start: Start, topology: Topology) -> State:
        start = start._replace(order=self._settings(start, topology))
        assert start.order is not None  # for mypy: just set
        return State(
            epoch=start.epoch,
            position=start.position,
            num_samples=self._num_samples_of(start, topology),
            identity=self._identity(start),
            order=start.order,
            worker_batches=start.batches,
            num_workers=topology.num_workers,
            global_batch=(self.batch_size or 1) * topology.world_size if start.batches else 0,
        )

    def _assignment(self, topology: Topology, start: Start) -> Assignment:
        return Assignment(
            num_samples=self._num_samples_of(start, topology),
            start=start.position,
            batch_size=self.batch_size or 1,
            topology=topology,
            tail=self.tail,
        )

    def _iterate(self, start: Start, topology: Topology, slot: int) -> _Iterator:
        """Return an iterator of one reader that begins at *start*; its threads are running."""
        if slot:
            obey_parent_alone()  # first: a thread that blocks no signal would receive it
            end_with_parent()
        assignment = self._assignment(topology, start)
        whole = self._assignment(topology, start._replace(position=0))
        if self.tail == "drop" and whole.num_samples and not whole.rank_batches:
            raise OptionInvalid(
                f"{self.url}: tail='drop' leaves nothing of {whole.num_samples:,} samples: one global batch is "
                f"{assignment.global_batch:,}. Use a smaller batch_size, or tail='pad'"
            )
        state = self._state(start, topology)
        stream = self._open(state, start, assignment, slot, self._converter())
        return _Iterator(self, _Progress(state, assignment), stream)

    def _reading(
        self,
        order: SampleOrder,
        assignment: Assignment,
        *,
        period: int,
        sources: Sequence[Source],
        schema: Schema,
        skip: int,
        cancelled: threading.Event,
        slot: int,
    ) -> Reading:
        """Return what one reader reads, with what this dataset was told about how; see ``Reading`` for the rest."""
        return Reading(
            order=order,
            assignment=assignment,
            period=period,
            sources=sources,
            schema=schema,
            labels=self._labels,
            skip=skip,
            in_samples=self.batch_size is None,
            prefetch=self._prefetch,
            cores=usable_cores(assignment.topology.num_workers),
            url=self.url,
            cancelled=cancelled,
            clock=self._clock,
            counters=Counters(self._counts[slot]),
            emit=self._emitter(slot),
        )

    def _begin_pass(self, slot: int) -> int:
        """Note that the reader in *slot* begins a pass; return when the one before its previous one began, as
        ``unix_ns``, or else its previous one, or else this."""
        (before_last, last), now = self._begun[slot].tolist(), unix_ns()
        self._begun[slot] = torch.tensor([last, now])
        return int(before_last or last or now)

    def _emitter(self, slot: int) -> Callable[[Event], None]:
        return partial(emit, observer=self._observer, counters=Counters(self._counts[slot]))

    def _converter(self) -> Callable[[Columns], Any]:
        """Return what turns columns into a batch, or into samples where each is handed out or transformed singly."""
        if self.batch_size is not None and self._transform is None:
            return to_batch
        # In a worker, samples travel to another process: a view would take all its siblings along.
        return to_samples if current_worker() is None or self.batch_size else to_owned_samples


def interrupted(url: str, by: BaseException) -> StreamShardsError:
    """Return what ``next`` raises once *by*, which is no ``Exception``, has come out of it."""
    return StreamShardsError(
        f"{url}: {type(by).__name__} interrupted this pass. Begin the next one with iter(); to go on with this one, "
        "load_state_dict(state_dict()) first: it is the place after the last batch that was handed out"
    )


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

    def __init__(self, dataset: EpochDataset, progress: _Progress, stream: BatchStream[Any]) -> None:
        self.progress = progress
        self._stream = stream
        self._samples: Iterator[Any] = iter(())
        self._drawn = 0
        self._url = dataset.url
        self._yields_samples = dataset.batch_size is None
        self._transform = dataset._transform
        self._batch_transform = dataset._batch_transform
        self._finalizer = weakref.finalize(self, stream.close)

    def __iter__(self) -> _Iterator:
        return self

    def __next__(self) -> Any:
        try:
            item = self._next_item()
            self._drawn += 1
            item = self._transformed(item)
        except Exception:
            raise
        except BaseException as error:  # Ctrl-C: it may have come between two steps, and we are one item off
            self._stream.close(because=interrupted(self._url, error))
            self._samples = iter(())
            raise
        # Only now: what a transform failed on has not been handed out.
        self.progress.batches = self._drawn
        return item

    def _next_item(self) -> Any:
        try:
            return self._next_sample() if self._yields_samples else self._stream.next()
        except StopIteration:
            self.progress.is_over = True
            raise

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
