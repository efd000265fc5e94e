"""StreamingDataLoader: a torch DataLoader whose state is what the training loop received, however far workers ran."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch.utils.data import DataLoader, IterableDataset

from streamshards.epochs import EpochDataset
from streamshards.errors import OptionInvalid, StreamShardsError
from streamshards.plan.assignment import Assignment
from streamshards.plan.state import State
from streamshards.plan.topology import Topology
from streamshards.runtime import current_slot, current_worker
from streamshards.starts import SharedStart, Start

_DATASET_DECIDES: Final = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn")


class StreamingDataLoader(DataLoader[Any]):
    """Iterates over a StreamingDataset or a Mixture, in worker processes or in this one, and knows exactly where it is.

    Each iteration is the next epoch: 0, 1, 2, … or what ``dataset.set_epoch`` or ``load_state_dict`` said.

    Args:
        dataset: What to iterate over; it makes the batches.
        num_workers: Worker processes. 0 reads on threads of this process, which is often the fastest.
        **options: As for ``torch.utils.data.DataLoader``: ``pin_memory``, ``prefetch_factor``, ``persistent_workers``,
            ``multiprocessing_context``, ``timeout``, ``worker_init_fn``, …

    Raises:
        OptionInvalid: An option that the dataset decides: batch_size, shuffle, sampler, drop_last, collate_fn.
    """

    _is_accelerate_prepared = True
    """Tells Hugging Face Accelerate that there is nothing to prepare: each rank gets its own batches already, and what
    it would wrap around this loader reads rank 0's part alone, cuts that up among the ranks, and loses the state."""

    def __init__(self, dataset: EpochDataset, *, num_workers: int = 0, **options: Any) -> None:
        if not isinstance(dataset, EpochDataset):
            raise OptionInvalid(
                f"StreamingDataLoader iterates a StreamingDataset or a Mixture, not a {type(dataset).__name__}"
            )
        if options.get("in_order") is False:
            raise OptionInvalid("in_order=False: batches out of order cannot be resumed exactly; leave it out")
        misplaced = [name for name in _DATASET_DECIDES if name in options]
        if misplaced:
            raise OptionInvalid(f"{', '.join(misplaced)}: say it to the StreamingDataset, which makes the batches")
        self._streaming = dataset
        self._view = _View(dataset)
        self._seen_generation = dataset._start.generation
        self._next = dataset._start.peek()
        self._latest: State | None = None
        self._current: weakref.ref[_CountingIterator] | None = None
        super().__init__(self._view, batch_size=None, num_workers=num_workers, collate_fn=_identity, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own private iterator class
        start = self._upcoming()
        topology = self._topology()
        state = self._streaming._state(start, self._first_topology())
        start = start._replace(order=state.order)
        self._streaming._follow()
        self._seen_generation = self._streaming._start.generation
        self._view.begin(start, topology)
        try:
            batches = super().__iter__()
        finally:
            self._view.settle()
        self._next = Start(start.epoch + 1, 0, 0, state.order)
        self._latest = state
        iterator = _CountingIterator(self, batches, self._streaming._assignment(topology, start))
        self._current = weakref.ref(iterator)
        return iterator

    def __len__(self) -> int:
        """Return how many batches the iteration at hand yields, or else the next one. Exact, and equal on all ranks."""
        iterator = None if self._current is None else self._current()
        if iterator is not None and not iterator.is_over:
            return iterator.assignment.rank_batches
        start, topology = self._upcoming(), self._topology()
        start = start._replace(order=self._streaming._settings(start, self._first_topology()))
        return self._streaming._assignment(topology, start).rank_batches

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last batch that this loader handed out, as a small flat dict of JSON values.

        It is the same on every rank, needs no answer from workers, and loads on any number of ranks and workers.
        """
        upcoming = self._upcoming()
        if self._latest is not None:
            return self._streaming._named(self._latest).to_dict()
        return self._streaming._state(upcoming, self._first_topology()).to_dict()

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be *epoch*; the same as ``dataset.set_epoch``, also for its other loaders."""
        self._streaming.set_epoch(epoch)

    def stats(self) -> dict[str, int | float]:
        """Return what the dataset has counted, over this process and all workers."""
        return self._streaming.stats()

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Let the next iteration go on from *state*; later ones follow with the next epochs.

        Args:
            state: What ``state_dict`` returned, here or on any other cluster.
            strict: As for ``StreamingDataset.load_state_dict``.

        Raises:
            ResumeMismatch: It is not a state of this dataset and these order settings.
        """
        self._next = self._streaming._checked(state, strict=strict, num_workers=1)
        self._seen_generation = self._streaming._start.generation
        self._latest = self._current = None

    def _upcoming(self) -> Start:
        """Return where the next iteration begins; what was said to the dataset since we last looked goes first."""
        dataset_start = self._streaming._start
        if dataset_start.generation != self._seen_generation:
            looked_away, self._seen_generation = self._seen_generation, dataset_start.generation
            said = dataset_start.peek()
            is_same = said.epoch == self._next.epoch and self._next.position > 0 and said.position == 0
            if not is_same or dataset_start.said_since > looked_away + 1:
                self._next = said._replace(order=said.order or self._next.order)
            self._latest = self._current = None
        return self._next

    def _topology(self) -> Topology:
        return self._streaming._rank()

    def _first_topology(self) -> Topology:
        """Return what shapes the order of a first start: this rank and how many workers it has."""
        return self._topology().with_worker(0, max(1, self.num_workers))

    def __repr__(self) -> str:
        return f"StreamingDataLoader({self._streaming!r}, num_workers={self.num_workers}, batches={len(self)})"


class _CountingIterator:
    """Counts what the training loop receives, in the main process."""

    def __init__(self, loader: StreamingDataLoader, batches: Iterator[Any], assignment: Assignment) -> None:
        self.assignment = assignment
        self.is_over = False
        self._loader = loader
        self._batches = batches
        assert loader._latest is not None  # set just before
        self._start = loader._latest
        self._received = 0
        self._failed = 0

    def __iter__(self) -> _CountingIterator:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            self.is_over = True
            self._report()
            raise
        except Exception:
            # Its batch was not handed out; it counts only if the training loop goes on to the next one.
            self._failed += 1
            raise
        self._received += 1 + self._failed
        self._failed = 0
        self._report()
        return batch

    def _report(self) -> None:
        if self._loader._current is None or self._loader._current() is not self:
            return  # left behind: the loader has begun anew, or was told to
        self._loader._latest = self._start.after(self.assignment, self._received, is_over=self.is_over)


class _View(IterableDataset[Any]):
    """The dataset as one loader's workers see it: they begin where the loader says, not where the dataset stands."""

    def __init__(self, dataset: EpochDataset) -> None:
        self.dataset = dataset
        self._shared = SharedStart(seed=dataset.seed, shuffle=dataset.shuffle)
        self._start: Start | None = None
        self._rank = Topology()
        self._begun_in = 0

    def begin(self, start: Start, rank: Topology) -> None:
        """Let the iteration that is about to begin, and no other, begin at *start*.

        New workers carry it with them, so it does not matter when they get to it; persistent ones, who got theirs
        when they were new, look it up.
        """
        self._rank = rank
        self._start = start
        self._shared.restart(start)

    def settle(self) -> None:
        """Note that the iteration has begun: nobody else may begin one here."""
        self._start = None

    def __iter__(self) -> Iterator[Any]:
        if self._start is None:
            raise StreamShardsError(
                f"{self.dataset.url}: this is the dataset as a StreamingDataLoader's workers see it, and only that "
                "loader can iterate it; another loader over it (accelerate's skip_first_batches, for one) would lose "
                "the place. Use loader.load_state_dict to go on from a place"
            )
        slot = current_slot()
        topology = self._rank.with_worker(*(current_worker() or (0, 1)))
        is_persistent = current_worker() is not None and self._begun_in == os.getpid()
        self._begun_in = os.getpid()
        start = self._shared.said() if is_persistent else self._start
        return self.dataset._iterate(start, topology, slot)

    def __getattr__(self, name: str) -> Any:
        # ``loader.dataset.set_epoch(…)`` and the like mean the dataset.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)


def _identity(batch: Any) -> Any:
    return batch
