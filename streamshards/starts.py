"""Where an iteration begins, agreed upon by the processes that read for one rank."""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from streamshards.errors import StreamShardsError
from streamshards.plan.order import OrderSettings
from streamshards.runtime import MAX_WORKERS, current_worker, is_shared, parent_pid, shared_zeros, worker_seed


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


class _Said(NamedTuple):
    """What a ``restart`` said, as plain numbers."""

    generation: int
    """How many came before it."""
    epoch: int
    position: int
    num_shards: int
    lanes: int
    chunk: int
    shuffle_block: int
    since: int
    """The first generation of an unbroken row that said the same epoch from its beginning."""


_BEGUN: Final = len(_Said._fields)
_HEAD: Final = _BEGUN + 1
"""Words before those of the workers."""
_LEDGER_ROWS: Final = 4096


class SharedStart:
    """Where the next iteration begins, for the main process of a rank and for a plain DataLoader's workers alike.

    It lives in shared memory, so that it holds for every kind of worker: persistent ones see ``set_epoch`` and
    ``load_state_dict``, and the ones made anew for each epoch see which epochs were begun before them.

    Theory. The main process counts its own iterations. A plain DataLoader tells nobody that an iteration begins, but
    all its workers share a seed that is drawn anew for each one. So a *ledger* of (seed, epoch, generation) says which
    epoch each iteration is: the first worker of an iteration appends a row, its siblings find it. A row's seed is
    written last, and siblings write equal rows, so they agree without a lock, however late some of them start. Each
    worker notes the rows it has used, so that a seed that comes again (``torch.manual_seed`` before each epoch) is a
    new iteration. Each :meth:`restart` begins a *generation*. A worker's first iteration belongs to the generation in
    which its process was made, whatever has been said since; later ones to the latest. Persistent workers keep their
    seed, and count their further iterations themselves.

    Not elegant yet: workers of two iterations that are *begun* in the same microseconds may append to one row; and a
    persistent worker that is slow to begin sees a ``set_epoch`` that came after the iteration was asked for.
    ``StreamingDataLoader`` tells its workers where to begin, and has neither problem.
    """

    def __init__(self, *, seed: int, shuffle: bool) -> None:
        self._seed = seed
        self._shuffle = shuffle
        self._words = shared_zeros(_HEAD + MAX_WORKERS)
        self._ledger = shared_zeros(_LEDGER_ROWS, 3)
        self._owner = os.getpid()
        self._latest = _Said(0, 0, 0, 0, 0, 0, 0, 0)
        """As the owner last said it. A worker has it as it stood when its process was made."""
        # Of a worker process alone:
        self._seen: _Said | None = None
        self._first_epoch = 0
        self._passes = 0
        self._own: Start | None = None

    @property
    def generation(self) -> int:
        """How often :meth:`restart` was called."""
        return self._said().generation

    @property
    def said_since(self) -> int:
        """The generation since which nothing but the latest start has been said, and nobody has begun."""
        return self._said().since

    @property
    def have_workers_begun(self) -> bool:
        """Whether workers of a plain DataLoader have begun an iteration since the last :meth:`restart`."""
        seeds, _, generations = self._ledger.numpy().T
        return bool(np.any((generations == self.generation) & (seeds != 0)))

    def restart(self, start: Start) -> None:
        """Let the next iteration begin at *start*, and later ones with the epochs after.

        Its order is kept from now on; None leaves the order as it is.
        """
        self.own()
        if np.count_nonzero(self._ledger.numpy()[:, 0]) > _LEDGER_ROWS // 2:  # the rows of workers long gone
            self._ledger.zero_()
            self._words[_HEAD:] = 0
        before = self._said()
        said = before._replace(epoch=start.epoch, position=start.position, num_shards=start.num_shards)
        has_begun = bool(self._words[_BEGUN]) or self.have_workers_begun
        is_said_again = said == before and said.position == 0 and not has_begun
        if not is_said_again:
            said = said._replace(since=before.generation + 1)
        if start.order is not None:
            order = start.order
            said = said._replace(lanes=order.lanes, chunk=order.chunk, shuffle_block=order.shuffle_block)
        self._latest = said._replace(generation=said.generation + 1)
        self._words[:_HEAD] = torch.tensor([*self._latest, 0])

    def restart_worker(self, start: Start) -> None:
        """Let the next iteration of this worker process alone begin at *start*."""
        self._seen = self._latest if self._seen is None else self._said()
        self._own = start
        self._passes = 0

    def own(self) -> bool:
        """Make this the memory of this process and its workers, if a parent process made it; return whether it did.

        Ranks started from one process (``torch.multiprocessing.spawn``) must not share their epochs.
        """
        if self._owner == os.getpid() or current_worker() is not None:
            return False
        self._share(self._said())
        return True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not is_shared(self._words):  # copied or unpickled: workers that are made here would not see it
            self._share(self._said())

    def _share(self, said: _Said) -> None:
        """Begin anew in this process, at what was *said*."""
        self._latest = said
        self._words = shared_zeros(_HEAD + MAX_WORKERS)
        self._words[:_HEAD] = torch.tensor([*said, 0])
        self._ledger = shared_zeros(_LEDGER_ROWS, 3)
        self._owner = os.getpid()

    def said(self) -> Start:
        """Return what the last :meth:`restart` said, whoever has begun since."""
        return self._after(self._said(), 0)

    def peek(self) -> Start:
        """Return where the next iteration of this process begins."""
        if current_worker() is None:
            self.own()
            return self._after(self._said(), int(self._words[_BEGUN]))
        seen = self._seen or self._latest
        if self._passes and seen.generation == self.generation:
            return self._at(seen, self._first_epoch + self._passes)
        return self._own or self._after(self._said() if self._passes else seen, 0)

    def take(self) -> Start:
        """Return where this iteration begins, and count it as begun."""
        worker, seed = current_worker(), worker_seed()
        if worker is None or seed is None:
            start = self.peek()
            self._words[_BEGUN] += 1
            return start
        return self._take_in_worker(worker[0], seed)

    def _take_in_worker(self, worker: int, iteration_seed: int) -> Start:
        parent = parent_pid()
        if parent is not None and parent != self._owner:
            raise StreamShardsError(
                "this dataset was made in another process than the one that iterates, and was not used there before "
                "its workers began: call set_epoch on it there first, or iterate a StreamingDataLoader"
            )
        if self._seen is None:
            self._seen = self._latest
        elif self._seen.generation != self.generation and self._own is None:
            self._seen, self._passes = self._said(), 0
        if self._passes == 0:
            own_epoch = None if self._own is None else self._own.epoch
            self._first_epoch = self._epoch_of(iteration_seed, worker, self._seen, own_epoch)
        passes, self._passes = self._passes, self._passes + 1
        if passes:
            return self._at(self._seen, self._first_epoch + passes)
        if self._own is not None:
            own, self._own = self._own, None
            return own
        return self._after(self._seen, self._first_epoch - self._seen.epoch)

    def _epoch_of(self, seed: int, worker: int, said: _Said, own_epoch: int | None) -> int:
        """Return the epoch of the iteration whose workers share *seed*, entered into the ledger if it is new."""
        used = int(self._words[_HEAD + worker])
        ledger = self._ledger.numpy()
        seeds, epochs, generations = ledger.copy().T  # one look: a sibling may enter the row between two
        known = np.flatnonzero((seeds[used:] == seed) & (generations[used:] == said.generation))
        row = used + int(known[0]) if len(known) else int(np.count_nonzero(seeds))
        if row >= _LEDGER_ROWS:
            raise StreamShardsError(f"{row:,} epochs without a set_epoch: call it, or iterate a StreamingDataLoader")
        if len(known):
            epoch = int(epochs[row])
        else:
            before = np.flatnonzero(generations[:row] == said.generation)
            epoch = int(epochs[before[-1]]) + 1 if len(before) else said.epoch
            epoch = epoch if own_epoch is None else own_epoch
            ledger[row, 1:] = epoch, said.generation
            ledger[row, 0] = seed
        self._words[_HEAD + worker] = max(used, row + 1)
        return epoch

    def _said(self) -> _Said:
        return _Said(*self._words[:_BEGUN].tolist())

    def _after(self, said: _Said, begun: int) -> Start:
        """Return where the iteration begins that comes after *begun* others since *said*."""
        if begun:
            return self._at(said, said.epoch + begun)
        return self._at(said, said.epoch)._replace(position=said.position, num_shards=said.num_shards)

    def _at(self, said: _Said, epoch: int) -> Start:
        order = None
        if said.lanes:
            order = OrderSettings(
                shuffle=self._shuffle,
                seed=self._seed,
                lanes=said.lanes,
                chunk=said.chunk,
                shuffle_block=said.shuffle_block,
            )
        return Start(epoch, 0, 0, order)
