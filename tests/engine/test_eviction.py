"""What goes from the node cache: the decision by itself, and what whole epochs make of it, without a file."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.engine.eviction import Entry, Pass, Shards, allowance, decide, oldest

ENTRIES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=12).map(
    lambda pairs: [Entry(Path(f"{number}.raw"), size, used) for number, (size, used) in enumerate(pairs)]
)


def own(numbers: Sequence[int]) -> tuple[Shards, ...]:
    return (Shards([str(number) for number in range(12)], np.array(sorted(numbers), dtype=np.int64), "raw"),)


PASSES = st.builds(Pass, st.sets(st.integers(0, 11)).map(lambda numbers: own(sorted(numbers))), st.integers(0, 6))


def size_of(entries: Sequence[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


# -- one decision ------------------------------------------------------------------------------------------------------


@given(ENTRIES, st.integers(-10, 300))
def test_the_least_recently_used_go_and_no_more_than_must(entries: list[Entry], excess: int) -> None:
    """What goes is enough, if all is; it was used no later than whatever stays; one fewer would not be enough."""
    gone = oldest(entries, excess_bytes=excess)
    kept = [entry for entry in entries if entry not in gone]
    assert size_of(gone) >= excess or not kept
    if kept and gone:
        assert max(entry.used_ns for entry in gone) <= min(entry.used_ns for entry in kept)
    if gone:
        assert size_of(gone[:-1]) < excess


@given(ENTRIES, PASSES)
def test_needless_is_what_is_not_the_readers_own_and_was_not_used_lately(entries: list[Entry], reader: Pass) -> None:
    """Nothing else may go for a new entry."""
    names = {f"{number}.raw" for shards in reader.own for number in shards.numbers}
    expected = [entry for entry in entries if entry.path.name not in names and entry.used_ns < reader.since_ns]
    assert reader.needless(entries) == expected


@given(ENTRIES, st.integers(0, 60), st.integers(0, 60), st.integers(-60, 100), PASSES)
def test_a_decision_keeps_the_budget_and_what_is_needed(
    entries: list[Entry], new: int, pending: int, spare: int, reader: Pass
) -> None:
    """Granted means that it all fits. While the cache is within what it may take, only needless entries go, and only
    for a new entry that then fits beside the others; over it, the cache shrinks below it, whoever needs what."""
    allowed = max(0, size_of(entries) + spare)
    done = decide(entries, new_bytes=new, pending_bytes=pending, allowed_bytes=allowed, reader=reader)
    kept = [entry for entry in entries if entry not in done.gone]
    assert done.left_bytes == size_of(kept)
    assert done.left_bytes <= allowed
    if done.verdict == "granted":
        assert not new or done.left_bytes + new + pending <= allowed
    if done.verdict == "refused":
        assert new > allowed
    if size_of(entries) <= allowed:
        assert set(done.gone) <= set(reader.needless(entries))
        assert not done.gone or done.left_bytes + new <= allowed
    if done.verdict == "full":
        assert done.left_bytes + new > allowed
        assert size_of([entry for entry in kept if entry not in reader.needless(kept)]) + new > allowed
    if done.verdict == "busy":
        assert done.left_bytes + new <= allowed < done.left_bytes + new + pending


def test_the_allowance_is_the_budget_or_what_leaves_the_disk_its_share() -> None:
    """With room enough the budget; else what is cached already, less what must become free; never below nothing."""
    assert allowance(50, free_bytes=1000, budget_bytes=100, keep_free_bytes=10) == 100
    assert allowance(50, free_bytes=30, budget_bytes=100, keep_free_bytes=10) == 70
    assert allowance(50, free_bytes=0, budget_bytes=100, keep_free_bytes=10) == 40
    assert allowance(5, free_bytes=0, budget_bytes=100, keep_free_bytes=10) == 0


def test_shards_in_another_form_are_not_the_readers_own() -> None:
    """What a change of mode leaves behind is of no use to the reader, nor are shards that its part does not have."""
    shards = Shards(["aa", "bb", "cc"], np.array([0, 2]), "raw")
    assert shards.among(["aa.raw", "bb.raw", "cc.object", "dd.raw"]) == {"aa.raw"}
    assert Shards(["aa", "bb"], np.arange(2), "object").among(["aa.raw", "bb.object"]) == {"bb.object"}


def test_a_million_shards_take_no_memory_but_for_the_entries() -> None:
    """To know which of a hundred entries belong to a dataset of 10**6 shards takes less than a mebibyte."""
    digests = [f"{number:032x}" for number in range(1_000_000)]
    half = np.arange(0, 1_000_000, 2)
    names = [f"{number:032x}.raw" for number in range(0, 2_000_000, 20_000)]
    tracemalloc.start()
    try:
        found = Shards(digests, half, "raw").among(names)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 50
    assert peak < 1 << 20


# -- whole epochs ------------------------------------------------------------------------------------------------------


class Cache:
    """A cache without files; time is the number of uses. Like the real one, it asks once a pass what may go."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.entries: dict[str, Entry] = {}
        self.num_evicted = 0
        self.now = 0
        self._used = 0
        self._full: set[Pass] = set()

    def use(self, name: str, nbytes: int, reader: Pass) -> bool:
        """Return whether it is a hit; a miss is stored, if it may be."""
        self.now += 1
        known = self.entries.get(name)
        if known is not None:
            self.entries[name] = known._replace(used_ns=self.now)
            return True
        if self._used + nbytes > self.budget:
            if reader in self._full:
                return False
            entries = list(self.entries.values())
            done = decide(entries, new_bytes=nbytes, pending_bytes=0, allowed_bytes=self.budget, reader=reader)
            for entry in done.gone:
                del self.entries[entry.path.name]
            self._used = done.left_bytes
            self.num_evicted += len(done.gone)
            if done.verdict == "full":
                self._full.add(reader)
                return False
        self.entries[name] = Entry(Path(name), nbytes, self.now)
        self._used += nbytes
        return False

    def holds(self, job: Job) -> int:
        return sum(name.startswith(job.name) for name in self.entries)


class Job:
    """Reads one dataset, pass after pass."""

    def __init__(self, cache: Cache, name: str, num_shards: int, *, shuffle: bool = True, seed: int = 0) -> None:
        self.name = name
        self.rates: list[float] = []
        """Hits of each whole pass, of its shards."""
        self._cache = cache
        self._digests = [f"{name}{number}" for number in range(num_shards)]
        self._rng = random.Random(f"{name} {seed}")
        self._sizes = [self._rng.randint(8, 12) for _ in self._digests]
        self._shuffle = shuffle
        self._begun = (0, 0)

    def reading(self) -> Iterator[None]:
        """Read for ever, a shard for each ``next``."""
        while True:
            yield from self.one_pass()

    def one_pass(self) -> Iterator[None]:
        self._cache.now += 1
        before_last, last = self._begun
        since = before_last or last or self._cache.now
        self._begun = last, self._cache.now
        reader = Pass((Shards(self._digests, np.arange(len(self._digests)), "raw"),), since)
        numbers = list(range(len(self._digests)))
        if self._shuffle:
            self._rng.shuffle(numbers)
        hits = 0
        for number in numbers:
            hits += self._cache.use(f"{self._digests[number]}.raw", self._sizes[number], reader)
            yield
        self.rates.append(hits / len(numbers))


def read(job: Job, passes: int = 1) -> None:
    for _ in range(passes):
        for _ in job.one_pass():
            pass


@pytest.mark.parametrize("shuffle", [True, False])
def test_half_a_cache_gives_half_the_hits(shuffle: bool) -> None:
    """From the second epoch on, in order as well as shuffled; nothing is evicted, ever."""
    cache = Cache(1000)
    job = Job(cache, "a", 200, shuffle=shuffle)
    read(job, 4)
    assert job.rates[0] == 0
    assert min(job.rates[1:]) >= 0.45
    assert cache.num_evicted == 0


def test_who_nobody_reads_any_more_gives_way_at_once() -> None:
    """A dataset that fills the cache is gone after the first epoch of the next one, whose second epoch is all hits."""
    cache = Cache(1000)
    old, new = Job(cache, "old", 200), Job(cache, "new", 80)
    read(old, 3)
    read(new, 2)
    assert cache.holds(new) == 80
    assert new.rates == [0, 1]
    read(Job(cache, "next", 200))
    assert cache.holds(new) == cache.holds(old) == 0


def test_who_ends_while_others_read_gives_way_soon() -> None:
    """What was used two passes ago is spared in this one, and not in the next."""
    cache = Cache(1000)
    lasting, ending = Job(cache, "lasting", 100), Job(cache, "ending", 100)
    for _ in zip(lasting.one_pass(), ending.one_pass(), strict=True):
        pass
    read(lasting, 2)
    assert cache.holds(ending) > 40
    read(lasting, 2)
    assert lasting.rates[-1] >= 0.9


def test_training_and_validation_in_turn() -> None:
    """Each keeps what it had after the first round: nothing is evicted any more, and together they have the hits that
    a cache of this size can give."""
    cache = Cache(1000)
    train, valid = Job(cache, "train", 150), Job(cache, "valid", 40)
    for number in range(5):
        read(train)
        read(valid)
        if not number:
            after_first = cache.num_evicted
    assert cache.num_evicted == after_first
    assert valid.rates[1:] == [1.0] * 4
    assert min(train.rates[2:]) >= (1000 / 10 - 40) / 150 - 0.07


def test_validation_in_the_middle_of_every_epoch() -> None:
    """Ten short passes of validation within each epoch of training: the same."""
    cache = Cache(1000)
    train, valid = Job(cache, "train", 150), Job(cache, "valid", 30)
    steps = train.reading()
    for number in range(50):
        for _ in itertools.islice(steps, 15):
            pass
        read(valid)
        if number == 20:
            after_two = cache.num_evicted
    assert cache.num_evicted == after_two
    assert min(valid.rates[1:]) == 1
    assert min(train.rates[2:]) >= (1000 / 10 - 30) / 150 - 0.07


@given(
    budget=st.integers(300, 1500),
    jobs=st.lists(st.tuples(st.integers(40, 200), st.integers(3, 9), st.booleans()), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_jobs_that_read_at_the_same_time_do_not_thrash(
    budget: int, jobs: list[tuple[int, int, bool]], seed: int
) -> None:
    """Datasets of any sizes, read at any speeds, which vary: in twelve passes of the slowest, no more than thrice as
    many entries go as fit (least recently used: about as many as are read), and the cache is full or holds all.

    Who reads one for three passes while nobody reads the other, and then the other way round, does evict: nobody knows
    that the other comes back.
    """
    cache, rng = Cache(budget), random.Random(seed)
    running = [
        Job(cache, f"job{number}-", num, shuffle=shuffle, seed=seed) for number, (num, _, shuffle) in enumerate(jobs)
    ]
    steps = [(job.reading(), speed) for job, (_, speed, _) in zip(running, jobs, strict=True)]

    while min(len(job.rates) for job in running) < 12:
        for reading, speed in steps:
            for _ in range(rng.randint(speed - speed // 3, speed + speed // 3)):
                next(reading)
    assert cache.num_evicted <= 3 * budget / 10
    held = sum(entry.nbytes for entry in cache.entries.values())
    assert len(cache.entries) == sum(num for num, _, _ in jobs) or held > budget * 0.9 - 24
