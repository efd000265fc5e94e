"""Who reads: one data-parallel rank, and one worker process of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamshards.errors import OptionInvalid
from streamshards.options import require_int


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """One reader's place among all readers.

    Ranks that must see the same data (tensor or pipeline parallel) share a data-parallel rank: pass that one.
    """

    rank: int = 0
    """Data-parallel rank, from 0."""
    world_size: int = 1
    """Data-parallel ranks in all."""
    worker: int = 0
    """DataLoader worker within the rank, from 0; 0 without workers."""
    num_workers: int = 1
    """Readers within the rank; 1 without workers."""

    def __post_init__(self) -> None:
        require_int(self.world_size, name="Topology.world_size", minimum=1)
        require_int(self.num_workers, name="Topology.num_workers", minimum=1)
        require_int(self.rank, name="Topology.rank", minimum=0)
        require_int(self.worker, name="Topology.worker", minimum=0)
        if self.rank >= self.world_size:
            raise OptionInvalid(f"Topology.rank={self.rank} must be below world_size={self.world_size}")
        if self.worker >= self.num_workers:
            raise OptionInvalid(f"Topology.worker={self.worker} must be below num_workers={self.num_workers}")

    @property
    def num_readers(self) -> int:
        """Readers in all: ``world_size * num_workers``."""
        return self.world_size * self.num_workers

    def with_worker(self, worker: int, num_workers: int) -> Topology:
        """Return the same rank, seen from DataLoader worker *worker* of *num_workers*."""
        return replace(self, worker=worker, num_workers=num_workers)
