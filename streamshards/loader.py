"""StreamingDataLoader: a torch DataLoader whose state is what the training loop received, however far workers ran."""

from __future__ import annotations

import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pickle import UnpicklingError
from typing import Any, Final

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils import signal_handling

from streamshards.engine.guard import adopt_sockets_folder, end_if_a_batch_is_lost, sockets_folder
from streamshards.engine.signals import blocked_for_children, call_at_unexpected_end, ignore_signals, wait_for_all
from streamshards.epochs import EpochDataset, interrupted
from streamshards.errors import OptionInvalid, StreamShardsError
from streamshards.options import MiB
from streamshards.plan.assignment import Assignment
from streamshards.plan.state import State
from streamshards.plan.topology import Topology
from streamshards.runtime import current_slot, current_worker
from streamshards.starts import SharedStart, Start

_DATASET_DECIDES: Final = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn")

_DEATH_S: Final = 0.2
"""A dying worker's sockets are closed before its exit code can be read."""
_LOCK_S: Final = 0.5
"""Who lives holds the lock of an event for microseconds."""
_PATIENCE_S: Final = 1.0
"""Enough to finish a batch; a worker that waits for a store, or hangs in a transform, is killed."""
_BEFORE_QUEUES_CLOSE: Final = 100
"""Workers are told to end through queues that ``multiprocessing`` closes at exit, at priority 10."""


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
        self._process = os.getpid()
        super().__init__(self._view, batch_size=None, num_workers=num_workers, collate_fn=_identity, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own private iterator class
        start = self._upcoming()
        topology = self._topology()
        state = self._streaming._state(start, self._first_topology())
        start = start._replace(order=state.order)
        self._streaming._follow()
        self._seen_generation = self._streaming._start.generation
        if self._iterator is not None and _is_over(self._iterator, self._process):
            self._iterator = None  # persistent workers: this iteration begins with new ones
        self._process = os.getpid()
        self._view.begin(start, topology)
        before = self._iterator
        try:
            batches = self._begun()
        except RuntimeError:
            if before is None:
                raise
            before, batches = None, self._begun()  # a persistent worker was killed just now, say: begin with new ones
        finally:
            self._view.settle()
        self._next = Start(start.epoch + 1, 0, 0, state.order)
        self._latest = state
        iterator = _CountingIterator(self, batches, self._streaming._assignment(topology, start))
        self._current = weakref.ref(iterator)
        if self.num_workers and batches is not before:
            # Before torch's own way, which may wait for ever for what a dead worker held; and also when we exit.
            owner = self if self.persistent_workers else iterator
            Finalize(owner, _end_workers, (batches,), exitpriority=_BEFORE_QUEUES_CLOSE)
        return iterator

    def _begun(self) -> Any:
        """Return torch's iterator at its beginning. If that fails (Ctrl-C, say), no worker of it lives on: it might
        end for nobody but us, and what one that persists has sent would be of either iteration."""
        if not self.num_workers:
            return super().__iter__()
        self._view.sockets = sockets_folder()
        others = set(multiprocessing.active_children())
        batches: Any = self._iterator
        try:
            with blocked_for_children(self._start_method()):
                batches = super().__iter__()
                if _workers_of(batches) and not isinstance(batches._workers_done_event, _DoneEvent):
                    _watch_workers(batches)
        except BaseException:
            self._iterator = None
            _end_workers(batches)
            for child in set(multiprocessing.active_children()) - others:  # of an iterator that is half made
                if child.daemon:
                    child.kill()
                    child.join(_PATIENCE_S)
            raise
        return batches

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

    def _start_method(self) -> str:
        """Return how workers are started; nothing, if there are none to start."""
        if not self.num_workers or self._iterator is not None:
            return ""
        context = self.multiprocessing_context or multiprocessing
        return str(context.get_start_method())

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
        self._end: StreamShardsError | None = None
        # Where a worker's death was told to other code than ours: torch's own way to end its workers may wait for ever.
        self._process = os.getpid()
        weakref.finalize(self, _is_over, batches, self._process).atexit = False

    def __iter__(self) -> _CountingIterator:
        return self

    def __next__(self) -> Any:
        if self._process != os.getpid():
            raise StreamShardsError(
                f"{self._loader._streaming.url}: this iterator was made in process {self._process}, and its workers "
                "send their batches there; call iter() on the loader again in this process"
            )
        if self._end is not None:
            raise self._end.with_traceback(None)
        try:
            batch = next(self._batches)
            received = self._received + 1 + self._failed
            latest = self._place(received)
        except StopIteration:
            self.is_over = True
            self._loader._latest = self._place(self._received)
            raise
        except Exception as error:
            if (death := self._death(error)) is not None:
                self._give_up(death)
                raise death from error
            # Its batch was not handed out; it counts only if the training loop goes on to the next one.
            self._failed += 1
            raise
        except BaseException as error:  # Ctrl-C: it may have come in the middle of a message
            self._give_up(interrupted(self._loader._streaming.url, error))
            raise
        # No call from here on: what a signal handler raises comes before all of this or after it.
        self._received = received
        self._failed = 0
        self._loader._latest = latest
        return batch

    def _place(self, received: int) -> State | None:
        """Return the loader's place after *received* batches of ours; its own, if it has begun anew since."""
        if self._loader._current is None or self._loader._current() is not self:
            return self._loader._latest
        return self._start.after(self.assignment, received, is_over=self.is_over)

    def _death(self, error: Exception) -> StreamShardsError | None:
        """Return the error that says which worker died; None if *error* is of another kind."""
        workers = _workers_of(self._batches)
        is_torn = isinstance(error, (OSError, EOFError, UnpicklingError))  # what it sent is gone, and it will be soon
        ended = wait([worker.sentinel for worker in workers], _DEATH_S if is_torn else 0)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join(_DEATH_S)  # for its exit code, which comes later still
        ends = _deaths(workers)
        if not ends:
            return None
        dataset = self._loader._streaming
        return StreamShardsError(
            f"{dataset.url}: {'; '.join(ends)}; what it said is on stderr. "
            "SIGKILL mostly means that memory ran out, SIGBUS that /dev/shm did: "
            f"use fewer than num_workers={len(workers)}, or a smaller PrefetchOptions.memory_bytes (now "
            f"{int(dataset._prefetch.memory_bytes) / MiB:,.0f} MiB a worker), batch_size or prefetch_factor. "
            "loader.state_dict() is the place after the last batch that was handed out"
        )

    def _give_up(self, error: StreamShardsError) -> None:
        """End the workers, and let every later ``next`` raise *error*."""
        self._end = error
        if self._loader._iterator is self._batches:  # persistent workers: the next iteration begins with new ones
            self._loader._iterator = None
        _end_workers(self._batches)


# -- worker processes: what torch keeps private ----------------------------------------------------------------------

_PRIVATE: Final = (
    "_workers",
    "_workers_status",
    "_workers_done_event",
    "_worker_result_queue",
    "_worker_pids_set",
    "_persistent_workers",
    "_mark_worker_as_unavailable",
    "_shutdown",
    "_shutdown_workers",
)


def _workers_of(batches: Any) -> list[BaseProcess]:
    """Return the worker processes of a torch iterator; none, if it is not as we know it: all is torch's then."""
    return list(batches._workers) if all(hasattr(batches, name) for name in _PRIVATE) else []


def _deaths(workers: Sequence[BaseProcess]) -> list[str]:
    """Return what became of the workers that have ended and should not have."""
    codes = {number: worker.exitcode for number, worker in enumerate(workers)}
    return [
        f"DataLoader worker {number} (pid {workers[number].pid}) "
        + (f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}")
        for number, code in codes.items()
        if code
    ]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _end_workers(batches: Any) -> None:
    """End the workers of a torch iterator: they are asked, which lets them clean up, and then they are killed."""
    workers = _workers_of(batches)
    if not workers or batches._shutdown:
        return
    if not _deaths(workers):
        batches._workers_done_event.set()
        for number in range(len(workers)):
            if batches._persistent_workers or batches._workers_status[number]:
                batches._mark_worker_as_unavailable(number, shutdown=True)
        wait_for_all([worker.sentinel for worker in workers], timeout_s=_PATIENCE_S)
    if batches._worker_pids_set:  # or torch would report those that we kill
        signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]  # private
        batches._worker_pids_set = False
    for worker in workers:
        if worker.is_alive():  # the pid of one that has ended may be another's: a fork server waits for its children
            worker.kill()
            worker.join(_PATIENCE_S)
    if _deaths(workers):
        _end_pinning(batches)
    batches._shutdown_workers()


def _end_pinning(batches: Any) -> None:
    """End the thread that pins batches, if there is one; all workers have ended. It may have read a dead one's message
    in part, and torch would wait for it for ever."""
    thread = getattr(batches, "_pin_memory_thread", None)
    if thread is not None:
        batches._pin_memory_thread_done_event.set()
        batches._worker_result_queue._writer.close()  # the last end: the thread sees the end of the pipe
        thread.join(_PATIENCE_S)  # or not the last: workers that were forked later have it, too
        del batches._pin_memory_thread


def _is_over(batches: Any, process: int) -> bool:
    """Return whether the workers of a torch iterator that *process* made cannot be used; they have been ended then."""
    workers = _workers_of(batches)
    if not workers:
        return False
    if process != os.getpid():
        batches._shutdown = True  # or torch would end them, here where we were forked from their trainer
    elif _deaths(workers):
        _end_workers(batches)
    return bool(batches._shutdown)


class _DoneEvent:
    """What tells workers to end, as torch uses it: it does not wait for ever for a lock that a dead worker holds."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set  # only the trainer sets it

    def set(self) -> None:
        self._is_set = True
        if self._shared._cond.acquire(timeout=_LOCK_S):
            self._shared._flag.acquire(block=False)
            self._shared._flag.release()
            self._shared._cond.release()


def _watch_workers(batches: Any) -> None:
    """Let no one wait for ever for what a dead worker held, or for a message that it has sent in part.

    Under fork and spawn, SIGCHLD would interrupt the training loop; a fork server's workers are not its children.
    """
    reference = weakref.ref(batches)

    def is_expected(number: int) -> bool:
        there = reference()
        return there is None or there._shutdown or not there._workers_status[number]

    def end_pass() -> None:
        there = reference()
        if there is not None:
            for worker in _workers_of(there):
                worker.kill()
            there._worker_result_queue._writer.close()  # with the workers' ends: the reader sees the end of the pipe

    batches._workers_done_event = _DoneEvent(batches._workers_done_event)
    sentinels = {number: worker.sentinel for number, worker in enumerate(_workers_of(batches))}
    call_at_unexpected_end(sentinels, is_expected=is_expected, then=end_pass)


class _View(IterableDataset[Any]):
    """The dataset as one loader's workers see it: they begin where the loader says, not where the dataset stands."""

    def __init__(self, dataset: EpochDataset) -> None:
        self.dataset = dataset
        self._shared = SharedStart(seed=dataset.seed, shuffle=dataset.shuffle)
        self._start: Start | None = None
        self._rank = Topology()
        self._begun_in = 0
        self.sockets = ""
        """Where workers have theirs."""

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
        if slot:
            ignore_signals()  # _end_workers is the promise that this needs
            adopt_sockets_folder(self.sockets)
            end_if_a_batch_is_lost()
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
