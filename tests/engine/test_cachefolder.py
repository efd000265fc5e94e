"""The folder of the node cache under random sequences of whatever its users do."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamshards.engine.cachefolder import FORMAT, Busy, CacheFolder, Full, Refused
from streamshards.engine.cachemeter import disk_bytes
from streamshards.engine.eviction import Pass, Shards
from streamshards.options import KiB
from streamshards.shard.raw import write_all

NUM_NAMES: Final = 16
BUDGETS: Final = (64 * KiB, 48 * KiB)
FOLDERS: Final = st.integers(0, len(BUDGETS) - 1)
NUMBERS: Final = st.integers(0, NUM_NAMES - 1)
DIGESTS: Final = [f"{number:032x}"[::-1] for number in range(NUM_NAMES)]
TIMES: Final = st.integers(1, 9)
"""Of use, in nanoseconds since 1970: before anything else that happens here."""
READERS: Final = st.builds(
    lambda own, since: Pass((Shards(DIGESTS, np.array(sorted(own), dtype=np.int64), "raw"),), since),
    st.sets(NUMBERS),
    st.one_of(TIMES, st.just(1 << 62)),
)
EITHER: Final = st.one_of(st.just(Pass()), READERS)
NO_PROCESS: Final = 1 << 30


def name_of(number: int) -> str:
    return f"{DIGESTS[number]}.raw"


def content_of(number: int) -> bytes:
    """Return what entry *number* holds: up to 20 KiB, different from all others."""
    return bytes([number]) * (1 + number * 1300)


class Users(RuleBasedStateMachine):
    """Two users of one folder, with budgets of their own: they write, at the same time, read, evict and clear."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp()
        self.folders = [CacheFolder(self.directory, budget_bytes=budget, keep_free_bytes=0) for budget in BUDGETS]
        self.writing: list[tuple[int, contextlib.ExitStack]] = []
        self.reading: list[tuple[int, int]] = []

    def teardown(self) -> None:
        for _, stack in self.writing:
            self._end(stack)
        for descriptor, _ in self.reading:
            os.close(descriptor)
        shutil.rmtree(self.directory)

    @property
    def root(self) -> Path:
        return self.folders[0].home / FORMAT

    @rule(folder=FOLDERS, number=NUMBERS, reader=EITHER)
    def begin(self, folder: int, number: int, reader: Pass) -> None:
        """Begin to write an entry. Whoever is granted one is within its own budget, with all that is being written; and
        what goes for it is needless, unless there was more than this user allows."""
        before = self.folders[folder].entries()
        stack = contextlib.ExitStack()
        nbytes = len(content_of(number))
        try:
            descriptor, evicted = stack.enter_context(self.folders[folder].writing(name_of(number), nbytes, reader))
        except (Busy, Full):
            evicted = None
        gone = set(before) - set(self.folders[folder].entries())
        if sum(entry.nbytes for entry in before) <= BUDGETS[folder]:
            assert gone <= set(reader.needless(before))
        if evicted is None:
            return
        assert evicted == len(gone)
        write_all(descriptor, content_of(number))
        self.writing.append((number, stack))
        assert self._taken() <= BUDGETS[folder]

    @precondition(lambda self: self.writing)
    @rule(which=st.integers(0, 9))
    def finish(self, which: int) -> None:
        number, stack = self.writing.pop(which % len(self.writing))
        if self._end(stack):
            assert self.folders[0].path(name_of(number)).read_bytes() == content_of(number)

    @precondition(lambda self: self.writing)
    @rule(which=st.integers(0, 9))
    def give_up(self, which: int) -> None:
        _, stack = self.writing.pop(which % len(self.writing))
        with contextlib.suppress(ZeroDivisionError), stack:
            raise ZeroDivisionError

    @rule(folder=FOLDERS, number=NUMBERS)
    def open(self, folder: int, number: int) -> None:
        descriptor = self.folders[folder].open(name_of(number))
        if descriptor is not None:
            self.reading.append((descriptor, number))

    @precondition(lambda self: self.reading)
    @rule(which=st.integers(0, 9))
    def read(self, which: int) -> None:
        """What was opened once is right to its last byte, whatever happened since."""
        descriptor, number = self.reading.pop(which % len(self.reading))
        with open(descriptor, "rb", buffering=0) as file:
            assert file.read() == content_of(number)

    @rule(number=NUMBERS, used_ns=TIMES)
    def age(self, number: int, used_ns: int) -> None:
        """Let an entry not have been used for long."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.folders[0].path(name_of(number)), ns=(used_ns, used_ns))

    @rule(folder=FOLDERS)
    def evict(self, folder: int) -> None:
        before = self.folders[folder].entries()
        with contextlib.suppress(FileNotFoundError):  # nobody has written yet
            assert self.folders[folder].evict() is not None
            held = sum(entry.nbytes for entry in self.folders[folder].entries())
            assert held <= BUDGETS[folder]
            assert held == sum(entry.nbytes for entry in before) or held > BUDGETS[folder] // 2

    @rule(folder=FOLDERS)
    def clear(self, folder: int) -> None:
        with contextlib.suppress(Refused):
            self.folders[folder].clear()
        assert self.folders[folder].entries() == []

    @rule(size=st.integers(0, 100_000))
    def kill_a_writer(self, size: int) -> None:
        """Leave what a process leaves that is killed: an unfinished file, and its claim."""
        with contextlib.suppress(FileNotFoundError):
            (self.root / "new" / f"{NO_PROCESS}-0123456789abcdef-{size}.tmp").write_bytes(b"x")
            self.folders[0]._meter.claim(disk_bytes(size))

    @rule(folder=FOLDERS)
    def start_anew(self, folder: int) -> None:
        self.folders[folder] = CacheFolder(self.directory, budget_bytes=BUDGETS[folder], keep_free_bytes=0)

    @invariant()
    def the_budget_holds(self) -> None:
        """Of the more generous user, with all that is being written; each can only hold itself back."""
        assert self._taken() <= max(BUDGETS)

    @invariant()
    def entries_are_right(self) -> None:
        for entry in self.folders[0].entries():
            number = DIGESTS.index(entry.path.stem)
            assert entry.path.read_bytes() == content_of(number)
            assert entry.nbytes == disk_bytes(len(content_of(number)))

    def _taken(self) -> int:
        pending = [path.name.split("-")[-1][:-4] for path in (self.root / "new").glob(f"{os.getpid()}-*")]
        return sum(entry.nbytes for entry in self.folders[0].entries()) + sum(disk_bytes(int(size)) for size in pending)

    @staticmethod
    def _end(stack: contextlib.ExitStack) -> bool:
        """Publish what was written; return whether it was, rather than cleared before."""
        try:
            stack.close()
        except FileNotFoundError:
            return False
        return True


TestUsers = Users.TestCase
TestUsers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
