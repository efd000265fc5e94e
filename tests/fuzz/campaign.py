"""The fuzzer: mutated inputs by the hundred thousand, and a judge. ``make fuzz`` runs it for ten minutes.

Theory. A child takes input after input, in a bounded address space, with a timer on each, and tells the number of the
one at hand in shared memory before it begins. When a child dies, the parent knows which input did it, saves that under
``tests/attacks/found/``, and forks the next one. An input is a pure function of its number, so a number is all that is
needed to have it again.

The oracle. *Damaged* inputs, whose checksums no longer hold: an error of ours, or exactly the original rows. *Hostile*
ones, whose checksums were reckoned anew: an error of ours, or any rows. Never a crash, a hang, another exception, or
more memory than the bound. The digest that an index promises is not looked at here: it would refuse all of them.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from streamshards.errors import ShardCorrupt, StreamShardsError
from streamshards.plan.index import Index, is_safe_name
from streamshards.plan.state import State
from streamshards.shard.columns import to_batch, to_samples
from streamshards.shard.frames import FrameReader
from streamshards.shard.layouts import columns_of, load_foreign
from streamshards.shard.partial import PartialShard
from streamshards.shard.payload import FramedShard, PayloadShard, tail_of
from streamshards.shard.raw import RawFile
from streamshards.shard.reader import BaseReader
from streamshards.shard.schema import Schema
from tests.fuzz.inputs import DIGEST, INDEX, SEED, Input, make_input

MiB: Final = 1 << 20
MAX_RAW_BYTES: Final = MiB
"""What an index would promise of each shard."""
BOUND_BYTES: Final = 2 * MAX_RAW_BYTES + 64 * MiB
"""Address space that one input may take: twice what is declared, and 64 MiB."""
MAX_S: Final = 10.0
MAX_DICTS: Final = 100_000
"""Rows that are looked at one by one; a dict for each of 2**31 rows would be ours, not the library's."""
FOUND: Final = Path(__file__).parent.parent / "attacks" / "found"
ORIGINAL: Final = Index.parse(INDEX, url="seed")


@dataclass
class Figures:
    """What came of the inputs; everything from ``wrong_rows`` on must be 0."""

    inputs: int = 0
    shards: int = 0
    caught: int = 0
    """Errors of ours."""
    harmless: int = 0
    """Read, and right: or hostile, and read as what it now says."""
    wrong_rows: int = 0
    other_errors: int = 0
    crashes: int = 0
    hangs: int = 0
    over_bound: int = 0

    @property
    def faults(self) -> int:
        return self.wrong_rows + self.other_errors + self.crashes + self.hangs + self.over_bound

    def table(self) -> str:
        words = {field.name.replace("_", " "): getattr(self, field.name) for field in fields(self)}
        return "\n".join(f"{name:<14}{value:>12,}" for name, value in words.items())


# -- one input ---------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return *value* as what compares."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


ROWS: Final = [plain(row) for row in to_samples(FramedShard(SEED, name="seed", max_raw_bytes=MAX_RAW_BYTES).columns())]


def read_shard(reader: BaseReader, rng: random.Random) -> bool:
    """Read all of it, and some rows of some columns; return whether that was the seed's."""
    columns = reader.columns()
    if columns.num_rows > MAX_DICTS:
        return False
    is_same = [plain(row) for row in to_samples(columns)] == ROWS
    lo = rng.randint(0, reader.num_rows)
    hi = rng.randint(lo, reader.num_rows)
    some = reader.columns(Schema(tuple(f for f in reader.schema.fields if rng.random() < 0.5)), lo, hi)
    to_batch(some)
    if is_same and some.schema.fields:
        names = [field.path[0] for field in some.schema.fields]
        return [plain(row) for row in to_samples(some)] == [{n: row[n] for n in names} for row in ROWS[lo:hi]]
    return is_same


def _shard(data: bytes, rng: random.Random) -> bool:
    if rng.random() < 0.3:
        return _part(data, rng)
    return read_shard(FramedShard(data, name="s", max_raw_bytes=MAX_RAW_BYTES), rng)


def _part(data: bytes, rng: random.Random) -> bool:
    """Read some rows of all columns out of the frames that they need; return whether they were the seed's."""
    size = min(len(data), len(tail_of(SEED)))
    frames = FrameReader(data[len(data) - size :], name="s", max_raw_bytes=MAX_RAW_BYTES, stored_bytes=len(data))

    def whole(cause: ShardCorrupt) -> FrameReader:
        raise cause

    reader = PartialShard(frames, get=lambda start, stop: data[start:stop], on_damage=whole)
    lo = rng.randint(0, reader.num_rows)
    hi = rng.randint(lo, reader.num_rows)
    reader.load(reader.schema, lo, hi)
    columns = reader.columns(lo=lo, hi=hi)
    if columns.num_rows > MAX_DICTS:
        return False
    return [plain(row) for row in to_samples(columns)] == ROWS[lo:hi]


def _raw(data: bytes, rng: random.Random) -> bool:
    descriptor = os.memfd_create("entry")
    os.write(descriptor, data)
    kept = os.dup(descriptor)
    again = partial(os.dup, kept) if rng.random() < 0.5 else None
    try:
        file = RawFile(descriptor, name="e", digest=DIGEST.hex(), max_raw_bytes=MAX_RAW_BYTES, open_again=again)
        file.verify()
        return read_shard(PayloadShard(file, name="e", is_decoded=True), rng)
    finally:
        os.close(kept)


def _index(data: bytes, rng: random.Random) -> bool:
    index = Index.parse(data, url="i")
    if not all(map(is_safe_name, index.names)) or min([*index.rows, *index.sizes, *index.raw_sizes], default=0) < 0:
        raise AssertionError("an index that no index may be")
    Schema.from_json(index.schema)
    return index.fingerprint == ORIGINAL.fingerprint and index.num_samples == ORIGINAL.num_samples


def _foreign(data: bytes, rng: random.Random) -> bool:
    _, columns = columns_of(load_foreign(data, name="f", max_raw_bytes=MAX_RAW_BYTES))
    if columns.num_rows <= MAX_DICTS:
        to_samples(columns)
    return True  # there is no checksum in it: whatever it says is what it says


def _state(data: bytes, rng: random.Random) -> bool:
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
        return True  # the caller's: we are given a dict
    State.from_dict(state)
    return True


READERS: Final[dict[str, Callable[[bytes, random.Random], bool]]] = {
    "shard": _shard, "raw": _raw, "index": _index, "foreign": _foreign, "state": _state,
}  # fmt: skip


def judge(mutated: Input, rng: random.Random) -> str:
    """Return which figure the input belongs to."""
    try:
        is_same = READERS[mutated.target](mutated.data, rng)
    except StreamShardsError:
        return "caught"
    except MemoryError:
        return "over_bound"
    except RuntimeError as error:
        return "over_bound" if "allocate memory" in str(error) else "other_errors"
    except Exception:  # noqa: BLE001 whatever it is, it is a fault, and counted
        return "other_errors"
    return "harmless" if is_same or mutated.is_hostile else "wrong_rows"


# -- many --------------------------------------------------------------------------------------------------------------

_NAMES: Final = [field.name for field in fields(Figures)]


class _Shared:
    """Figures and the number at hand, in memory that parent and child share."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 8 * (len(_NAMES) + 1))
        self.values = np.frombuffer(self._map, np.int64)

    def add(self, name: str) -> None:
        self.values[1 + _NAMES.index(name)] += 1

    def figures(self) -> Figures:
        return Figures(*self.values[1:].tolist())


def _child(shared: _Shared, start: int, count: int, until: float, folder: Path) -> None:
    faulthandler.enable()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + BOUND_BYTES, pages + BOUND_BYTES))
    for number in range(start, start + count):
        if time.monotonic() > until:
            break
        shared.values[0] = number
        mutated = make_input(number)
        shared.add("inputs")
        if mutated.target == "shard":
            shared.add("shards")
        signal.setitimer(signal.ITIMER_REAL, MAX_S)
        verdict = judge(mutated, random.Random(number))
        signal.setitimer(signal.ITIMER_REAL, 0)
        shared.add(verdict)
        if verdict not in ("caught", "harmless"):
            save(mutated, number, verdict, folder)


def save(mutated: Input, number: int, verdict: str, folder: Path) -> None:
    """Keep an input that is a fault."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "hostile" if mutated.is_hostile else "damaged"
    (folder / f"{number}-{mutated.target}-{kind}-{verdict}").write_bytes(mutated.data)


def fuzz(*, seconds: float, count: int = 2**62, start: int = 0, folder: Path = FOUND) -> Figures:
    """Return what came of inputs *start*, *start* + 1, …: *count* of them, or as many as *seconds* allow."""
    shared, at, end = _Shared(), start, start + count
    until = time.monotonic() + seconds
    while at < end and time.monotonic() < until:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                _child(shared, at, end - at, until, folder)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        at = int(shared.values[0]) + 1
        if status == 0:
            break
        verdict = "hangs" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "crashes"
        shared.add(verdict)
        save(make_input(at - 1), at - 1, verdict, folder)
    return shared.figures()


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutated shards, indexes, cache entries, foreign files and states.")
    parser.add_argument("--seconds", type=float, default=600, help="stop after this time (default 600)")
    parser.add_argument("--count", type=int, default=2**62, help="stop after so many inputs")
    parser.add_argument("--start", type=int, default=None, help="the first input's number (default: of the clock)")
    arguments = parser.parse_args()
    start = int(time.time()) * 10**6 if arguments.start is None else arguments.start
    began = time.monotonic()
    torch.set_num_threads(1)
    figures = fuzz(seconds=arguments.seconds, count=arguments.count, start=start)
    print(figures.table())
    took_s = time.monotonic() - began
    print(f"make fuzz: {figures.inputs:,} inputs from number {start} in {took_s:,.0f} s, {figures.faults} faults")
    if figures.faults:
        print(f"the inputs that were faults lie in {FOUND}")
    return 1 if figures.faults else 0
