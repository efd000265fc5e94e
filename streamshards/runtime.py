"""The surroundings: process group, DataLoader worker, environment, cores, and what processes of one dataset share."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh  # a stub where torch is built without distributed
from torch.utils.data import get_worker_info

from streamshards.errors import OptionInvalid, StreamShardsError
from streamshards.events import COUNTERS
from streamshards.plan.order import OrderSettings
from streamshards.plan.topology import Topology

MAX_WORKERS: Final = 1023
"""DataLoader workers of one rank at most: each has a slot in shared memory."""


RankSource: TypeAlias = Topology | DeviceMesh | Callable[[], Topology] | None
"""What a user may pass as ``topology=``."""


def chosen_rank(source: RankSource) -> Topology | Callable[[], Topology] | None:
    """Return what the user passed as ``topology=``, a DeviceMesh as the rank that this process has in it.

    Raises:
        OptionInvalid: It says no rank: something else, a mesh of several dimensions, a mesh without this process.
    """
    if source is None or isinstance(source, Topology):
        return source
    if isinstance(source, DeviceMesh):
        return _rank_in(source)
    if not callable(source) or isinstance(source, type):
        raise OptionInvalid(
            f"topology={source!r} must be Topology(rank=…, world_size=…), a one-dimensional DeviceMesh, "
            "or a function without arguments that returns a Topology"
        )
    return source


def _rank_in(mesh: DeviceMesh) -> Topology:
    if mesh.ndim != 1:
        raise OptionInvalid(
            f"topology={mesh!r} has {mesh.ndim} dimensions: which of them split the data? Pass one, "
            'mesh["dp"], or flatten several, mesh["dp_replicate", "dp_shard"]._flatten()'
        )
    place = mesh.get_coordinate()
    if place is None:
        raise OptionInvalid(f"topology={mesh!r} does not hold this process, rank {torch.distributed.get_rank()}")
    return Topology(rank=place[0], world_size=mesh.size())


def current_rank(
    chosen: Topology | Callable[[], Topology] | None = None, *, told: tuple[int, Topology] | None = None
) -> Topology:
    """Return the data-parallel rank of this process, without its DataLoader worker.

    Args:
        chosen: What the user passed; it wins, and a function is asked now. Else an initialised process group, else
            *told*, else ``RANK`` and ``WORLD_SIZE``, else a single rank.
        told: The pid of the process that pickled the dataset, and its rank: what a spawned DataLoader worker, which has
            no process group, must go by. It does not hold for anyone but that process's own workers.

    Raises:
        OptionInvalid: The environment says there are several ranks, but not which one this is; or the function fails.
    """
    if chosen is not None:
        rank = chosen if isinstance(chosen, Topology) else _answer_of(chosen)
        return Topology(rank=rank.rank, world_size=rank.world_size)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Topology(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())
    if told is not None and _is_worker_of(told[0]):
        return told[1]
    return _rank_from(os.environ)


def _answer_of(source: Callable[[], Topology]) -> Topology:
    try:
        answer: object = source()
    except OptionInvalid:
        raise
    except Exception as error:
        raise OptionInvalid(f"topology={source!r} was asked for the rank and failed: {error!r}") from error
    if not isinstance(answer, Topology):
        raise OptionInvalid(f"topology={source!r} must return a Topology; it returned {answer!r}")
    return answer


def answered_rank(pid: int, rank: Topology) -> Topology:
    """Return *rank*, the answer of a ``topology=`` function in process *pid*: its stand-in in a pickled dataset.

    Raises:
        OptionInvalid: This is neither that process nor a DataLoader worker of it, so its rank may be another.
    """
    if pid == os.getpid() or _is_worker_of(pid):
        return rank
    raise OptionInvalid(
        f"topology= is a function that was asked in another process, and answered {rank!r}: that does not hold here. "
        "Make the dataset in the process that is the rank, or pass a function that fails until there are ranks"
    )


def _is_worker_of(pid: int) -> bool:
    parent = multiprocessing.parent_process()
    return get_worker_info() is not None and parent is not None and parent.pid == pid


def _rank_from(environment: Mapping[str, str]) -> Topology:
    try:
        world_size = int(environment.get("WORLD_SIZE") or 1)
        rank = int(environment["RANK"]) if environment.get("RANK") else None
    except ValueError as error:
        raise OptionInvalid(f"RANK and WORLD_SIZE must be whole numbers: {error}") from error
    if world_size > 1 and rank is None:
        raise OptionInvalid(
            f"WORLD_SIZE={world_size} but RANK is not set and no process group is initialised: which rank is this? "
            "Call torch.distributed.init_process_group first, set RANK, or pass topology="
        )
    return Topology(rank=rank or 0, world_size=world_size)


def current_worker() -> tuple[int, int] | None:
    """Return this DataLoader worker's number and how many there are; None in the main process.

    Call it on the worker's own thread: torch keeps it there.
    """
    info = get_worker_info()
    return None if info is None else (info.id, info.num_workers)


def current_slot() -> int:
    """Return which slot of shared memory is this process's: 0 for the main process, 1 + w for worker w.

    Raises:
        OptionInvalid: More workers than slots.
    """
    worker = current_worker()
    if worker is None:
        return 0
    if worker[0] >= MAX_WORKERS:
        raise OptionInvalid(f"num_workers={worker[1]} is more than {MAX_WORKERS}")
    return 1 + worker[0]


def usable_cores(num_workers: int) -> int:
    """Return the cores that one of *num_workers* processes may count on, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_workers)


def shared_counters() -> torch.Tensor:
    """Return zeroed counters for every slot, int64 ``(1 + MAX_WORKERS, len(COUNTERS))``, in shared memory."""
    return _shared_zeros(1 + MAX_WORKERS, len(COUNTERS))


def _shared_zeros(*shape: int) -> torch.Tensor:
    """Return int64 zeros in shared memory: fresh from the system, because in a process forked by a parent that has
    used torch's thread pool, filling or copying more than a little memory with torch would wait for ever."""
    count = math.prod(shape)
    storage = torch.UntypedStorage._new_shared(8 * count)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return torch.empty(0, dtype=torch.int64).set_(storage, 0, (count,), (1,)).view(shape)


class Start(NamedTuple):
    """Where an iteration begins."""

    epoch: int
    position: int
    batches: int
    """Batches this reader has already delivered from *position* on (only when a worker itself is resumed)."""
    order: OrderSettings | None
    """None: to be decided by the first start."""
    num_shards: int = 0
    """Of the dataset as this epoch reads it, if shards have been appended since; 0: all."""


class SharedStart:
    """Where the next iteration begins, for the main process of a rank and for a plain DataLoader's workers alike.

    It lives in shared memory, so that it holds for every kind of worker: persistent ones see ``set_epoch`` and
    ``load_state_dict``, and the ones made anew for each epoch see which epochs were begun before them.

    Theory. The main process counts its own iterations. A plain DataLoader tells nobody that an iteration begins, but
    all its workers share a seed that is drawn anew for each one. So a *ledger* of (seed, epoch) says which epoch each
    iteration is: the first worker of an iteration appends a row, its siblings find it. A row's seed is written last,
    and siblings write equal rows, so they agree without a lock, however late some of them start. Each worker notes the
    rows it has used, so that a seed that comes again (``torch.manual_seed`` before each epoch) is a new iteration.
    Persistent workers keep their seed, and count their further iterations themselves.

    Not elegant yet: workers of two iterations that are *begun* in the same microseconds may append to one row.
    """

    _GENERATION, _EPOCH, _POSITION, _SHARDS, _LANES, _CHUNK, _BLOCK, _BEGUN, _HEAD = range(9)
    _LEDGER_ROWS = 4096

    def __init__(self, *, seed: int, shuffle: bool) -> None:
        self._seed = seed
        self._shuffle = shuffle
        self._words = _shared_zeros(self._HEAD + MAX_WORKERS)
        self._ledger = _shared_zeros(self._LEDGER_ROWS, 2)
        self._owner = os.getpid()
        # Of a worker process alone:
        self._seen_generation = -1
        self._first_epoch = 0
        self._passes = 0
        self._own: Start | None = None

    @property
    def generation(self) -> int:
        """How often :meth:`restart` was called."""
        return int(self._words[self._GENERATION])

    @property
    def have_workers_begun(self) -> bool:
        """Whether workers of a plain DataLoader have begun an iteration since the last :meth:`restart`."""
        return bool(self._ledger[0, 0])

    def restart(self, start: Start) -> None:
        """Let the next iteration begin at *start*, and later ones with the epochs after.

        Its order is kept from now on; None leaves the order as it is.
        """
        self.own()
        order = start.order
        self._words[self._HEAD :] = 0
        self._ledger.zero_()
        words = [start.epoch, start.position, start.num_shards]
        words += [] if order is None else [order.lanes, order.chunk, order.shuffle_block]
        self._words[self._EPOCH : self._EPOCH + len(words)] = torch.tensor(words)
        self._words[self._BEGUN] = 0
        self._words[self._GENERATION] += 1

    def restart_worker(self, start: Start) -> None:
        """Let the next iteration of this worker process alone begin at *start*."""
        self._own = start
        self._seen_generation = self.generation
        self._passes = 0

    def own(self) -> bool:
        """Make this the memory of this process and its workers, if a parent process made it; return whether it did.

        Ranks started from one process (``torch.multiprocessing.spawn``) must not share their epochs.
        """
        if self._owner == os.getpid() or get_worker_info() is not None:
            return False
        self._words, inherited = _shared_zeros(len(self._words)), self._words
        self._words.copy_(inherited)
        self._ledger = _shared_zeros(self._LEDGER_ROWS, 2)
        self._words[self._BEGUN] = 0
        self._words[self._HEAD :] = 0
        self._owner = os.getpid()
        return True

    def said(self) -> Start:
        """Return what the last :meth:`restart` said, whoever has begun since."""
        return self._after(0)

    def peek(self) -> Start:
        """Return where the next iteration of this process begins."""
        info = get_worker_info()
        if info is None:
            self.own()
            return self._after(int(self._words[self._BEGUN]))
        if self._seen_generation == self.generation and self._passes:
            return self._at(self._first_epoch + self._passes)
        return self._own or self._after(0)

    def take(self) -> Start:
        """Return where this iteration begins, and count it as begun."""
        info = get_worker_info()
        if info is None:
            start = self.peek()
            self._words[self._BEGUN] += 1
            return start
        # Iterations that torch gives one seed differ at least in this, or in what each worker has used.
        return self._take_in_worker(info.id, (info.seed - info.id) ^ (info.num_workers << 52))

    def _take_in_worker(self, worker: int, iteration_seed: int) -> Start:
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid != self._owner:
            raise StreamShardsError(
                "this dataset was made in another process than the one that iterates, and was not used there before "
                "its workers began: call set_epoch on it there first, or iterate a StreamingDataLoader"
            )
        if self._seen_generation != self.generation:
            self._seen_generation, self._passes, self._own = self.generation, 0, None
        if self._passes == 0:
            own_epoch = None if self._own is None else self._own.epoch
            self._first_epoch = self._epoch_of(iteration_seed or 1, worker, own_epoch)
        passes, self._passes = self._passes, self._passes + 1
        if passes:
            return self._at(self._first_epoch + passes)
        if self._own is not None:
            own, self._own = self._own, None
            return own
        return self._after(self._first_epoch - int(self._words[self._EPOCH]))

    def _epoch_of(self, seed: int, worker: int, own_epoch: int | None) -> int:
        """Return the epoch of the iteration whose workers share *seed*, entered into the ledger if it is new."""
        used = int(self._words[self._HEAD + worker])
        seeds, epochs = self._ledger.numpy().T
        seen = seeds.copy()  # one look: a sibling may enter the row between two
        known = np.flatnonzero(seen[used:] == seed)
        row = used + int(known[0]) if len(known) else int(np.count_nonzero(seen))
        if row >= self._LEDGER_ROWS:
            raise StreamShardsError(f"{row:,} epochs without a set_epoch: call it, or iterate a StreamingDataLoader")
        if not len(known):
            following = int(epochs[:row].max()) + 1 if row else int(self._words[self._EPOCH])
            epochs[row] = following if own_epoch is None else own_epoch
            seeds[row] = seed
        self._words[self._HEAD + worker] = row + 1
        return int(epochs[row])

    def _after(self, begun: int) -> Start:
        """Return where the iteration begins that comes after *begun* others since the last restart."""
        _, epoch, position, num_shards, *_ = self._words[: self._HEAD].tolist()
        if begun:
            return self._at(epoch + begun)
        return self._at(epoch)._replace(position=position, num_shards=num_shards)

    def _at(self, epoch: int) -> Start:
        *_, lanes, chunk, block, _ = self._words[: self._HEAD].tolist()
        order = None
        if lanes:
            order = OrderSettings(shuffle=self._shuffle, seed=self._seed, lanes=lanes, chunk=chunk, shuffle_block=block)
        return Start(epoch, 0, 0, order)
