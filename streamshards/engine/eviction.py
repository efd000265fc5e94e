"""What goes from the node cache. Pure: it decides over what somebody has seen in the folder, and touches nothing.

Theory. An epoch uses each shard once, so what was used longest ago is what comes next: in a cache of half the data,
*least recently used* gives hardly a hit. Keeping what is there gives half. So:

- *Room for a new entry* is made only by entries that nobody needs: they are not the reader's own (the shards of what it
  reads, in the form that it keeps), and nobody has used them since the pass before its previous one began; in its first
  passes, since the first one began. Least recently used goes first. If not enough may go, the new one is not stored.
- So a dataset that nobody reads any more gives way at once, and two that are read at the same time, or in turn, leave
  each other alone. Two passes back, not one: a shuffled epoch uses a shard up to two passes after the last time, and
  with one, jobs of the same speed took from each other for ever. From who passes half as fast, entries do go over.
- *To shrink*, because the budget was lowered or others fill the disk, anything may go, least recently used first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np

from streamshards.plan.order import Int64Array

Kind = Literal["raw", "object"]
"""Of an entry, and its file's suffix: decoded, or as it came."""
Verdict = Literal["granted", "busy", "full", "refused"]
"""On a new entry: it fits; not beside what others are writing; not beside what is needed; not even alone."""

_SLACK: Final = 16
"""An eviction leaves 1/16 of the budget free, so that not every new entry needs one."""
_AFTER_ALL_NS: Final = 1 << 63
"""Later than any time of use."""


class Entry(NamedTuple):
    """A file of the cache."""

    path: Path
    nbytes: int
    """Of disk."""
    used_ns: int
    """When it was last used."""


@dataclass(frozen=True, slots=True)
class Shards:
    """Shards of one dataset, as they are kept."""

    digests: Sequence[str]
    """Of all its shards; not copied."""
    numbers: Int64Array
    """Which of them, ascending."""
    kind: Kind

    def among(self, names: Iterable[str]) -> set[str]:
        """Return which of the entries *names* are ours. Takes no more memory than these."""
        suffix = f".{self.kind}"
        stems = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
        found = [(number, digest) for number, digest in enumerate(self.digests) if digest in stems]
        if found and len(self.numbers) < len(self.digests):
            wanted = np.array([number for number, _ in found])
            places = np.minimum(self.numbers.searchsorted(wanted), len(self.numbers) - 1)
            mine = self.numbers[places] == wanted if len(self.numbers) else np.zeros(len(found), dtype=bool)
            found = [pair for pair, is_mine in zip(found, mine, strict=True) if is_mine]
        return {digest + suffix for _, digest in found}


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One pass of one reader, as the cache sees it."""

    own: Sequence[Shards] = ()
    """What it reads."""
    since_ns: int = _AFTER_ALL_NS
    """What anybody used since then is needed. By default nothing is."""

    def needless(self, entries: Collection[Entry]) -> list[Entry]:
        """Return what may go for a new entry of ours."""
        old = [entry for entry in entries if entry.used_ns < self.since_ns]
        own: set[str] = set()
        if old:
            own = own.union(*(shards.among(entry.path.name for entry in old) for shards in self.own))
        return [entry for entry in old if entry.path.name not in own]


class Decision(NamedTuple):
    """What goes, and whether a new entry may come."""

    gone: list[Entry]
    left_bytes: int
    """Of the entries that stay."""
    verdict: Verdict


def allowance(cached_bytes: int, *, free_bytes: int, budget_bytes: int, keep_free_bytes: int) -> int:
    """Return how much the cache may take: the budget, and no more than leaves *keep_free_bytes* free."""
    return max(0, min(budget_bytes, cached_bytes + free_bytes - keep_free_bytes))


def oldest(entries: Collection[Entry], *, excess_bytes: int) -> list[Entry]:
    """Return the least recently used of *entries* that together take *excess_bytes*, or all of them."""
    gone: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.used_ns, entry.path)):
        if excess_bytes <= 0:
            break
        gone.append(entry)
        excess_bytes -= entry.nbytes
    return gone


def decide(
    entries: Sequence[Entry], *, new_bytes: int, pending_bytes: int, allowed_bytes: int, reader: Pass
) -> Decision:
    """Return what must go, and whether a new entry may come.

    Args:
        entries: What is there.
        new_bytes: What the new entry will take; 0 if there is none.
        pending_bytes: What others are writing.
        allowed_bytes: For all together.
        reader: Whose entry it is.
    """
    left = sum(entry.nbytes for entry in entries)
    target = allowed_bytes - allowed_bytes // _SLACK
    gone: list[Entry] = []
    if left > allowed_bytes:
        gone = oldest(entries, excess_bytes=left - target)
        left -= _sum(gone)
    if new_bytes > allowed_bytes:
        return Decision(gone, left, "refused")
    if new_bytes and left + new_bytes + pending_bytes > allowed_bytes:
        shrunk = set(gone)
        needless = reader.needless([entry for entry in entries if entry not in shrunk])
        if left - _sum(needless) + new_bytes <= allowed_bytes:
            more = oldest(needless, excess_bytes=left + new_bytes + pending_bytes - target)
            gone += more
            left -= _sum(more)
    if left + new_bytes > allowed_bytes:
        return Decision(gone, left, "full")
    return Decision(gone, left, "granted" if left + new_bytes + pending_bytes <= allowed_bytes else "busy")


def _sum(entries: Iterable[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)
