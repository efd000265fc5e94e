"""Which positions of an epoch one reader delivers, batch by batch. Pure arithmetic; nothing is materialised.

Step t's global batch is positions ``[start + t·G, start + (t+1)·G)`` with G = batch size × world size. Rank r takes its
r-th contiguous slice; worker w of n takes the rank's batches t ≡ w (mod n), counted from *start*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from streamshards.errors import OptionInvalid
from streamshards.options import require_int
from streamshards.plan.order import Int64Array
from streamshards.plan.topology import Topology

Tail: TypeAlias = Literal["pad", "drop", "uneven"]


def require_tail(tail: str) -> Tail:
    """Return *tail* if it names a way to end an epoch.

    Raises:
        OptionInvalid: It does not.
    """
    for known in get_args(Tail):
        if tail == known:
            return known  # type: ignore[no-any-return]  # get_args forgets that these are the literals
    raise OptionInvalid(f'tail={tail!r} must be "pad", "drop" or "uneven"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """The rest of an epoch, as one reader sees it."""

    num_samples: int
    """Samples of the whole epoch."""
    start: int
    """First position still to deliver, from 0 to *num_samples*."""
    batch_size: int
    """Samples in a batch of one rank."""
    topology: Topology
    tail: Tail
    """What becomes of the last, short global batch: ``"pad"`` wraps it to the epoch's first positions, ``"drop"``
    leaves it out, ``"uneven"`` gives it out short: then some ranks have one shorter batch, or one batch fewer."""

    def __post_init__(self) -> None:
        require_int(self.batch_size, name="batch_size", minimum=1)
        require_int(self.start, name="position", minimum=0, maximum=self.num_samples)

    @property
    def global_batch(self) -> int:
        """Samples of one step over all ranks."""
        return self.batch_size * self.topology.world_size

    @property
    def rank_batches(self) -> int:
        """Batches that this rank delivers until the end of the epoch."""
        full, rest = divmod(self.num_samples - self.start, self.global_batch)
        if self.tail == "drop" or rest == 0:
            return full
        if self.tail == "pad":
            return full + 1
        return full + (1 if rest > self.topology.rank * self.batch_size else 0)

    @property
    def num_batches(self) -> int:
        """Batches that this reader (one worker of the rank) delivers until the end of the epoch."""
        return max(0, -((self.topology.worker - self.rank_batches) // self.topology.num_workers))

    def slots(self, first: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Return what ``positions`` does, but with padding where it stands: at or beyond ``num_samples``."""
        steps = self.topology.worker + np.arange(first, first + count, dtype=np.int64) * self.topology.num_workers
        starts = self.start + steps * self.global_batch + self.topology.rank * self.batch_size
        grid = starts[:, None] + np.arange(self.batch_size, dtype=np.int64)
        if self.tail == "uneven":
            inside = grid < self.num_samples
            return grid[inside], inside.sum(axis=1, dtype=np.int64)
        return grid.reshape(-1), np.full(count, self.batch_size, dtype=np.int64)

    def positions(self, first: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Return the positions of this reader's batches ``[first, first + count)``, and each batch's length.

        Returns:
            int64 ``(sum of lengths,)`` positions in delivery order, and int64 ``(count,)`` lengths.
        """
        slots, lengths = self.slots(first, count)
        return slots % self.num_samples, lengths

    def position_after(self, rank_batches: int) -> int:
        """Return the position that follows once this rank has received *rank_batches* batches.

        With tail "uneven" a rank that gets no part of the last global batch stays before it: others may not have
        received theirs yet.
        """
        if self.tail != "uneven" and rank_batches >= self.rank_batches:
            return self.num_samples
        return min(self.start + rank_batches * self.global_batch, self.num_samples)
