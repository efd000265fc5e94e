"""Samples at positions of an epoch's global order, as training saw them, each with where it came from.

Theory. The engine that trained reads again: a state says all that shapes the order, so a dataset that is set to a
place in it delivers what training received there, rows that were refilled for corrupt shards included, as long as the
same shards are corrupt.

A reader of the rest of an epoch holds a block of each lane, and a cluster's order may have hundreds. So positions are
read in *windows* of a few chunks: the dataset is opened as rank 0 of so many ranks that the window is all that this
rank gets of the epoch. Then nothing is read ahead of it, and memory holds the blocks of a few lanes. A block is
decoded again in each window that needs it: this is made for looking at thousands of samples, not at millions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from streamshards.dataset import StreamingDataset
from streamshards.errors import OptionInvalid, ResumeMismatch
from streamshards.options import OrderOptions, PrefetchOptions, RetryOptions, require_int
from streamshards.plan.state import State
from streamshards.plan.subset import Skip, Take, parse_cuts
from streamshards.plan.topology import Topology

_FEW_LANES: Final = 8
"""Blocks that are in memory at once, about; a block of 64 MiB is usual."""
_SAMPLES_AT_ONCE: Final = 256
"""Samples in a window, at least, where there are few lanes."""
_NO_LIMIT: Final = PrefetchOptions(memory_bytes=1 << 50)
"""Nothing is read beyond the window, and its blocks are needed whatever they take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How a store is read."""

    storage_options: Mapping[str, Any] | None = None
    retry: RetryOptions | None = None
    trust_pickle: bool = False


class Seen(NamedTuple):
    """Where a sample was delivered, and where it came from."""

    epoch: int
    position: int
    """In the epoch's global order."""
    shard: int
    """Its number in the index."""
    name: str
    """The shard's."""
    row: int
    """In the shard."""


class Fit(NamedTuple):
    """Whether a state can be gone on from with the dataset at a url."""

    fits: bool
    told: str
    """What differs, or what has changed since; empty if nothing has."""


def is_mixture(state: State) -> bool:
    """Return whether *state* is one of several datasets together."""
    return state.identity.get("kind") == "mixture"


def first_state(url: str, *, order: OrderOptions, seed: int, shuffle: bool, access: Access) -> State:
    """Return the state of a first start with this order, at the beginning of epoch 0.

    Args:
        url: Where the dataset is.
        order: With lanes and chunk; the size of a shuffle block may be left to the data, as in training.
        seed: Of the shuffle.
        shuffle: Whether training shuffled.
        access: How to read it.

    Raises:
        IndexInvalid, OptionInvalid, StoreError: As for ``StreamingDataset``.
    """
    dataset = StreamingDataset(
        url,
        seed=seed,
        shuffle=shuffle,
        order=order,
        topology=Topology(),
        storage_options=access.storage_options,
        retry=access.retry,
        trust_pickle=access.trust_pickle,
    )
    return State.from_dict(dataset.state_dict())


def in_epoch(state: State, epoch: int) -> State:
    """Return *state* itself if it is in *epoch*, or else the beginning of that epoch in the same order."""
    require_int(epoch, name="epoch", minimum=0)
    return state if epoch == state.epoch else replace(state, epoch=epoch, position=0, worker_batches=0, num_workers=1)


def span(state: State, *, position: int | None, last: int | None, limit: int | None) -> range:
    """Return the positions to look at.

    Args:
        state: Says where the epoch stands and ends.
        position: Where to stand instead.
        last: Look at so many samples before that place. None: from there on.
        limit: How many at most.

    Raises:
        OptionInvalid: There are none.
    """
    for name, value, minimum in (("position", position, 0), ("last", last, 1), ("limit", limit, 0)):
        if value is not None:
            require_int(value, name=name, minimum=minimum)
    if position is None and state.worker_batches:
        raise OptionInvalid(
            f"the state is that of one of {state.num_workers} DataLoader workers, {state.worker_batches:,} batches "
            f"after position {state.position:,}; how far training was is not in it. Give a --position"
        )
    at = state.position if position is None else position
    if last is not None:
        if not 0 < at <= state.num_samples:
            raise OptionInvalid(
                f"no samples before position {at:,} of epoch {state.epoch}, which has {state.num_samples:,}; "
                "give another --epoch and --position"
            )
        found = range(max(0, at - last), at)
    else:
        if at >= state.num_samples:
            raise OptionInvalid(
                f"no sample at position {at:,}: epoch {state.epoch} has {state.num_samples:,}; its last ones: --last "
                f"N, the next ones: --epoch {state.epoch + 1}"
            )
        found = range(at, state.num_samples)
    return found if limit is None else found[:limit]


def read_seen(
    url: str, state: State, positions: range, *, columns: Sequence[str] | None = None, access: Access
) -> Iterator[tuple[Seen, dict[str, Any]]]:
    """Return an iterator over what is delivered at *positions* of the state's epoch, and where it came from.

    The dataset is opened and the arguments are checked before it starts.

    Args:
        url: Where the dataset is.
        state: Its epoch and its order count; its own place does not.
        positions: Ascending without gaps.
        columns: Names of the fields, as for ``StreamingDataset``. None: all.
        access: How to read it.

    Raises:
        ResumeMismatch: The state is not of the dataset at *url*, or it is of a mixture.
        IndexInvalid, OptionInvalid, StoreError: As for ``StreamingDataset``.
        TooManyCorrupt, UnsafePickle, StoreError: While iterating.
    """
    order = state.order
    window = max(1, min(len(positions), _FEW_LANES * order.chunk))
    if order.lanes <= _FEW_LANES:
        window = max(1, min(len(positions), max(window, _SAMPLES_AT_ONCE)))
    kept: list[dict[str, Any]] = []

    def keep(sample: dict[str, Any]) -> int:
        kept.append(sample)
        return 0  # a batch of something

    dataset = _opened(
        url,
        state,
        access,
        batch_size=window,
        topology=Topology(world_size=max(1, -(-state.num_samples // window))),
        tail="uneven",
        with_keys=True,
        columns=columns,
        max_corrupt=1.0,
        prefetch=_NO_LIMIT,
        transform=keep,
    )
    _go(dataset, state, positions.start)
    return _windows(dataset, state, positions, kept)


def check_fit(url: str, state: State, *, access: Access) -> Fit:
    """Return whether *state* is one of the dataset at *url*, or for a mixture of one of its sources.

    Raises:
        IndexInvalid, OptionInvalid, StoreError: As for ``StreamingDataset``.
    """
    if is_mixture(state):
        return _source_fit(url, state, access)
    try:
        dataset = _opened(url, state, access, topology=Topology())
        _go(dataset, state, state.position)
    except ResumeMismatch as error:
        return Fit(False, str(error))
    then = state.identity.get("num_shards", dataset.index.num_shards)
    grown = dataset.index.num_shards - then
    return Fit(True, f"{grown:,} shards have been appended since" if grown else "")


def _windows(
    dataset: StreamingDataset, state: State, positions: range, kept: list[dict[str, Any]]
) -> Iterator[tuple[Seen, dict[str, Any]]]:
    names, window = dataset.index.names, dataset.batch_size or 1
    for first in range(positions.start, positions.stop, window):
        _go(dataset, state, first)
        kept.clear()
        for _ in dataset:
            pass  # one batch, which the transform has kept
        for sample in kept[: positions.stop - first]:
            key = sample.pop("key")
            yield Seen(key["epoch"], key["position"], key["shard"], names[key["shard"]], key["row"]), sample


def _opened(url: str, state: State, access: Access, **options: Any) -> StreamingDataset:
    """Return the dataset at *url*, cut as in *state*."""
    if is_mixture(state):
        raise ResumeMismatch(
            f"{url}: the state is of a mixture of {_sources_in_words(state)}; its samples lie in all of these, and cat "
            'shows one dataset. Train with Mixture(…, with_keys=True): each sample\'s "source" and "key" then say '
            "where it comes from"
        )
    text = state.identity.get("subset", "")
    try:
        cuts = parse_cuts(text if isinstance(text, str) else repr(text))
    except OptionInvalid as error:
        raise ResumeMismatch(f"the state cannot be right: {error}") from error
    dataset = StreamingDataset(
        url,
        seed=state.order.seed,
        shuffle=state.order.shuffle,
        storage_options=access.storage_options,
        retry=access.retry,
        trust_pickle=access.trust_pickle,
        **options,
    )
    for cut in cuts:
        if isinstance(cut, Take):
            dataset = dataset.take(cut.count)
        elif isinstance(cut, Skip):
            dataset = dataset.skip(cut.count)
        else:
            dataset = dataset.split(float(cut.fraction), seed=cut.seed, by=cut.by)[cut.side]
    return dataset


def _go(dataset: StreamingDataset, state: State, position: int) -> None:
    """Let *dataset* stand at *position* of the state's epoch and order, also if shards have been appended since.

    Raises:
        ResumeMismatch: It is another dataset.
    """
    wanted = replace(state, position=position, worker_batches=0, num_workers=1)
    with suppress(ResumeMismatch):
        dataset.load_state_dict(wanted.to_dict(), strict=False)
        if State.from_dict(dataset.state_dict()) == wanted:
            return
    dataset.load_state_dict(wanted.to_dict())  # it differs in more than its size: raises, and says in what


def _source_fit(url: str, state: State, access: Access) -> Fit:
    dataset = StreamingDataset(url, storage_options=access.storage_options, retry=access.retry, topology=Topology())
    fingerprint = dataset.index.fingerprint
    names = [name for name, source in _sources(state).items() if source.get("fingerprint") == fingerprint]
    if names:
        return Fit(True, f"is source {', '.join(names)} of the mixture; the other sources are not checked")
    return Fit(False, f"{dataset.url}: none of the mixture's sources; those are {_sources_in_words(state)}")


def _sources(state: State) -> dict[str, Mapping[str, Any]]:
    """Return what a mixture's state says of its sources, by name."""
    sources = state.identity.get("sources")
    named = sources.items() if isinstance(sources, Mapping) else ()
    return {str(name): source for name, source in named if isinstance(source, Mapping)}


def _sources_in_words(state: State) -> str:
    return ", ".join(f"{name} (fingerprint {source.get('fingerprint')})" for name, source in _sources(state).items())
