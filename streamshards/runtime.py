"""The surroundings: process group, DataLoader worker, environment, cores, and memory that processes share."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh  # a stub where torch is built without distributed
from torch.utils.data import get_worker_info

from streamshards.errors import OptionInvalid
from streamshards.events import COUNTERS
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
    return get_worker_info() is not None and parent_pid() == pid


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


def worker_seed() -> int | None:
    """Return what all workers of one iteration of a DataLoader have in common, and no others: the seed that torch drew
    for it, with their number. Iterations that torch gives one seed have one such number. None in the main process."""
    info = get_worker_info()
    return None if info is None else ((info.seed - info.id) ^ (info.num_workers << 52)) or 1


def parent_pid() -> int | None:
    """Return the process that started this one through ``multiprocessing``; None if none did."""
    parent = multiprocessing.parent_process()
    return None if parent is None else parent.pid


def usable_cores(num_workers: int) -> int:
    """Return the cores that one of *num_workers* processes may count on, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_workers)


def cache_directory(chosen: str | None = None) -> str:
    """Return where the node cache lies: *chosen*, or a folder in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    if chosen is not None:
        return chosen
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    base = home if os.path.isabs(home) else os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "streamshards")


def shared_counters() -> torch.Tensor:
    """Return zeroed counters for every slot, int64 ``(1 + MAX_WORKERS, len(COUNTERS))``, in shared memory."""
    return shared_zeros(1 + MAX_WORKERS, len(COUNTERS))


def is_shared(tensor: torch.Tensor) -> bool:
    """Return whether *tensor* lies in memory that other processes may see."""
    return bool(tensor.is_shared())  # type: ignore[no-untyped-call]  # torch does not annotate it


def shared_zeros(*shape: int) -> torch.Tensor:
    """Return int64 zeros in shared memory: fresh from the system, because in a process forked by a parent that has
    used torch's thread pool, filling or copying more than a little memory with torch would wait for ever."""
    count = math.prod(shape)
    storage = torch.UntypedStorage._new_shared(8 * count)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return torch.empty(0, dtype=torch.int64).set_(storage, 0, (count,), (1,)).view(shape)
