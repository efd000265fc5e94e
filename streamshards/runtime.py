"""The surroundings: process group, DataLoader worker, environment, cores, and what processes of one dataset share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
import torch.distributed
from torch.utils.data import get_worker_info

from streamshards.errors import OptionInvalid
from streamshards.events import COUNTERS
from streamshards.plan.order import OrderSettings
from streamshards.plan.topology import Topology

MAX_WORKERS: Final = 1023
"""DataLoader workers of one rank at most: each has a slot in shared memory."""


def current_rank(chosen: Topology | None = None) -> Topology:
    """Return the data-parallel rank of this process, without its DataLoader worker.

    Args:
        chosen: What the user passed; it wins. Else an initialised process group, else ``RANK`` and ``WORLD_SIZE``,
            else a single rank.

    Raises:
        OptionInvalid: The environment says there are several ranks, but not which one this is.
    """
    if chosen is not None:
        return Topology(rank=chosen.rank, world_size=chosen.world_size)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Topology(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())
    return _rank_from(os.environ)


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
    zeros = torch.zeros(shape, dtype=torch.int64)
    zeros.share_memory_()  # type: ignore[no-untyped-call]  # torch does not annotate it
    return zeros


class Start(NamedTuple):
    """Where an iteration begins."""

    epoch: int
    position: int
    batches: int
    """Batches this reader has already delivered from *position* on (only when a worker itself is resumed)."""
    order: OrderSettings | None
    """None: to be decided by the first start."""


class SharedStart:
    """Where the next iteration begins, for the main process and all its DataLoader workers alike.

    It lives in shared memory, so that it holds for every kind of worker: persistent ones see ``set_epoch`` and
    ``load_state_dict``, and the ones made anew for each epoch see how many epochs their predecessors began. Each
    process counts its own iterations in a slot that only it writes.
    """

    _GENERATION, _EPOCH, _POSITION, _BATCHES, _LANES, _CHUNK, _BLOCK, _SLOTS = range(8)

    def __init__(self, *, seed: int, shuffle: bool) -> None:
        self._seed = seed
        self._shuffle = shuffle
        self._words = _shared_zeros(self._SLOTS + 1 + MAX_WORKERS)

    @property
    def generation(self) -> int:
        """How often :meth:`restart` was called."""
        return int(self._words[self._GENERATION])

    @property
    def have_workers_begun(self) -> bool:
        """Whether any DataLoader worker has begun an iteration since the last :meth:`restart`."""
        return bool(self._words[self._SLOTS + 1 :].any())

    def restart(self, epoch: int, *, position: int = 0, batches: int = 0, order: OrderSettings | None = None) -> None:
        """Let the next iteration of every process begin here, and later ones with the epochs after.

        Args:
            epoch: Which epoch.
            position: Where in it.
            batches: Of the one reader that is resumed, already delivered from there.
            order: Keep these settings from now on; None leaves them as they are.
        """
        words = [epoch, position, batches]
        if order is not None:
            words += [order.lanes, order.chunk, order.shuffle_block]
        self._words[self._SLOTS :] = 0
        self._words[self._EPOCH : self._EPOCH + len(words)] = torch.tensor(words)
        self._words[self._GENERATION] += 1

    def peek(self, slot: int) -> Start:
        """Return where the next iteration of the process of *slot* begins."""
        _, epoch, position, batches, lanes, chunk, block = self._words[: self._SLOTS].tolist()
        begun = int(self._words[self._SLOTS + slot])
        order = None
        if lanes:
            order = OrderSettings(shuffle=self._shuffle, seed=self._seed, lanes=lanes, chunk=chunk, shuffle_block=block)
        return Start(epoch + begun, 0 if begun else position, 0 if begun else batches, order)

    def take(self, slot: int) -> Start:
        """Return what :meth:`peek` does, and count the iteration as begun."""
        start = self.peek(slot)
        self._words[self._SLOTS + slot] += 1
        return start
